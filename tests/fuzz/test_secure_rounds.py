"""Mutated replies and tasks of rounds that are summed under masks: refused by name, or harmless to the others.

`FUZZ_TRIALS` says how many; a whole round is tried for every hundredth.
"""

import random

import torch

from fedmomentum.errors import FedMomentumError
from tests.fuzz.mutate import NUM_TRIALS, mutate_safetensors
from tests.runs import nudge
from tests.secure_runs import Federation


def test_mutated_replies_end_their_clients_part_only(tmp_path):
    """Of four clients one lies at any step: three open the sums, and the model is finite."""
    federation = Federation(tmp_path, federation={"num_rounds": 1})
    honest = {name: client.handle for name, client in federation.clients.items()}
    for trial in range(max(3, NUM_TRIALS // 100)):
        draw = random.Random(trial)
        liar = draw.choice(federation.names)
        chosen = draw.randrange(2, 12)
        count = 0

        def lie(payload, liar=liar, draw=draw, chosen=chosen):
            nonlocal count
            reply = honest[liar](payload)
            count += 1
            return mutate_safetensors(reply, draw)[1] if count == chosen else reply

        for name, client in federation.clients.items():
            client.handle = lie if name == liar else honest[name]
        try:
            model = federation.run(tmp_path / f"out {trial}")
        except FedMomentumError as error:
            # A sum cannot tell whose values are wrong: what comes of it is refused as a whole.
            assert "holds NaN or Inf" in str(error), (trial, error)
            continue
        for matrix in model.adapter.modules.values():
            assert bool(torch.isfinite(matrix.dense()).all()), trial


def test_mutated_tasks_are_refused_by_the_client(tmp_path):
    federation = Federation(tmp_path, federation={"num_rounds": 1}, evaluation={"every": 1})
    federation.run(tmp_path / "out")
    payloads = [payload for task, payload, _ in federation.seen if task.client_id == "site1"]
    kinds = {task.kind for task, _, _ in federation.seen}
    assert kinds == {"describe", "train", "evaluate", "sum"}
    federation.start_client("site1")
    client = federation.clients["site1"]
    client.training_function = nudge
    num_refused = 0
    for trial in range(NUM_TRIALS):
        draw = random.Random(trial)
        change, mutated = mutate_safetensors(draw.choice(payloads), draw)
        try:
            client.handle(mutated)
        except FedMomentumError as error:
            num_refused += 1
            assert str(error), (trial, change)
    assert num_refused > NUM_TRIALS / 4
