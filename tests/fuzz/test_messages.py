"""Mutated replies to the server and mutated tasks to a client: refused by name, or harmless; no other client is affected.

`FUZZ_TRIALS` says how many of each; `make test-fuzz` asks for 20,000.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import msgspec
import pytest
import torch

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.errors import FedMomentumError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.protocol.codec import decode_reply, decode_task, encode_task
from fedmomentum.protocol.messages import DescribeRequest, Task
from fedmomentum.protocol.transport import Failure, InProcessTransport
from fedmomentum.run import networked as run_module
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.utils.tensors import read_safetensors
from tests.fuzz.mutate import NUM_TRIALS, Budget, mutate_safetensors
from tests.runs import nudge, tiny_config

CLIENTS = ("site0", "site1", "site2")
RUN_ID = "f" * 32


def key_of(task: Task) -> tuple[str, int, bool]:
    request = task.request
    return task.kind, task.server_round, isinstance(request, DescribeRequest) and request.adapter


def with_all_objects(payload: bytes, pool: dict[str, bytes]) -> bytes:
    """The task with every object that it names: it can be done whatever the client has."""
    task = decode_task(payload)
    if isinstance(task.request, DescribeRequest):
        return payload
    names = task.request.manifest.needed
    return encode_task(replace(task, objects={name: pool[name] for name in sorted(names)}))


class Recorded(InProcessTransport):
    """Clients that answer as they did before, but for those that are altered."""

    def __init__(self, answers, altered=()):
        super().__init__(dict.fromkeys(CLIENTS, bytes))
        self.answers = answers
        self.altered = dict(altered)

    def send_and_receive(self, tasks):
        for client, payload in tasks.items():
            key = (client, *key_of(decode_task(payload)))
            answer = self.altered.get(key, self.answers.get(key))
            yield client, Failure("away") if answer is None else answer


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A run of one round over three clients: its settings, its tasks and its replies, by client and task."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = tiny_config(folder, federation={"num_rounds": 1}, evaluation={"every": 1})
    tasks = {}
    answers = {}
    parties = {}

    def step(client_id):
        client = prepare_client(config, client_id, folder / client_id)
        client.training_function = nudge
        parties[client_id] = client

        def answer(payload):
            key = (client_id, *key_of(decode_task(payload)))
            tasks[key] = payload
            answers[key] = client.handle(payload)
            return answers[key]

        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.secrets, "token_hex", lambda size: RUN_ID)
        steps = {name: step(name) for name in CLIENTS}
        model = run_federation(InProcessTransport(steps), config, folder / "run")
    pool = {}
    for payload in tasks.values():
        pool |= decode_task(payload).objects
    for file in (folder / "run" / "objects").iterdir():
        pool[file.stem] = file.read_bytes()
    for key, payload in tasks.items():
        tasks[key] = with_all_objects(payload, pool)
    for name in CLIENTS:  # any of them may be asked for the adapter to start from
        steps[name](encode_task(Task(RUN_ID, name, 0, DescribeRequest(adapter=True))))
    return config, tasks, answers, parties, model, folder


def replayed(config, transport, out, monkeypatch):
    monkeypatch.setattr(run_module.secrets, "token_hex", lambda size: RUN_ID)
    return run_federation(transport, config, out)


def check_directory(out):
    """What a run leaves can be read by any reader, and resumed: JSON without NaN, finite weights."""
    rows = [msgspec.json.decode(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    for name in ("environment.json", "plan.json", "partition.json"):
        msgspec.json.decode((out / name).read_bytes())
    folder = RunDirectory(out)
    try:
        model, _ = folder.resume()
    finally:
        folder.close()
    for module in model.adapter.modules:
        assert bool(torch.isfinite(model.adapter.effective(module).dense()).all())
    return rows


def test_mutated_replies_do_not_affect_other_clients(federation, tmp_path, monkeypatch):
    config, _, answers, _, whole, _ = federation
    out = tmp_path / "run"

    # The result of the run without each of the clients, for comparison.
    without = {}
    for absent in CLIENTS:
        missing = {key: answer for key, answer in answers.items() if key[:2] != (absent, "train")}
        without[absent] = replayed(config, Recorded(missing), out, monkeypatch).version
        shutil.rmtree(out)
    assert len({*without.values(), whole.version}) == 4

    num_refused = 0
    for trial in range(NUM_TRIALS):
        draw = random.Random(trial)
        key = draw.choice(sorted(answers))
        liar = key[0]
        change, mutated = mutate_safetensors(answers[key], draw)
        what = f"trial {trial}, {key}: {change}"
        with Budget() as spent:
            model = replayed(config, Recorded(answers, {key: mutated}), out, monkeypatch)
        spent.check(what)
        rows = check_directory(out)
        reason = rows[1]["failures"].get(liar, "")
        refused = reason != "" and (key[1] != "train" or not reason.startswith("evaluation: "))
        num_refused += refused
        if key[1] == "train":
            assert rows[1]["accepted"] == [
                name for name in CLIENTS if name != liar or not refused
            ], what
            if refused:
                assert model.version == without[liar], what
        else:
            assert model.version == whole.version, what
        assert len(json.dumps(rows)) < 100_000, what
        shutil.rmtree(out)
    print(f"\n{NUM_TRIALS} replies, {num_refused} of them refused")
    assert num_refused > NUM_TRIALS / 4


def timeless_reply(data):
    """A reply's tensors and head, but for the seconds."""
    tensors, metadata = read_safetensors(data, "a reply")
    return metadata, {name: tensor for name, tensor in tensors.items() if name != "seconds"}


def assert_same(one, other, what):
    (head, tensors), (other_head, other_tensors) = timeless_reply(one), timeless_reply(other)
    assert head == other_head, what
    assert tensors.keys() == other_tensors.keys(), what
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), f"{what}: {name}"


def test_mutated_tasks_leave_a_client_unchanged(federation):
    """Refused by name or done; and the next honest task gets the same answer to the bit."""
    _, tasks, answers, parties, _, _ = federation
    client = parties["site1"]
    own = sorted(key for key in tasks if key[0] == "site1")
    num_refused = 0
    for trial in range(NUM_TRIALS):
        draw = random.Random(trial)
        key = draw.choice(own)
        change, mutated = mutate_safetensors(tasks[key], draw)
        what = f"trial {trial}, {key}: {change}"
        with Budget() as spent:
            try:
                answer = client.handle(mutated)
            except FedMomentumError as error:
                assert len(str(error)) < 10_000, what
                num_refused += 1
            else:
                decode_reply(answer, decode_task(mutated), 2**30)
        spent.check(what)
        if trial % 5 == 0 or trial == NUM_TRIALS - 1:
            honest = draw.choice([key for key in own if key[1] != "describe"])
            assert_same(
                client.handle(tasks[honest]),
                answers[honest],
                f"after {what}: {honest}",
            )
    print(f"\n{NUM_TRIALS} tasks, {num_refused} of them refused")
    assert num_refused > NUM_TRIALS / 4


WIRES = [(name, "float32") for name in sorted(METHODS)]
WIRES += [("fedmomentum", "float16"), ("fedmomentum", "bfloat16"), ("hetlora", "float16")]


@pytest.mark.parametrize(("name", "dtype"), WIRES)
def test_a_run_survives_mutated_replies_of_every_method(tmp_path, name, dtype):
    """The tensors of a reply depend on the method and the wire: none lets a lie through that another refuses."""
    config = tiny_config(
        tmp_path,
        method={"name": name},
        federation={"num_rounds": 2, "uplink_dtype": dtype},
        evaluation={"every": 1},
    )
    draw = random.Random(name + dtype)
    lies = {}

    def step(client_id):
        client = prepare_client(config, client_id, tmp_path / client_id)
        client.training_function = nudge

        def answer(payload):
            honest = client.handle(payload)
            task = decode_task(payload)
            if client_id != "site2" or task.kind == "describe":
                return honest
            change, lie = mutate_safetensors(honest, draw)
            lies[task.kind, task.server_round] = change
            return lie

        return answer

    run_federation(
        InProcessTransport({name: step(name) for name in CLIENTS}), config, tmp_path / "run"
    )
    assert lies
    check_directory(tmp_path / "run")
    assert GlobalModel.load(tmp_path / "run").server_round == 2
