"""A run with remote clients: the same bits as on one machine, and nothing from a client is trusted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmomentum.errors import ConfigError, QuorumError
from fedmomentum.global_model.model import GlobalModel, object_names
from fedmomentum.protocol.codec import decode_task
from fedmomentum.protocol.transport import Failure, InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.utils.tensors import safetensors_bytes
from tests.runs import Events, altered, chain, nudge, objects, start, timeless, tiny_config
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def make_clients(config, folder, names=("site0", "site1", "site2"), function=nudge):
    """Each party with its own model, data and store, as on machines of their own."""
    clients = {}
    for name in names:
        client = prepare_client(config, name, folder / name)
        client.training_function = function or client.training_function
        clients[name] = client
    return clients


def handlers(clients):
    return {name: client.handle for name, client in clients.items()}


def test_parties_on_their_own_make_the_run_of_one_machine(folder, tmp_path):
    """Every hash, byte count and metric is that of the run in one process; a party reads no other's data."""
    config = tiny_config(folder, federation={"num_rounds": 3}, evaluation={"num_examples": 2})
    own = {
        name: replace(
            config, data=replace(config.data, client_files={name: config.data.client_files[name]})
        )
        for name in ("site0", "site1", "site2")
    }
    clients = {name: make_clients(own[name], tmp_path, [name])[name] for name in own}
    server = replace(config, data=replace(config.data, client_files={}))  # the server has no data
    run_federation(InProcessTransport(handlers(clients)), server, tmp_path / "over")
    start(config, tmp_path / "one")
    assert chain(tmp_path / "over") == chain(tmp_path / "one")
    assert timeless(tmp_path / "over") == timeless(tmp_path / "one")
    assert objects(tmp_path / "over") == objects(tmp_path / "one")
    for name in own:  # a party keeps what the last model needs, and no more
        model = GlobalModel.load(tmp_path / "over")
        wanted = object_names(model.manifest())
        assert {file.removesuffix(".safetensors") for file in objects(tmp_path / name)} == wanted


def test_a_run_over_a_transport_resumes_where_it_was(folder, tmp_path):
    config = tiny_config(folder, federation={"num_rounds": 3})
    clients = handlers(make_clients(config, tmp_path))

    def stop(event, facts):
        if event == "aggregate" and len(list((tmp_path / "over" / "rounds").iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(
            InProcessTransport(clients), config, tmp_path / "over", callbacks=[Events(stop)]
        )
    run_federation(InProcessTransport(clients), config, tmp_path / "over", resume=True)
    start(config, tmp_path / "one")
    assert chain(tmp_path / "over") == chain(tmp_path / "one")


def test_a_party_without_data_is_refused_with_the_reason(folder, tmp_path):
    config = tiny_config(folder)
    with pytest.raises(ConfigError, match="names site0, site1, site2; this client is nobody"):
        prepare_client(config, "nobody", tmp_path)
    generated = replace(config.data, client_files={}, source="reasoning-gym", category_column=None)
    with pytest.raises(ConfigError, match="divided among client-0, .*; this client is site0"):
        prepare_client(replace(config, data=generated), "site0", tmp_path)
    with pytest.raises(ConfigError, match="data.source must be given"):
        prepare_client(
            replace(config, data=replace(config.data, client_files={})), "site0", tmp_path
        )


# ── who may start a run ──


def _drop_factor(fields):
    if fields["tensors"]:
        del fields["tensors"][min(fields["tensors"])]


def _fill_b(fields):
    for name, tensor in fields["tensors"].items():
        if "lora_B" in name:
            fields["tensors"][name] = tensor + 1


def _factors(change):
    """Alter every factor A of the adapter."""

    def alter(fields):
        for name, tensor in fields["tensors"].items():
            if "lora_A" in name:
                fields["tensors"][name] = change(tensor)

    return alter


def _rename(old, new):
    """Rename a module in the adapter's tensors, and nowhere else."""

    def alter(fields):
        fields["tensors"] = {
            name.replace(old, new): tensor for name, tensor in fields["tensors"].items()
        }

    return alter


def _deep(levels):
    value = 1
    for _ in range(levels):
        value = {"r": value}
    return value


def _metric(key, value):
    return lambda fields: fields["metrics"].update({key: value})


def _setting(key, value):
    return lambda fields: fields["metrics"].update(
        {"adapter_config": {**fields["metrics"]["adapter_config"], key: value}}
    )


BAD = {
    "no hash": (_metric("sha256", None), "answer.sha256: Expected `str`, got `null`"),
    "a count that is none": (_metric("num_train", -1), "answer.num_train: Expected `int` >= 0"),
    "versions that are none": (
        _metric("versions", {"torch": 3}),
        "answer.versions.*Expected `str`, got `int`",
    ),
    "half a pair": (_drop_factor, "lora_A.weight of its fresh adapter is missing"),
    "adds something": (_fill_b, "adds something already"),
    "another scaling": (
        lambda f: f["metrics"].update(scalings=dict.fromkeys(f["metrics"]["scalings"], 9.0)),
        "9.0",
    ),
    "no scalings": (_metric("scalings", {}), "misses the scalings"),
    "a number of 400 digits": (_metric("num_train", 10**400), "answer.num_train"),
    "settings without end": (
        _metric("adapter_config", _deep(400)),
        "adapter_config is nested deeper",
    ),
    "a name that moves the cursor": (_metric("dtype", "\x1b[2J"), "answer.dtype"),
    "a mebibyte of name": (_metric("dtype", "x" * 2**20), "answer.dtype"),
    "float64": (_factors(lambda t: t.double()), "in torch.float64; wanted"),
    "one dimension": (_factors(lambda t: t.flatten()), "wanted .2, 32. in float32"),
    "nothing in them": (_factors(lambda t: t[:0]), "wanted .2, 32. in float32"),
    "another inner size": (_factors(lambda t: t[:1]), "wanted .2, 32. in float32"),
    "not finite": (_factors(lambda t: t * float("nan")), "holds a number of size nan"),
    "beyond all bounds": (_factors(lambda t: t * 1e30), "at most 10000 is accepted"),
    "nothing that can train": (_factors(lambda t: t * 0), "rows of A that depend on each other"),
    "one direction twice": (
        _factors(lambda t: t[:1].expand(2, -1).contiguous()),
        "rows of A that depend",
    ),
    "one module more": (
        lambda f: (
            f["tensors"].update(
                {f"base_model.model.x.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}
            )
            if f["tensors"]
            else None
        ),
        "which it did not describe",
    ),
    "other modules": (
        _rename("q_proj", "x_proj"),
        "q_proj.lora_A.weight of its fresh adapter is missing",
    ),
    "another alpha": (_setting("lora_alpha", 1), "lora_alpha = 1; wanted 6"),
    "a library to import": (_setting("auto_mapping", {"parent_library": "os"}), "auto_mapping"),
    "more than W + sBA": (_setting("use_dora", True), "use_dora"),
    "a whole module": (
        lambda f: (
            f["tensors"].update({"base_model.model.x.weight": torch.ones(2)})
            if f["tensors"]
            else None
        ),
        "which it did not describe",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_description_is_refused_by_name_and_another_starts_the_run(folder, tmp_path, name):
    change, words = BAD[name]
    config = tiny_config(folder, federation={"num_rounds": 1})
    honest = handlers(make_clients(config, tmp_path, ["site0", "site1"]))
    corrupted = honest | {
        "site0": lambda payload: altered(change, "describe")(payload, honest["site0"])
    }
    run_federation(InProcessTransport(corrupted), config, tmp_path / "over")  # site1 starts it
    with pytest.raises(QuorumError, match=words):
        run_federation(
            InProcessTransport({"site0": corrupted["site0"]}), config, tmp_path / "alone"
        )


def test_the_most_common_base_is_used_and_other_clients_are_left_out(folder, tmp_path, caplog):
    config = tiny_config(folder, federation={"num_rounds": 1})
    other = tiny_llama(tmp_path / "other", seed=5)
    clients = make_clients(config, tmp_path, ["site1", "site2"])
    clients |= make_clients(
        replace(config, model=replace(config.model, name=str(other))), tmp_path, ["site0"]
    )
    run_federation(InProcessTransport(handlers(clients)), config, tmp_path / "over")
    assert "site0 has another base model" in caplog.text
    row = timeless(tmp_path / "over")[1]
    assert (
        row["accepted"] == ["site1", "site2"]
        and "the base model differs" in row["failures"]["site0"]
    )


def test_a_client_with_another_lora_is_refused_by_name(folder, tmp_path):
    config = tiny_config(folder, federation={"num_rounds": 1})
    clients = make_clients(config, tmp_path, ["site0", "site1"])
    clients |= make_clients(
        replace(config, lora=replace(config.lora, lora_alpha=4.0)), tmp_path, ["site2"]
    )
    run_federation(InProcessTransport(handlers(clients)), config, tmp_path / "over")
    reason = timeless(tmp_path / "over")[1]["failures"]["site2"]
    assert (
        "the run has this client train {'rank': 2, 'lora_alpha': 6.0" in reason
        and "'lora_alpha': 4.0" in reason
    )


def test_a_run_starts_from_what_most_clients_adapt(folder, tmp_path, caplog):
    """A client that names other modules, or another base, decides nothing, even if its name sorts first."""
    config = tiny_config(folder, federation={"num_rounds": 1})
    honest = handlers(make_clients(config, tmp_path))

    def another_module(fields):
        for key in ("shapes", "scalings"):
            fields["metrics"][key] = {
                n.replace("q_proj", "x_proj"): v for n, v in fields["metrics"][key].items()
            }
        fields["tensors"] = {n.replace("q_proj", "x_proj"): t for n, t in fields["tensors"].items()}

    corrupted = honest | {
        "site0": lambda payload: altered(another_module, "describe")(payload, honest["site0"])
    }
    model = run_federation(InProcessTransport(corrupted), config, tmp_path / "over")
    assert not any("x_proj" in module for module in model.adapter.modules)
    assert "site0 adapts other modules than the run" in caplog.text
    two = {name: corrupted[name] for name in ("site0", "site1")}
    with pytest.raises(
        QuorumError, match="disagree on the base model or on what is adapted.*site0: .*; site1: "
    ):
        run_federation(InProcessTransport(two), config, tmp_path / "two")
    assert not (tmp_path / "two" / "config.toml").exists()


def test_garbage_and_silence_do_not_start_a_run(folder, tmp_path):
    config = tiny_config(folder)
    bad = {
        "site0": lambda payload: b"x" * 99,
        "site1": lambda payload: safetensors_bytes({}, ("reply", "{}")),
    }

    class Silent(InProcessTransport):
        def send_and_receive(self, tasks):
            return (
                (c, a) for c, a in super().send_and_receive(tasks) if not isinstance(a, Failure)
            )

    bad["site2"] = lambda payload: 1 / 0
    with pytest.raises(
        QuorumError,
        match="site0: .*not safetensors.*site1: .*protocol|site2: missing: no answer in time",
    ):
        run_federation(Silent(bad), config, tmp_path / "over")


def test_a_client_with_another_split_gives_a_warning(folder, tmp_path, caplog):
    """It comes back with another seed, and would be scored on what it trained on before; resumed or not."""
    config = tiny_config(folder, federation={"num_rounds": 3})
    clients = make_clients(config, tmp_path)

    def stop(event, facts):
        if event == "aggregate" and len(list((tmp_path / "over" / "rounds").iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_federation(
            InProcessTransport(handlers(clients)),
            config,
            tmp_path / "over",
            callbacks=[Events(stop)],
        )
    assert "splits its examples differently" not in caplog.text
    other = replace(config, run=replace(config.run, seed=config.run.seed + 1))
    clients |= make_clients(other, tmp_path, ["site1"])
    run_federation(InProcessTransport(handlers(clients)), config, tmp_path / "over", resume=True)
    warnings = [
        record.message
        for record in caplog.records
        if "splits its examples differently" in record.message
    ]
    assert len(warnings) == 1 and warnings[0].startswith(
        "round 2: site1 splits its examples differently than before"
    )


# ── versions ──


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_clients_that_missed_rounds_end_with_the_same_bytes(folder, tmp_path_factory, data):
    """Joining late, missing any rounds, being wiped: the same base as a client that was always there.

    Six rounds of a rank that is consolidated within them.
    """
    out = tmp_path_factory.mktemp("versions")
    lora = {"rank": 6, "target-modules": ["v_proj"]}
    config = tiny_config(
        folder,
        lora=lora,
        federation={"num_rounds": 6, "min-valid-fraction": 0.01},
        evaluation={"every": 0},
    )
    clients = make_clients(config, out)
    honest = handlers(clients)
    away = {
        name: data.draw(st.sets(st.integers(1, 5)), label=f"{name} is away in")
        for name in ("site1", "site2")
    }
    wiped = {
        name: data.draw(st.sets(st.integers(1, 6)), label=f"{name} is wiped before")
        for name in away
    }

    class Flaky(InProcessTransport):
        def send_and_receive(self, tasks):
            for name, payload in tasks.items():
                task = decode_task(payload)
                if task.server_round in away.get(name, ()):
                    yield name, Failure("away")
                    continue
                if task.kind == "train" and task.server_round in wiped.get(name, ()):
                    wiped[name] = wiped[name] - {task.server_round}
                    for file in (out / name).rglob("*.safetensors"):
                        file.unlink()
                    clients[name].store.cache.clear()
                    clients[name].model.base_weights.apply([])
                yield from super().send_and_receive({name: payload})

    model = run_federation(Flaky(honest), config, out / "over")
    rows = timeless(out / "over")
    for name, gone in away.items():
        assert [n for n in range(1, 7) if name in rows[n]["failures"]] == sorted(gone)
    if not any(away.values()):  # three residuals of 480 numbers pass twice a matrix of 512
        first = model.base_update[0].matrices
        assert all(isinstance(matrix, torch.Tensor) for matrix in first.values())
    weights = {}
    for name, client in clients.items():
        local = client.model
        local.load_global_model(model)
        weights[name] = {
            module: local.base_weights.weight(module).clone()
            for module in local.base_weights.layers
        }
    for module, weight in weights["site0"].items():
        assert torch.equal(weight, weights["site1"][module]) and torch.equal(
            weight, weights["site2"][module]
        )
