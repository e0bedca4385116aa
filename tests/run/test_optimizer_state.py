"""The optimizer's moments through whole runs: the same however a run is made, and what they do."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial

import msgspec
import pytest
import torch

from fedmomentum.aggregation.moments import Moments
from fedmomentum.aggregation.update_filter import ClientUpdate
from fedmomentum.errors import ConfigError
from fedmomentum.protocol import codec
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.run.method import make_method
from fedmomentum.run.networked import run_federation
from fedmomentum.run.training_checks import choose_optimizer_state
from fedmomentum.training import TrainReport
from fedmomentum.training.optimizer_state import (
    read_moments,
    set_moments,
    trained_parameters,
)
from fedmomentum.utils.names import directory_name
from tests.helpers import error
from tests.runs import chain, objects, prepare, start, timeless, tiny_config

OURS = ("fedmomentum", {})
CASES = [
    *[
        ("shared", name, settings)
        for name, settings in (
            OURS,
            ("fedmomentum", {"split": "procrustes"}),
            ("fedmomentum", {"energy": 0.9}),
            ("fedit", {}),
            ("fedexlora", {}),
            ("flexlora", {}),
            ("ffalora", {}),
            ("rolora", {}),
            ("frlora", {}),
            ("fedsvd", {}),
            ("lorafair", {}),
            ("fedrotlora", {}),
        )
    ],
    ("shared-full", *OURS),
    ("shared-full", "rolora", {}),
    ("local", *OURS),
    ("local", "flexlora", {}),
    ("local", "rolora", {}),
    ("local", "fedsalora", {}),
    ("local", "hetlora", {}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(folder, state, name="fedmomentum", settings=None, **sections):
    sections.setdefault("training", {})
    sections["training"] = {"optimizer-state": state, **sections["training"]}
    if settings is None:
        settings = {}
    return tiny_config(folder, method={"name": name, "settings": settings}, **sections)


class KeepsUpdates:
    """A filter that changes nothing."""

    def on_client(self, update: ClientUpdate):
        return update.trained

    def on_server(self, aggregate, server_round):
        return aggregate


def networked(config, stores):
    handlers = {}
    for name in config.data.client_files:
        handlers[name] = prepare_client(config, name, stores / directory_name(name)).handle
    return InProcessTransport(handlers)


def cases():
    """The cases, of which most are tried only by `make test-long`."""
    every_time = [
        ("shared", *OURS),
        ("shared", "fedsvd", {}),
        ("shared-full", "rolora", {}),
        ("local", "hetlora", {}),
    ]
    return [
        pytest.param(*case, marks=[] if case in every_time else [pytest.mark.long])
        for case in CASES
    ]


@pytest.mark.parametrize(("state", "name", "settings"), cases(), ids=str)
def test_one_process_separate_stores_and_a_resume_give_the_same_bits(
    folder, tmp_path, state, name, settings
):
    config = config_of(folder, state, name, settings)
    start(config, tmp_path / "whole", function=None)
    rows = timeless(tmp_path / "whole")
    assert all(row["failures"] == {} for row in rows)
    run_federation(networked(config, tmp_path / "nodes"), config, tmp_path / "served")
    assert chain(tmp_path / "served") == chain(tmp_path / "whole")
    assert [row["evaluation"] for row in timeless(tmp_path / "served")] == [
        row["evaluation"] for row in rows
    ]

    def stop(event, facts):
        if event == "aggregate" and (tmp_path / "parts" / "rounds" / "0001.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "parts", function=None, observer=stop)
    start(config, tmp_path / "parts", function=None, resume=True)
    assert chain(tmp_path / "parts") == chain(tmp_path / "whole")
    assert timeless(tmp_path / "parts") == rows
    assert objects(tmp_path / "parts") == objects(tmp_path / "whole")
    # The moments did something.
    fresh = config_of(folder, "fresh", name, settings)
    start(fresh, tmp_path / "fresh", function=None)
    assert chain(tmp_path / "fresh") != chain(tmp_path / "whole")


def test_lost_local_moments_are_detected(folder, tmp_path):
    config = config_of(folder, "local")

    def stop(event, facts):
        if event == "aggregate" and (tmp_path / "run" / "rounds" / "0002.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "run", function=None, observer=stop)
    (newest,) = (tmp_path / "run" / "optimizer").rglob("site1/0002.safetensors")
    newest.unlink()
    with pytest.raises(Exception, match="site1: its optimizer moments after round 2 are missing"):
        prepare(config, tmp_path / "run", resume=True)


# ── what they do ──


def quadratic(target, steps):
    """A training function: full-batch AdamW on `||s B A - target||^2` of every module."""

    def train_quadratic(model, examples, *, learning_rate, on_step, moments=None, **_):
        layers = {
            name: module for name, module in model.named_modules() if hasattr(module, "lora_A")
        }
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
        for name, moment in (moments or {}).items():
            optimizer.state[parameters[name]] = {
                "step": torch.tensor(float(moment.step)),
                "exp_avg": moment.first.clone(),
                "exp_avg_sq": moment.second.clone(),
            }
        for _ in range(steps):
            optimizer.zero_grad()
            loss = 0.0
            for layer in layers.values():
                A = layer.lora_A["default"].weight
                B = layer.lora_B["default"].weight
                wanted = target[: len(B), : A.shape[1]]
                loss = loss + (layer.scaling["default"] * B @ A - wanted).square().sum()
            loss.backward()
            optimizer.step()
        on_step(1, 1, 1.0)
        state = optimizer.state
        reported = {
            n: Moments(state[p]["exp_avg"], state[p]["exp_avg_sq"], int(state[p]["step"]))
            for n, p in parameters.items()
        }
        return TrainReport(1.0, 1.0, 1.0, steps, 1, moments=reported)

    return train_quadratic


@pytest.mark.parametrize("state", ["shared-full", "local"])
def test_two_clients_of_one_objective_are_centralized_adamw(folder, tmp_path, state):
    """Four rounds of three steps of two equal clients: twelve steps of AdamW, uninterrupted."""
    target = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    few = {
        "federation": {"num-rounds": 4},
        "num_clients": 2,
        "evaluation": {"every": 0},
        # The stand-in does not clip, and makes as many steps as the server expects of a round.
        "training": {"arguments": {"max_grad_norm": 0.0}, "local-steps": 3},
    }
    config = config_of(folder, state, "fedit", **few)
    start(config, tmp_path / "rounds", function=quadratic(target, steps=3))
    once = config_of(folder, "fresh", "fedit", **few | {"federation": {"num-rounds": 1}})
    start(once, tmp_path / "once", function=quadratic(target, steps=12))
    fresh = config_of(folder, "fresh", "fedit", **few)
    start(fresh, tmp_path / "fresh", function=quadratic(target, steps=3))
    wanted = last_adapter(tmp_path / "once")
    for module, factors in last_adapter(tmp_path / "rounds").items():
        assert error(factors.dense(), wanted[module].dense()) < 1e-4
    assert (
        max(
            error(factors.dense(), wanted[module].dense())
            for module, factors in last_adapter(tmp_path / "fresh").items()
        )
        > 1e-2
    )


def skipping(skipped):
    """A training function: AdamW on `||A||^2 + ||B - 1||^2`, without the layers that `skipped(step)` names."""

    def train_some(model, examples, *, learning_rate, local_steps, on_step, moments=None, **_):
        parameters = trained_parameters(model)
        optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate)
        if moments is not None:
            set_moments(optimizer, parameters, moments)
        for step in range(local_steps):
            optimizer.zero_grad()
            names = [name for name in parameters if skipped(step) not in name]
            sum(
                (parameters[name] - float("lora_B" in name)).square().sum() for name in names
            ).backward()
            optimizer.step()
            on_step(step + 1, local_steps, 1.0)
        reported = None if moments is None else read_moments(optimizer, parameters)
        return TrainReport(1.0, 1.0, 1.0, local_steps, 1, moments=reported)

    return train_some


@pytest.mark.parametrize(
    ("state", "steps"), [("local", {0, 1}), ("shared-full", {0, 1}), ("shared-full", {0})], ids=str
)
def test_a_layer_may_have_no_gradient(folder, tmp_path, state, steps):
    """A model may drop a whole layer in training; the optimizer then leaves it out."""
    skip = skipping(lambda step: ".layers.0." if step in steps else "none")
    config = config_of(
        folder,
        state,
        federation={"num-rounds": 3},
        evaluation={"every": 0},
        training={"local-steps": 2, "arguments": {"max_grad_norm": 0.0}},
    )
    start(config, tmp_path / "run", function=skip)
    for row in timeless(tmp_path / "run")[1:]:
        assert row["failures"] == {} and len(row["accepted"]) == 3


def last_adapter(out):
    from fedmomentum.global_model.model import GlobalModel

    return GlobalModel.load(out).adapter.modules


def test_successive_updates_point_the_same_way_with_shared_moments(folder, tmp_path):
    sections = {
        "federation": {"num-rounds": 8},
        "evaluation": {"every": 0},
        "training": {"learning-rate": 0.02, "batch-size": 1, "local-steps": 4},
    }
    cosines = {}
    for state in ("fresh", "shared", "shared-full"):
        start(config_of(folder, state, **sections), tmp_path / state, function=None)
        rows = timeless(tmp_path / state)[3:]
        cosines[state] = statistics.mean(row["diagnostics"]["update_cosine"] for row in rows)
    assert cosines["shared"] > cosines["fresh"] + 0.4
    assert cosines["shared-full"] > cosines["fresh"] + 0.4


def test_bytes_are_those_of_the_plan(folder, tmp_path):
    sizes = {}
    for state in ("fresh", "shared", "shared-full", "local"):
        run = start(config_of(folder, state), tmp_path / state, function=None)
        shapes = [(m.shape, m.rank) for m in run.model.adapter.modules.values()]
        rows = timeless(tmp_path / state)
        sizes[state] = rows[2]["uplink_bytes"]["site0"], run.plan.uplink_bytes
    means = sum(2 * (out + size + 2 * rank) for (out, size), rank in shapes)
    full = sum(8 * rank * (out + size) for (out, size), rank in shapes)
    for state, more in (("shared", means), ("shared-full", full), ("local", 0)):
        assert sizes[state][1] - sizes["fresh"][1] == more
        # Names and the JSON around the numbers are besides.
        names = 150 * 6 * len(shapes)
        assert more <= sizes[state][0] - sizes["fresh"][0] <= more + names


# ── refusals ──


@pytest.mark.parametrize(
    ("state", "name", "sections", "message"),
    [
        ("shared", "flora", {}, "FLoRA starts every round from a fresh adapter"),
        ("local", "florist", {}, "FLoRIST starts every round from a fresh adapter"),
        ("shared", "fedsalora", {}, "FedSA-LoRA leaves factors with each client"),
        ("shared-full", "hetlora", {}, "needs every client to train the same adapter"),
        (
            "shared",
            "fedmomentum",
            {"lora": {"clients": {"site1": {"rank": 1}}}},
            "needs every client to train the same adapter",
        ),
        ("shared", "fedit", {"training": {"arguments": {"optim": "adafactor"}}}, "adafactor"),
        ("local", "fedit", {"training": {"arguments": {"optim": "adafactor"}}}, "adafactor"),
        ("other", "fedit", {}, "training.optimizer-state"),
    ],
)
def test_settings_without_meaning_are_refused_by_name(
    folder, tmp_path, state, name, sections, message
):
    with pytest.raises(ConfigError, match=message):
        prepare(config_of(folder, state, name, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_filter_and_moments_exclude_each_other(folder, tmp_path):
    trainer = FederatedTrainer(
        config_of(folder, "shared"), tmp_path / "run", update_filter=KeepsUpdates()
    )
    with pytest.raises(ConfigError, match="moments would leave the client unfiltered"):
        trainer.prepare()


def run_with_site1(change, config, out):
    """A federation in which `change(reply)` stands between a client and the server; round 1."""

    def handle(payload, client):
        answer = client.handle(payload)
        task = codec.decode_task(payload)
        if task.kind != "train" or client.client_id != "site1":
            return answer
        return codec.encode_reply(change(codec.decode_reply(answer, task, 2**30)))

    handlers = {}
    for name in config.data.client_files:
        client = prepare_client(config, name, out / name)
        handlers[name] = partial(handle, client=client)
    run_federation(InProcessTransport(handlers), config, out / "run")
    return timeless(out / "run")[1]


def with_tensors(change):
    """Alter a reply's tensors by `change(tensors)`."""

    def changed(reply):
        tensors = dict(reply.tensors)
        change(tensors)
        return replace(reply, tensors=tensors)

    return changed


def key_of(tensors, end):
    return next(
        key for key in sorted(tensors) if key.startswith("optimizer.") and key.endswith(end)
    )


def negative(tensors):
    tensors[key_of(tensors, ".rows")] = -tensors[key_of(tensors, ".rows")] - 1


def not_finite(tensors):
    tensors[key_of(tensors, ".columns")] = tensors[key_of(tensors, ".columns")] * float("nan")


def short(tensors):
    tensors[key_of(tensors, ".rows")] = tensors[key_of(tensors, ".rows")][:-1]


def wide(tensors):
    tensors[key_of(tensors, ".rows")] = tensors[key_of(tensors, ".rows")].float()


def missing(tensors):
    del tensors[key_of(tensors, ".columns")]


def large(tensors):
    for key in tensors:
        if key.startswith("optimizer."):
            tensors[key] = tensors[key] * 1e6


def extra(tensors):
    tensors["optimizer.evil"] = torch.zeros(3)


@pytest.mark.parametrize("change", [negative, not_finite, short, wide, missing, extra, large])
def test_replies_with_other_moments_are_left_out_by_name(folder, tmp_path, change):
    config = config_of(folder, "shared", federation={"num-rounds": 1})
    row = run_with_site1(with_tensors(change), config, tmp_path)
    assert row["accepted"] == ["site0", "site2"]
    if change is large:
        assert row["failures"]["site1"].startswith("its second moments add up to")
    else:
        assert row["failures"]["site1"].startswith("optimizer tensor")


@pytest.mark.parametrize(
    ("state", "changes", "message"),
    [
        ("shared", {"num_steps": 10**6}, "it reports 1000000 steps; 2 were requested"),
        ("shared", {"num_steps": 2**53 - 1}, "were requested"),
        ("shared", {"num_steps": 1}, "it reports 1 steps; 2 were requested"),
        ("shared", {"learning_rate_sum": 1e6}, "learning rates of 1e+06 in all; wanted at most"),
        ("shared", {"learning_rate_sum": 0.0}, "learning rates of 0 in all"),
        ("shared-full", {"step": 10**6}, ".step is 1000000; wanted at most 2"),
    ],
)
def test_false_numbers_of_steps_are_refused_by_name(folder, tmp_path, state, changes, message):
    """They count in everyone's next steps: a million made those seven times as long."""
    config = config_of(folder, state, federation={"num-rounds": 1}, training={"local-steps": 2})

    def lie(reply):
        tensors = dict(reply.tensors)
        fields = dict(changes)
        if "step" in fields:
            key = key_of(tensors, ".step")
            tensors[key] = torch.full_like(tensors[key], fields.pop("step"))
        result = msgspec.structs.replace(reply.answer, **fields)
        return replace(reply, answer=result, tensors=tensors)

    row = run_with_site1(lie, config, tmp_path)
    assert row["accepted"] == ["site0", "site2"]
    assert message in row["failures"]["site1"]


@pytest.mark.parametrize("state", ["shared", "shared-full"])
@pytest.mark.parametrize("optimizer", [{}, {"optim": "sgd", "optim_args": "momentum=0.9"}], ids=str)
def test_false_moments_of_one_client_do_not_stop_the_others(folder, tmp_path, state, optimizer):
    config = config_of(
        folder,
        state,
        federation={"num-rounds": 2},
        evaluation={"every": 0},
        training={"local-steps": 2, "arguments": optimizer},
    )

    def lie(reply):
        tensors = dict(reply.tensors)
        for key in tensors:
            if key.startswith("optimizer.") and key.endswith(".first"):
                tensors[key] = torch.full_like(tensors[key], 1e6)
        result = msgspec.structs.replace(reply.answer, learning_rate_sum=1e-12)
        return replace(reply, answer=result, tensors=tensors)

    run_with_site1(lie, config, tmp_path)
    first, second = timeless(tmp_path / "run")[1:]
    assert first["failures"] == second["failures"] == {}
    # Adam's longest step is seven times a usual one, and SGD's ten times, besides the clipping.
    assert second["diagnostics"]["update_norm"] < 50 * first["diagnostics"]["update_norm"]


def test_unrequested_moments_are_refused(folder, tmp_path):
    config = config_of(folder, "fresh", federation={"num-rounds": 1})
    row = run_with_site1(with_tensors(extra), config, tmp_path)
    assert "optimizer.evil" in row["failures"]["site1"]


# ── what is chosen where the configuration leaves it open ──


@pytest.mark.parametrize(
    ("name", "settings", "sections", "wanted"),
    [
        ("fedmomentum", {}, {}, "shared"),
        ("fedmomentum", {"split": "procrustes"}, {}, "shared"),
        ("fedmomentum", {"split": "singular"}, {}, "shared"),
        ("fedexlora", {}, {}, "fresh"),
        ("flora", {}, {}, "fresh"),
        (
            "fedmomentum",
            {},
            {"training": {"arguments": {"optim": "adafactor"}}},
            "fresh",
        ),
        (
            "fedmomentum",
            {},
            {"lora": {"clients": {"site0": {"rank": 1}}}},
            "fresh",
        ),
        (
            "fedmomentum",
            {},
            {"training": {"function": "tests.run.test_optimizer_state:networked"}},
            "fresh",
        ),
    ],
)
def test_auto_shares_moments_where_the_method_supports_it(folder, name, settings, sections, wanted):
    sections = {key: dict(table) for key, table in sections.items()}
    training = sections.pop("training", {})
    config = config_of(folder, "auto", name, settings, training=training, **sections)
    chosen = choose_optimizer_state(config, make_method(config))
    assert chosen.training.optimizer_state == wanted


def test_a_run_records_the_state_that_auto_resolves_to_and_resumes_with_either(folder, tmp_path):
    config = config_of(folder, "auto", federation={"num_rounds": 2})
    plain = config_of(folder, "shared", federation={"num_rounds": 2})
    start(plain, tmp_path / "shared", function=None)
    trainer = FederatedTrainer(config, tmp_path / "auto")
    trainer.train()
    assert trainer.prepared.config.training.optimizer_state == "shared"
    assert trainer.prepared.plan.optimizer_state == "shared"
    assert chain(tmp_path / "auto") == chain(tmp_path / "shared")
    # Another round, with the configuration that leaves it open.
    more = config_of(folder, "auto", federation={"num_rounds": 3})
    FederatedTrainer(more, tmp_path / "auto", resume=True).train()
    more = config_of(folder, "shared", federation={"num_rounds": 3})
    start(more, tmp_path / "shared", function=None, resume=True)
    assert chain(tmp_path / "auto") == chain(tmp_path / "shared")
    # Another state is another run.
    fresh = config_of(folder, "fresh", federation={"num_rounds": 4})
    with pytest.raises(ConfigError, match=r"these differ: training\.optimizer-state"):
        FederatedTrainer(fresh, tmp_path / "auto", resume=True).train()


def test_auto_is_fresh_with_an_update_filter(folder, tmp_path):
    config = config_of(folder, "auto", federation={"num_rounds": 1})

    trainer = FederatedTrainer(config, tmp_path / "run", update_filter=KeepsUpdates())
    assert trainer.prepare().config.training.optimizer_state == "fresh"
    trainer.close()
