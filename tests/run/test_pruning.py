"""HetLoRA's clients prune their own ranks between rounds; server and clients agree on them, also after a kill."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from fedmomentum.aggregation import Method
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.lora.live_layers import ADAPTER_NAME, lora_layers
from fedmomentum.protocol.codec import decode_task
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.utils.tensors import read_safetensors
from tests.runs import altered, chain, nudge, objects, start, timeless, tiny_config

RANKS = {"site0": [4, 4, 2, 1], "site1": [4, 4, 4, 4], "site2": [4, 4, 2, 1]}
SETTINGS = {"decay": 0.5, "min-rank": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(folder, num_rounds=4, **settings):
    return tiny_config(
        folder,
        lora={"rank": 4, "lora-alpha": 12.0},
        method={"name": "hetlora", "settings": {**SETTINGS, **settings}},
        federation={
            "num_rounds": num_rounds,
            "outlier_norm_ratio": 1e9,
        },  # `fade` is no training: it grows tenfold
    )


def fade(model, examples, **settings):
    """Two clients lose the tails of their adapters in training, one does not."""
    report = nudge(model, examples, **settings)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            B = layer.parameter("B")
            B[:, B.shape[1] // 2 :] *= (
                10 if len(examples) == 18 else 1e-3
            )  # site1's 24 less the held-out
    return report


def ranks(out):
    rows = timeless(out)
    return {
        client: [row["clients"][client]["rank"] for row in rows[1:]]
        for client in rows[1]["clients"]
    }


def parties(config, folder, function=fade):
    found = {}
    for name in config.data.client_files:
        client = prepare_client(config, name, folder / name)
        client.training_function = function or client.training_function
        found[name] = client.handle
    return found


def test_ranks_fall_where_tails_shrank_and_both_ways_give_equal_hashes(folder, tmp_path):
    config = config_of(folder)
    run = start(config, tmp_path / "one", function=fade)
    run_federation(InProcessTransport(parties(config, tmp_path)), config, tmp_path / "over")
    assert ranks(tmp_path / "one") == RANKS
    assert chain(tmp_path / "one") == chain(tmp_path / "over")
    assert timeless(tmp_path / "one") == timeless(tmp_path / "over")
    assert chain(tmp_path / "one")["0004.json"]["run"]["ranks"] == {
        "site0": 1,
        "site1": 4,
        "site2": 1,
    }
    (local,) = {
        id(local): local for local in [client.model for client in run.clients]
    }.values()  # one base in memory, whatever the ranks
    local.load_global_model(run.model)
    live = lora_layers(local.peft)
    assert all(
        layer.layer.base_layer is local.base_weights.layers[module]
        for module, layer in live.items()
    )
    assert {layer.layer.r[ADAPTER_NAME] for layer in live.values()} == {4}


def test_real_training_prunes_under_the_penalty_and_learns(folder, tmp_path):
    config = config_of(folder, strength=3.0)
    start(
        replace(config, training=replace(config.training, local_steps=6)),
        tmp_path / "run",
        function=None,
    )
    assert any(seen[-1] < 4 for seen in ranks(tmp_path / "run").values())
    rows = timeless(tmp_path / "run")
    assert rows[-1]["evaluation"]["total"]["loss"] < rows[0]["evaluation"]["total"]["loss"]
    assert all(row["failures"] == {} for row in rows)


def test_a_pruned_client_starts_from_the_first_components_in_the_same_scaling(folder, tmp_path):
    seen = []

    def watch(model, examples, **settings):
        layers = lora_layers(model)
        seen.append(
            {
                m: (layer.parameter("B").detach().clone(), layer.scaling)
                for m, layer in layers.items()
            }
        )
        return fade(model, examples, **settings)

    config = config_of(folder)
    start(
        replace(config, run=replace(config.run, keep_checkpoints=9)),
        tmp_path / "run",
        function=watch,
    )
    before = GlobalModel.load(tmp_path / "run", 3).adapter
    for client, rank in zip(range(9, 12), (1, 4, 1), strict=True):
        for module, (B, scaling) in seen[client].items():
            assert scaling == 3.0 and torch.equal(B, before.modules[module].B[:, :rank])


def test_payloads_are_the_declared_numbers_at_the_present_rank(folder, tmp_path):
    config, seen = config_of(folder), []
    method, found = METHODS["hetlora"](), parties(config, tmp_path)

    def counted(payload, step):
        answer, task = step(payload), decode_task(payload)
        if task.kind == "train":
            tensors, _ = read_safetensors(answer, "reply")
            size = sum(t.numel() * t.element_size() for n, t in tensors.items() if "lora_" in n)
            seen.append((task.client_id, task.server_round, size))
        return answer

    found = {name: partial(counted, step=step) for name, step in found.items()}
    model = run_federation(InProcessTransport(found), config, tmp_path / "run")
    shapes = [matrix.shape for matrix in model.adapter.modules.values()]
    for client, server_round, size in seen:
        rank = RANKS[client][server_round - 1]
        assert size == 4 * sum(
            method.num_uplink_parameters(*shape, rank, server_round) for shape in shapes
        )
    assert len(seen) == 12
    first, last = (timeless(tmp_path / "run")[i]["uplink_bytes"]["site0"] for i in (1, 4))
    assert last < first


@pytest.mark.parametrize("stopped", [2, 3])
def test_a_run_resumes_to_the_same_bits(folder, tmp_path, stopped):
    config = config_of(folder)
    start(config, tmp_path / "whole", function=fade)

    def stop(event, facts):
        if (
            event == "aggregate"
            and (tmp_path / "parts" / "rounds" / f"{stopped - 1:04d}.json").exists()
        ):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "parts", function=fade, observer=stop)
    start(config, tmp_path / "parts", function=fade, resume=True)
    assert chain(tmp_path / "parts") == chain(tmp_path / "whole")
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    assert objects(tmp_path / "parts") == objects(tmp_path / "whole")


OUT_OF_RANGE = "its next_rank is {}; wanted a whole number from 1 to 4, its rank now"
NO_RANK = "answer.next_rank: Expected `int"


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (5, OUT_OF_RANGE.format(5)),
        (None, OUT_OF_RANGE.format(None)),
        (0, NO_RANK),
        (-1, NO_RANK),
        (True, NO_RANK),
        (2.0, NO_RANK),
        ("2", NO_RANK),
    ],
)
def test_a_rank_that_no_client_can_have_is_refused_by_name(folder, tmp_path, lie, reason):
    config = config_of(folder, num_rounds=1)
    found = parties(config, tmp_path)
    altering = altered(lambda fields: fields["metrics"].update(next_rank=lie), "train")
    lying = partial(altering, honest=found["site1"])
    run_federation(InProcessTransport({**found, "site1": lying}), config, tmp_path / "run")
    row = timeless(tmp_path / "run")[1]
    assert list(row["failures"]) == ["site1"] and row["failures"]["site1"].startswith(reason)
    assert row["accepted"] == ["site0", "site2"]
    assert json.loads((tmp_path / "run" / "rounds" / "0001.json").read_text())["run"][
        "ranks"
    ].keys() == {
        "site0",
        "site2",
    }


def test_only_hetlora_prunes():
    assert [name for name, kind in METHODS.items() if kind().prunes] == ["hetlora"]
    for kind in (
        METHODS.values()
    ):  # what is pruned must be allowed to differ, and nothing of another size kept back
        assert isinstance(kind(), Method) and (
            not kind().prunes or (kind.unequal_ranks and kind.shared_factors == "BA")
        )
