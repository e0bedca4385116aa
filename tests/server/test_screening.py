"""Honest clients of any size stay in, whatever the others do; updates that no such training makes are left out."""

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.config.toml import from_dict
from fedmomentum.lora.peft_model import copy_adapter
from fedmomentum.server.screening import (
    MAX_WORK_RATIO,
    STEP_MARGIN,
    Displacement,
    displacements_of,
    screen,
    step_norms,
    typical_displacement,
)
from fedmomentum.training.step_bounds import StepSize
from tests.runs import altered, start, timeless, tiny_config
from tests.server.test_server import with_faults
from tests.tiny import tiny_llama
from tests.training.keywords import train
from tests.training.test_trainer import DEFAULTS, new_model, tokens_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of_sizes(folder, sizes, **sections):
    """One file a client with so many examples, all trained on."""
    files = {}
    for client, size in enumerate(sizes):
        rows = [
            {"question": f"{client} {i % 7} + {i % 5}", "answer": str(i % 7 + i % 5)}
            for i in range(size)
        ]
        file = folder / f"{size}-{client}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[f"site{client}"] = str(file)
    data = {"client_files": files, "test_fraction": 0.0, "category_column": None}
    config = tiny_config(folder, data={}, evaluation={"every": 0}, **sections)
    return replace(config, data=replace(config.data, **data))


def scaled(factor):
    """A false update: the client's update times a factor (its B, as A is what all started from in the first round)."""

    def edit(fields):
        for name, tensor in fields["tensors"].items():
            if "lora_B" in name:
                fields["tensors"][name] = tensor * factor

    return altered(edit)


# ── runs ──


def test_the_client_with_most_of_the_data_takes_part(folder, tmp_path):
    """Its 45 steps take it some forty times as far as the others' single one."""
    training = {"local_epochs": 1.0, "local_steps": None, "batch_size": 8, "learning_rate": 1e-3}
    config = config_of_sizes(folder, [8, 8, 360], training=training)
    start(config, tmp_path / "run", function=None)
    for row in timeless(tmp_path / "run")[1:]:
        assert row["accepted"] == ["site0", "site1", "site2"] and row["failures"] == {}
        norms = [row["screening"][client]["norm"] for client in row["accepted"]]
        assert norms[2] > 20 * max(norms[:2])
        assert all(0.01 < row["screening"][client]["ratio"] < 3 for client in row["accepted"])
        assert row["weights"]["site2"] == pytest.approx(0.9)


@pytest.mark.parametrize(("client", "factor"), [("site2", 1e3), ("site0", 1e3)])
def test_a_scaled_update_is_left_out_whether_from_the_largest_client_or_a_small_one(
    folder, tmp_path, client, factor
):
    training = {"local_epochs": 1.0, "local_steps": None, "batch_size": 8}
    config = config_of_sizes(folder, [8, 8, 360], training=training, federation={"num_rounds": 1})
    with_faults(config, tmp_path / "run", {client: scaled(factor)})
    row = timeless(tmp_path / "run")[1]
    assert row["accepted"] == sorted({"site0", "site1", "site2"} - {client})
    assert row["screening"][client]["is_left_out"] and row["screening"][client]["ratio"] > 20
    assert re.search(
        r"^its update has norm \S+, \S+ times one optimizer step "
        rf"\(steps requested: {45 if client == 'site2' else 1}\), and \d+ times the round's "
        r"median for that work, \S+; "
        r"at most 20 times is accepted \(federation.outlier-norm-ratio\)$",
        row["failures"][client],
    )


def test_of_two_clients_the_one_beyond_what_its_steps_can_do_is_left_out(folder, tmp_path):
    config = tiny_config(
        folder, num_clients=2, federation={"num_rounds": 1}, evaluation={"every": 0}
    )
    with_faults(config, tmp_path / "run", {"site1": scaled(1e4)})
    row = timeless(tmp_path / "run")[1]
    assert (
        row["accepted"] == ["site0"] and "federation.outlier-norm-ratio" in row["failures"]["site1"]
    )


def test_a_client_may_move_where_the_others_do_not(folder, tmp_path):
    """Two send back what they were sent: their median is zero."""

    def nothing(fields):
        for name in fields["tensors"]:
            if "lora_" in name:
                fields["tensors"][name] = sent[name].clone()

    config = tiny_config(folder, federation={"num_rounds": 2}, evaluation={"every": 0})
    from tests.runs import prepare

    run = prepare(config, tmp_path / "start")
    run.close()
    from fedmomentum.lora.adapter import to_tensors

    sent = to_tensors(run.model.adapter)
    still = altered(nothing)
    with_faults(config, tmp_path / "run", {"site0": still, "site1": still}, rounds={1})
    row = timeless(tmp_path / "run")[1]
    assert row["accepted"] == ["site0", "site1", "site2"] and row["failures"] == {}
    assert row["screening"]["site0"] == {"norm": 0.0, "ratio": 0.0, "is_left_out": False}
    assert row["screening"]["site2"]["ratio"] is None  # no client to compare with


def test_modules_trained_in_full_are_screened_too(folder, tmp_path):
    def huge(fields):
        for name in fields["tensors"]:
            if "lm_head" in name:
                fields["tensors"][name] = fields["tensors"][name] + 1e3

    config = tiny_config(
        folder,
        lora={"modules_to_save": ["lm_head"]},
        federation={"num_rounds": 1},
        evaluation={"every": 0},
    )
    with_faults(config, tmp_path / "run", {"site1": altered(huge)})
    row = timeless(tmp_path / "run")[1]
    assert row["accepted"] == ["site0", "site2"]
    assert (
        "its update of the modules trained in full (modules_to_save) has norm"
        in row["failures"]["site1"]
    )


def test_a_method_that_leaves_B_with_its_clients_is_screened_by_A(folder, tmp_path):
    def huge(fields):
        for name in fields["tensors"]:
            if "lora_A" in name:
                fields["tensors"][name] = fields["tensors"][name] * 1e3

    config = tiny_config(
        folder, method={"name": "fedsalora"}, federation={"num_rounds": 1}, evaluation={"every": 0}
    )
    with_faults(config, tmp_path / "run", {"site1": altered(huge)})
    row = timeless(tmp_path / "run")[1]
    assert row["accepted"] == ["site0", "site2"] and list(row["failures"]) == ["site1"]
    assert all(row["screening"][client]["norm"] > 0 for client in row["participants"])


def test_a_client_that_holds_a_part_is_measured_from_that_part(folder, tmp_path):
    """HetLoRA's clients of a low rank drop the rest: what they never had is not a move of theirs."""
    config = tiny_config(
        folder,
        method={"name": "hetlora"},
        lora={"rank": 4, "clients": {"site0": {"rank": 1}}},
        training={"learning_rate": 1e-3},
        evaluation={"every": 0},
    )
    start(config, tmp_path / "run", function=None)
    rows = timeless(tmp_path / "run")
    for row in rows[1:]:
        assert row["failures"] == {}
        assert all(0.4 < row["screening"][client]["ratio"] < 2.5 for client in row["participants"])


# ── the length of a step ──


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_step_of_adam_has_the_length_that_is_computed(base, learning_rate, is_fresh):
    model = new_model(base)
    if is_fresh:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
    before = copy_adapter(model, "before")
    rule = rule_of(learning_rate, {})
    train(model, tokens_of(base), **DEFAULTS | {"local_steps": 1, "learning_rate": learning_rate})
    steps = step_norms(before, rule, trained="BA", shared="BA")
    moved = displacements_of(copy_adapter(model, "after"), before, steps, num_steps=1, shared="BA")[
        "adapter"
    ]
    assert 0.7 < moved.in_steps < 1.6


@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_a_step_of_gradient_descent_is_no_longer_than_the_clipped_gradient_allows(base, clip):
    model = new_model(base)
    before = copy_adapter(model, "before")
    arguments = {"optim": "sgd", "max_grad_norm": clip}
    rule = rule_of(0.1, arguments)
    steps = step_norms(before, rule, trained="BA", shared="BA")
    train(
        model,
        tokens_of(base),
        **DEFAULTS | {"local_steps": 1, "learning_rate": 0.1},
        arguments=arguments,
    )
    moved = displacements_of(copy_adapter(model, "after"), before, steps, num_steps=1, shared="BA")[
        "adapter"
    ]
    assert 0.05 < moved.in_steps < 1


def rule_of(learning_rate, arguments, function=None):
    """The rule of a run with these training arguments."""
    training = {"arguments": arguments}
    if function is not None:
        training["function"] = function
    return StepSize.of(from_dict({"training": training}), learning_rate)


def test_for_some_optimizers_no_step_length_is_known():
    assert not rule_of(1.0, {"optim": "sgd", "max_grad_norm": 0}).is_known
    assert not rule_of(1.0, {"optim": "lion_32bit"}).is_known
    # Noise is added after clipping, so a step of gradient descent can be of any length.
    descent = {"training": {"arguments": {"optim": "sgd"}}}
    private = from_dict({"privacy": {"dp": {"epsilon": 1.0}}, **descent})
    assert rule_of(1.0, {"optim": "sgd"}).is_known and not StepSize.of(private, 1.0).is_known
    assert not rule_of(1.0, {}, function="own:train").is_known
    assert all(rule_of(1.0, {"optim": o}).is_known for o in ("adafactor", "rmsprop", "sgd"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_length_of_step_that_is_not_zero_once_it_moves(name, base):
    adapter, method = copy_adapter(new_model(base), "start"), METHODS[name]()
    rule = rule_of(1e-3, {})
    for server_round in (1, 2):
        steps = step_norms(
            adapter,
            rule,
            trained=method.trained_factors(server_round),
            shared=method.shared_factors,
        )
        assert steps["adapter"] > 0


# ── the rule ──


def federation(*moves):
    return {f"site{i}": {"adapter": move} for i, move in enumerate(moves)}


def left_out(clients, max_ratio=20.0, is_step_known=True):
    findings = screen(clients, max_ratio, is_step_known=is_step_known)
    return {name for name, finding in findings.items() if finding.reason}


POSITIVE = st.floats(1e-6, 1e6)
ANY_MOVE = st.builds(
    Displacement, st.one_of(st.just(0.0), POSITIVE), POSITIVE, st.integers(1, 10**12)
)


@given(
    st.integers(1, 10_000),
    POSITIVE,
    st.floats(0, STEP_MARGIN),
    st.lists(ANY_MOVE, max_size=8),
    st.floats(1.01, 100),
)
def test_a_client_within_reach_of_its_steps_is_never_left_out_whatever_others_do(
    steps, step, share, others, ratio
):
    """As long as the median of the others' work is a thousandth of its own: beyond that its claim does not count."""
    believed = (
        min(steps, MAX_WORK_RATIO * sorted(o.num_steps for o in others)[len(others) // 2 - 1])
        if others
        else steps
    )
    honest = Displacement(share * step * min(steps, believed), step, steps)
    assert "site0" not in left_out(federation(honest, *others), ratio)


@given(st.lists(ANY_MOVE, min_size=1, max_size=8), st.floats(1e-3, 1e3), st.permutations(range(8)))
def test_units_and_order_do_not_matter(moves, factor, order):
    clients = federation(*moves)
    in_other_units = {
        name: {
            "adapter": Displacement(
                m["adapter"].norm * factor, m["adapter"].step * factor, m["adapter"].num_steps
            )
        }
        for name, m in clients.items()
    }
    names = [f"site{i}" for i in order if i < len(moves)]
    found = screen(clients, 20.0, is_step_known=True)
    for others in (
        screen(in_other_units, 20.0, is_step_known=True),
        screen({n: clients[n] for n in names}, 20.0, is_step_known=True),
    ):
        for name in names:
            assert others[name].ratio == pytest.approx(found[name].ratio)


@given(
    st.integers(3, 30),
    st.integers(1, 10),
    st.integers(1, 100),
    st.lists(st.floats(0.3, 1.5), min_size=30, max_size=30),
    st.floats(1e2, 1e9),
)
def test_a_minority_of_scaled_updates_is_left_out_and_no_other_client(
    count, bad, steps, shares, factor
):
    bad = min(bad, (count - 1) // 2)
    moves = [
        Displacement(share * steps * (factor if i < bad else 1), 1.0, steps)
        for i, share in enumerate(shares[:count])
    ]
    assert left_out(federation(*moves)) == {f"site{i}" for i in range(bad)}


def test_more_work_raises_the_limit_in_proportion_and_less_work_keeps_it():
    one, ten = Displacement(1.0, 1.0, 1), Displacement(5.0, 1.0, 10)
    assert typical_displacement(ten, [one]) == 10.0 and typical_displacement(one, [ten]) == 5.0
    assert (
        typical_displacement(one, [Displacement(0.0, 1.0, 5)]) is None
        and typical_displacement(one, []) is None
    )
    assert (
        typical_displacement(one, [Displacement(4.0, 2.0, 1), Displacement(9.0, 3.0, 1)]) == 2.5
    )  # in steps of the one that is judged


def test_a_false_claim_of_many_examples_has_a_bounded_effect():
    """Norms are in steps; the others make ten."""
    honest = [Displacement(8.0, 1.0, 10)] * 9
    for claim in (10**6, 10**15):
        limit = 20 * 8.0 * MAX_WORK_RATIO
        assert left_out(federation(Displacement(limit * 1.01, 1.0, claim), *honest)) == {"site0"}
        assert left_out(federation(Displacement(limit * 0.99, 1.0, claim), *honest)) == set()
    assert left_out(federation(Displacement(20 * 8.0 * 1.01, 1.0, 10), *honest)) == {"site0"}


def test_without_a_known_step_length_only_three_clients_or_more_can_be_compared():
    small, large = Displacement(1.0, 1.0, 1), Displacement(21.0, 1.0, 1)
    assert left_out(federation(large, small), is_step_known=False) == set()
    assert left_out(federation(large, small, small), is_step_known=False) == {"site0"}
    assert left_out(federation(large, small, small), max_ratio=22.0, is_step_known=False) == set()
    assert (
        left_out(
            federation(large, Displacement(0.0, 1.0, 1), Displacement(0.0, 1.0, 1)),
            is_step_known=False,
        )
        == set()
    )


def test_a_single_client_and_no_client_are_handled():
    assert screen({}, 20.0, is_step_known=True) == {}
    assert (
        screen(federation(Displacement(1e30, 1.0, 1)), 20.0, is_step_known=True)["site0"].ratio
        is None
    )
    nothing = screen(
        federation(Displacement(0.0, 0.0, 1), Displacement(0.0, 0.0, 1)), 20.0, is_step_known=True
    )
    assert all(finding.reason is None for finding in nothing.values())


def test_a_nonzero_norm_without_possible_steps_is_infinitely_far():
    assert Displacement(1.0, 0.0, 1).in_steps == math.inf
    clients = federation(
        Displacement(1.0, 0.0, 5), Displacement(1.0, 1.0, 5), Displacement(1.0, 1.0, 5)
    )
    assert left_out(clients) == {"site0"}


# ── what was measured ──


def test_the_tables_of_the_docs_are_those_of_the_committed_measurements(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "experiments")
    experiment = importlib.import_module("screening")
    measured = json.loads(experiment.MEASURED.read_text())
    text = (root / "docs" / "appendix" / "screening.md").read_text()
    assert experiment.honest_table(measured) in text and experiment.attack_table(measured) in text
    facts = experiment.facts(measured)
    assert (
        f"net displacement was {facts['smallest_reach']:.3f} to {facts['largest_reach']:.2f} "
        "times what the same number of equal steps" in text
    )
    assert f"at most {facts['largest_ratio_equal']:.1f} times as far as the others" in text
    assert f"{facts['largest_ratio_unequal']:.1f} times as far for its work" in text
    assert f"from {facts['least_cosine']:.2f} to {facts['most_cosine']:.2f}, and" in text
    assert facts["largest_reach"] < STEP_MARGIN and facts["largest_ratio_unequal"] < 5


def test_a_real_federation_moves_as_the_curves_say(folder, tmp_path):
    """The same model and learning rate: a client of 45 steps beside two of one, in a run and on a measured curve."""
    experiment = json.loads(
        (Path(__file__).parents[2] / "experiments" / "screening.json").read_text()
    )
    curves = [
        curve
        for curve in experiment["curves"]
        if curve["adapter"] == "rank 2 on q, v"
        and curve["stage"] == "first round"
        and curve["examples"] == 10_000
    ]
    steps = [curve["norms"]["45"] / curve["step"] for curve in curves]
    training = {"local_epochs": 1.0, "local_steps": None, "batch_size": 8, "learning_rate": 1e-3}
    lora = {"rank": 2, "lora_alpha": 16.0}
    config = config_of_sizes(
        folder, [8, 8, 360], training=training, lora=lora, federation={"num_rounds": 1}
    )
    start(config, tmp_path / "run", function=None)
    row = timeless(tmp_path / "run")[1]
    one, other, many = (row["screening"][client] for client in row["accepted"])
    went = (
        many["ratio"] * 45 * 1.1
    )  # in steps: the median of the others is one step, which is 1.1 of its length
    assert 0.7 * min(steps) < went < 1.4 * max(steps)
    assert many["norm"] / one["norm"] == pytest.approx(many["norm"] / other["norm"], rel=0.2)
