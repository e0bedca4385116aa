"""Every method in real rounds: what it trains, sends and costs is what it declares."""

import json
import math
from functools import partial

import pytest
import torch

from fedmomentum.aggregation.client_adapters import initialize_adapter
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.config.toml import from_dict, to_dict
from fedmomentum.errors import ConfigError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.probes import NUM_PROBES
from fedmomentum.lora.adapter import to_tensors
from fedmomentum.protocol.codec import decode_task
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.run.traffic import plan_traffic
from fedmomentum.utils.tensors import read_safetensors
from tests.runs import altered, chain, nudge, objects, start, timeless, tiny_config

ROUNDS = 3
RESIDUAL_RANKS = {"fedmomentum": 4, "fedexlora": 4, "flora": 6, "frlora": 4}
"""Of three clients at rank 2: (n - 1) r, (n - 1) r, n r, 2 r."""
every = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(folder, name, **federation):
    return tiny_config(
        folder, method={"name": name}, federation={"num_rounds": ROUNDS, **federation}
    )


def recorded(config, out, function=nudge):
    """A run of separate parties, and its payloads: (round, kind, client, task's tensors, reply's tensors)."""
    seen = []

    def step(payload, client):
        answer = client.handle(payload)
        task = decode_task(payload)
        reply, _ = read_safetensors(answer, "reply")
        objects = [read_safetensors(data, "object")[0] for data in task.objects.values()]
        seen.append((task.server_round, task.kind, client.client_id, objects, reply))
        return answer

    found = {}
    for name in config.data.client_files:
        client = prepare_client(config, name, out / "parties" / name)
        client.training_function = function or client.training_function
        found[name] = partial(step, client=client)
    model = run_federation(InProcessTransport(found), config, out / "run")
    return model, seen


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def update_bytes(reply):
    """The bytes of a reply's update: of its tensors without the probes and the seconds."""
    return num_bytes(
        {n: t for n, t in reply.items() if not n.startswith("probe.") and n != "seconds"}
    )


@every
def test_every_method_runs_with_real_training_and_both_ways_give_equal_hashes(
    folder, tmp_path, name
):
    config = config_of(folder, name)
    recorded(config, tmp_path, function=None)
    start(config, tmp_path / "one", function=None)
    assert chain(tmp_path / "run") == chain(tmp_path / "one")
    rows = timeless(tmp_path / "one")
    assert timeless(tmp_path / "run") == rows and all(row["failures"] == {} for row in rows)
    assert rows[-1]["evaluation"]["total"]["loss"] < rows[0]["evaluation"]["total"]["loss"]
    for row in rows[1:]:
        if METHODS[name]().exact:
            assert row["exactness_error"] < 1e-4
        assert row["applied_share"] is None or row["applied_share"] > 0.999


@every
def test_payloads_are_the_declared_numbers_times_their_size(folder, tmp_path, name):
    """Tensor bytes both ways; the probes and the seconds are counted apart, and so are headers."""
    config, method = config_of(folder, name), METHODS[name]()
    model, seen = recorded(config, tmp_path)
    shapes = {module: matrix.shape for module, matrix in model.adapter.modules.items()}
    rank = config.lora.rank
    uplinks, downlinks = set(), set()
    for server_round, kind, _, downlink, reply in seen:
        up = update_bytes(reply)
        if kind == "train":
            wanted = 4 * sum(
                method.num_uplink_parameters(*shape, rank, server_round)
                for shape in shapes.values()
            )
            assert up == wanted, (name, server_round)
            uplinks.add(up)
        elif kind == "evaluate":
            assert up == 0
        probes = sum(t.numel() for n, t in reply.items() if n.startswith("probe."))
        # of an untouched model nothing is measured; some methods begin with a change of the base
        merged = any(
            n.rpartition(".")[2] in ("A", "B", "dense") for tensors in downlink for n in tensors
        )
        measured = kind == "train" or kind == "evaluate" and (server_round > 0 or merged)
        assert probes == (2 * NUM_PROBES * len(shapes) if measured else 0)
        down = sum(num_bytes(tensors) for tensors in downlink)
        if kind == "train" and server_round > 1:
            assert down == 0  # it came with the evaluation of the round before
        if kind == "evaluate" and server_round >= 1:
            wanted = 0
            for module, shape in shapes.items():
                # florist's rank is what its energy leaves; the others' are known beforehand
                q = _rank_of(downlink, module) if name == "florist" else RESIDUAL_RANKS.get(name, 0)
                wanted += 4 * method.num_downlink_parameters(*shape, rank, q, server_round)
            assert down == wanted, (name, server_round)
            downlinks.add(down)

    # The plan states the largest of any round, and for florist a bound.
    planned = plan_traffic(config, model.adapter, method, len(config.data.client_files))
    assert max(uplinks) == planned.uplink
    assert max(downlinks) == planned.downlink or name == "florist"
    assert max(downlinks) <= planned.downlink


def _rank_of(downlink, module):
    return sum(t.shape[0] for tensors in downlink for n, t in tensors.items() if n == f"{module}.A")


@every
def test_a_run_resumes_to_the_same_bits(folder, tmp_path, name):
    config = config_of(folder, name)
    start(config, tmp_path / "whole")

    def stop(event, facts):
        if event == "aggregate" and (tmp_path / "parts" / "rounds" / "0001.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "parts", observer=stop)
    start(config, tmp_path / "parts", resume=True)
    assert chain(tmp_path / "parts") == chain(tmp_path / "whole")
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    assert objects(tmp_path / "parts") == objects(tmp_path / "whole")


@pytest.mark.parametrize(("name", "frozen"), [("ffalora", "A"), ("fedsvd", "A"), ("rolora", "BA")])
def test_frozen_factors_do_not_move_on_the_client(folder, tmp_path, name, frozen):
    config = config_of(folder, name)
    moved = []

    def watch(model, examples, **settings):
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        report = nudge(model, examples, **settings)
        moved.append(
            {
                n.split("lora_")[1][0]
                for n, p in model.named_parameters()
                if n in before and not torch.equal(p, before[n])
            }
        )
        return report

    start(config, tmp_path / "run", function=watch)
    method = METHODS[name]()
    assert moved == [set(method.trained_factors(t)) for t in (1, 2, 3) for _ in range(3)] and frozen


def test_an_unrequested_factor_is_refused_by_name(folder, tmp_path):
    config = config_of(folder, "ffalora")
    found = {}
    for name in config.data.client_files:
        client = prepare_client(config, name, tmp_path / name)
        client.training_function = nudge
        found[name] = client.handle

    def more(fields):
        key = next(k for k in fields["tensors"] if "lora_B" in k)
        fields["tensors"][key.replace("lora_B", "lora_A")] = torch.zeros(2, 32)

    lying = partial(altered(more, "train"), honest=found["site1"])
    run_federation(InProcessTransport({**found, "site1": lying}), config, tmp_path / "run")
    reason = timeless(tmp_path / "run")[1]["failures"]["site1"]
    assert "lora_A.weight was not requested; this round takes B" in reason


def test_a_party_with_another_method_is_left_out_with_the_reason(folder, tmp_path):
    config = config_of(folder, "fedmomentum")
    found = {}
    for name in config.data.client_files:
        own = (
            config
            if name != "site2"
            else from_dict({**to_dict(config), "method": {"name": "fedit"}})
        )
        client = prepare_client(own, name, tmp_path / name)
        client.training_function = nudge
        found[name] = client.handle
    run_federation(InProcessTransport(found), config, tmp_path / "run")
    assert "the run's method is FedMomentum(" in timeless(tmp_path / "run")[1]["failures"]["site2"]


def test_frlora_starts_as_the_unmodified_model_and_its_updates_add_up(folder, tmp_path):
    """W0 - s B0 A0 + s B0 A0 = W0 for alpha/r = 3; then W0 + sum of s (mean B mean A - B0 A0)."""
    config = config_of(folder, "frlora")
    run = start(config, tmp_path / "run")
    first = (
        GlobalModel.load(tmp_path / "run", 0)
        if (tmp_path / "run" / "rounds" / "0000.json").exists()
        else None
    )
    start_model = run.local.initial_global_model(run.method)
    for module, matrix in start_model.adapter.modules.items():
        W0 = run.local.base_weights.pretrained(module).double()
        U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
        s = start_model.adapter.scalings[module]
        lead = (U[:, :2] * S[:2]) @ Vh[:2]
        assert s == 3 and torch.allclose(s * matrix.dense().double(), lead, atol=1e-5)
        effective = start_model.effective(module)
        assert float(effective.dense().norm()) < 1e-6 * float(lead.norm())
    assert first is None or first.version == start_model.version
    assert timeless(tmp_path / "run")[0]["evaluation"]["total"]["loss"] == pytest.approx(
        timeless_loss(folder, tmp_path), rel=1e-4
    )
    for kind in "BA":  # clients continue from B0, A0 in every round
        assert run.model.adapter_objects[kind].data == start_model.adapter_objects[kind].data
    adapter, change = initialize_adapter(
        run.method, run.local.fresh, run.local.base_weights.pretrained
    )
    assert change.keys() == adapter.modules.keys()


def timeless_loss(folder, tmp_path):
    start(config_of(folder, "fedit"), tmp_path / "plain")
    return timeless(tmp_path / "plain")[0]["evaluation"]["total"]["loss"]


def test_fedsa_keeps_every_clients_own_B_through_the_run(folder, tmp_path):
    config = config_of(folder, "fedsalora")
    ends, starts = {}, {}

    def watch(model, examples, *, seed, **settings):
        name = len(examples)
        B = [p.detach().clone() for n, p in sorted(model.named_parameters()) if "lora_B" in n]
        starts.setdefault(name, []).append(B)
        report = nudge(model, examples, seed=seed, **settings)
        ends.setdefault(name, []).append(
            [p.detach().clone() for n, p in sorted(model.named_parameters()) if "lora_B" in n]
        )
        return report

    run = start(config, tmp_path / "run", function=watch)
    assert len(starts) == 3
    for name in starts:
        for t in range(1, ROUNDS):
            assert all(
                torch.equal(a, b) for a, b in zip(starts[name][t], ends[name][t - 1], strict=True)
            )
            assert any(bool(b.any()) for b in starts[name][t])
    assert not any(bool(t.any()) for n, t in to_tensors(run.model.adapter).items() if "lora_B" in n)
    rows = timeless(tmp_path / "run")
    assert all(row["exactness_error"] is None for row in rows)
    losses = {c: s["loss"] for c, s in rows[-1]["evaluation"]["by_client"].items()}
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses.values())


def test_flora_draws_a_new_adapter_each_round_and_sends_none(folder, tmp_path):
    config = config_of(folder, "flora")
    model, seen = recorded(config, tmp_path)
    manifests = [
        json.loads(f.read_text())["adapter"]
        for f in sorted((tmp_path / "run" / "rounds").iterdir())
    ]
    assert (
        len({m["A"] for m in manifests}) == len(manifests) and len({m["B"] for m in manifests}) == 1
    )
    names = {
        n
        for r, kind, _, downlink, _ in seen
        if r >= 1 and kind == "evaluate"
        for o in downlink
        for n in o
    }
    assert not any("lora_" in name for name in names)
    assert not any(bool(m.B.any()) for m in model.adapter.modules.values())


def test_hetloras_weights_are_the_norms_shares(folder, tmp_path):
    config = config_of(folder, "hetlora", max_client_weight=0.9)
    start(config, tmp_path / "run")
    row = timeless(tmp_path / "run")[1]
    shares = {c: n / sum(row["num_examples"].values()) for c, n in row["num_examples"].items()}
    assert sum(row["weights"].values()) == pytest.approx(1)
    assert max(abs(row["weights"][c] - shares[c]) for c in shares) > 0.01


def test_frloras_start_does_not_travel_in_16_bits(folder, tmp_path):
    with pytest.raises(ConfigError, match="downlink-dtype float32"):
        start(config_of(folder, "frlora", downlink_dtype="float16"), tmp_path / "run")
