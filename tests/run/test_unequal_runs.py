"""Clients that train less than others: other ranks, other scalings, other modules; one effective model for all."""

from dataclasses import replace

import pytest
import torch

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.config.toml import from_dict, to_dict
from fedmomentum.errors import ConfigError
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from tests.runs import chain, nudge, prepare, start, timeless, tiny_config

OWN = {
    "ranks": {"site0": {"rank": 1}, "site1": {"rank": 2}},
    "scalings": {"site0": {"lora-alpha": 2.0}, "site1": {"lora-alpha": 20.0}},
    "modules": {
        "site0": {"target-modules": ["q_proj"]},
        "site1": {"target-modules": ["layers.0.self_attn.v_proj"]},
    },
    "all": {
        "site0": {"rank": 1, "lora-alpha": 5.0, "target-modules": ["v_proj"]},
        "site1": {"rank": 3},
    },
}
UNEQUAL = [name for name, kind in METHODS.items() if kind.unequal_ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(folder, own, name="fedmomentum", every=1, **method):
    lora = {"rank": 4, "lora-alpha": 12.0, "clients": OWN[own]}
    return tiny_config(
        folder,
        lora=lora,
        method={"name": name, **method},
        federation={"num_rounds": 3},
        evaluation={"every": every},
    )


@pytest.mark.parametrize("split", ["balanced", "procrustes", "singular", "aligned"])
@pytest.mark.parametrize("own", OWN)
def test_the_sum_is_exact_on_the_weights_that_clients_load(folder, tmp_path, own, split):
    start(config_of(folder, own, settings={"split": split}), tmp_path / "run")
    for row in timeless(tmp_path / "run")[1:]:
        assert row["failures"] == {} and row["accepted"] == ["site0", "site1", "site2"]
        assert row["exactness_error"] < 1e-4 and row["applied_share"] > 0.999
    run = prepare(config_of(folder, own, settings={"split": split}), tmp_path / "again")
    run.close()


def test_models_of_one_process_share_all_weights_but_those_of_adapted_modules(folder, tmp_path):
    run = prepare(config_of(folder, "all"), tmp_path / "run")
    models = [
        local.peft.get_base_model()
        for local in {id(m): m for m in [client.model for client in run.clients]}.values()
    ]
    adapted = set(run.local.base_weights.layers)
    run.close()
    assert len(models) == 3 and adapted
    first, *others = [
        {
            name.replace(".base_layer", ""): p.data_ptr()
            for name, p in model.named_parameters()
            if "lora_" not in name
        }
        for model in models
    ]
    for other in others:
        assert other.keys() == first.keys()
        own = {name.removesuffix(".weight") for name in first if other[name] != first[name]}
        assert own == adapted


@pytest.mark.parametrize("own", OWN)
def test_parties_on_their_own_make_the_run_of_one_machine(folder, tmp_path, own):
    config, found = config_of(folder, own), {}
    for name in config.data.client_files:
        client = prepare_client(config, name, tmp_path / name)
        client.training_function = nudge
        found[name] = client.handle
    run_federation(InProcessTransport(found), config, tmp_path / "over")
    start(config, tmp_path / "one")
    assert chain(tmp_path / "over") == chain(tmp_path / "one")
    assert timeless(tmp_path / "over") == timeless(tmp_path / "one")


@pytest.mark.parametrize("own", ["attention", r".*\.(q|o)_proj", ["up_proj", "mlp.down_proj"]])
def test_a_client_adapts_a_part_of_all_linear_that_the_server_derives_too(folder, tmp_path, own):
    """The k_proj of 16 x 32 is too small for rank 17 of the run, and so for a client of any rank."""
    for rank, part in ((4, {}), (17, {"rank": 3})):
        clients = {"site1": {"target-modules": own} | part}
        lora = {"rank": rank, "target-modules": "all-linear", "clients": clients}
        run = start(tiny_config(folder, lora=lora), tmp_path / str(rank))
        names = {module.rpartition(".")[2] for module in run.model.adapter.modules}
        assert ("k_proj" in names) == (rank == 4) and {"q_proj", "down_proj"} <= names
        assert all(row["exactness_error"] < 1e-5 for row in timeless(tmp_path / str(rank))[1:])


def test_clients_send_their_own_rank_and_receive_the_full_one(folder, tmp_path):
    start(config_of(folder, "ranks", every=0), tmp_path / "run")
    row = timeless(tmp_path / "run")[1]
    up = row["uplink_bytes"]
    per_rank = 4 * (
        2 * (32 + 32) + 2 * (16 + 32)
    )  # two layers; queries are 32 x 32, values 16 x 32
    assert up["site2"] - up["site1"] == pytest.approx(
        2 * per_rank, abs=32
    )  # headers: shapes have more digits
    assert up["site1"] - up["site0"] == pytest.approx(per_rank, abs=32)
    assert len(set(row["downlink_bytes"].values())) == 1


def test_every_client_evaluates_one_and_the_same_model(folder, tmp_path):
    """Law: all clients share one effective model, whatever they train of it."""
    run = start(config_of(folder, "all"), tmp_path / "run")
    seen = []
    for client in run.clients:
        local = client.model
        local.load_global_model(run.model, run.method)
        seen.append(
            torch.stack(
                [local.probes(5)["effective"][m] for m in sorted(local.base_weights.layers)]
            )
        )
    assert len({id(local) for local in [client.model for client in run.clients]}) == 3
    assert torch.allclose(seen[0], seen[1], atol=1e-5) and torch.allclose(
        seen[0], seen[2], atol=1e-5
    )


@pytest.mark.parametrize("name", UNEQUAL)
@pytest.mark.parametrize("own", ["ranks", "all"])
def test_methods_that_take_unequal_ranks_run_with_them(folder, tmp_path, name, own):
    start(config_of(folder, own, name), tmp_path / "run", function=None)
    rows = timeless(tmp_path / "run")
    assert all(row["failures"] == {} for row in rows)
    assert rows[-1]["evaluation"]["total"]["loss"] < rows[0]["evaluation"]["total"]["loss"]
    if METHODS[name]().exact:
        assert all(row["exactness_error"] < 1e-4 for row in rows[1:])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("own", ["scalings", "modules"])
def test_every_method_runs_with_other_scalings_and_modules(folder, tmp_path, name, own):
    """Three rounds, so that methods that alternate have trained either factor."""
    start(config_of(folder, own, name), tmp_path / "run")
    for row in timeless(tmp_path / "run")[1:]:
        assert row["failures"] == {} and row["accepted"] == ["site0", "site1", "site2"]
        if METHODS[name]().exact:
            assert row["exactness_error"] < 1e-4, row["round"]


def test_a_run_of_unequal_ranks_resumes_to_the_same_bits(folder, tmp_path):
    config = config_of(folder, "all")
    start(config, tmp_path / "whole")
    start(replace(config, federation=replace(config.federation, num_rounds=1)), tmp_path / "parts")
    start(config, tmp_path / "parts", resume=True)
    assert chain(tmp_path / "parts")["0003.json"] == chain(tmp_path / "whole")["0003.json"]


def test_methods_that_need_one_rank_say_so_before_anything_runs(folder, tmp_path):
    with pytest.raises(ConfigError, match="FedIT needs every client at one rank"):
        start(config_of(folder, "ranks", "fedit"), tmp_path / "run")


def test_a_party_that_trains_something_else_than_the_run_is_left_out_with_the_reason(
    folder, tmp_path
):
    config, found = config_of(folder, "ranks"), {}
    other = from_dict({**to_dict(config), "lora": {**to_dict(config)["lora"], "clients": {}}})
    for name in config.data.client_files:
        client = prepare_client(config if name != "site1" else other, name, tmp_path / name)
        client.training_function = nudge
        found[name] = client.handle
    run_federation(InProcessTransport(found), config, tmp_path / "over")
    assert "the run has this client train {" in timeless(tmp_path / "over")[1]["failures"]["site1"]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"site0": {"rank": 5}},
            r"lora.clients.site0.rank must be a whole number from 1 to lora.rank, 4; got 5",
        ),
        ({"site0": {"rank": 0}}, "from 1 to lora.rank"),
        ({"site0": {"alpha": 1}}, "one of rank, lora-alpha"),
        ({"site0": {"lora-alpha": -1}}, "a number above 0"),
        ({"site0": {"target-modules": 5}}, "a list of names"),
        ({"site0": 3}, "a table"),
        ({"nobody": {"rank": 1}}, "names nobody, which is no client; there are site0"),
    ],
)
def test_mistakes_are_refused_by_name(folder, tmp_path, own, words):
    with pytest.raises(ConfigError, match=words):
        start(tiny_config(folder, lora={"rank": 4, "clients": own}), tmp_path / "run")
