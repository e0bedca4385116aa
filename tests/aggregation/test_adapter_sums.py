"""Whole adapters under sums: bounds that hold, and aggregates as from the clients' own adapters."""

import pytest
import torch

from fedmomentum.aggregation.adapter_sums import AdapterSums
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.product_from_sums import next_feedback
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.errors import AdapterError, DataError, public_text
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.lora.adapter import Adapter
from fedmomentum.secure_sum.fixed_point import decode, encode
from tests.aggregation.test_product_from_sums import secure_sum
from tests.helpers import random_matrix

# Two modules of unequal shapes, ranks and scalings, and a tensor that is trained in full.
SHAPES = {"q_proj": (12, 9, 3), "down_proj": (8, 15, 2)}
SCALINGS = {"q_proj": 2.5, "down_proj": 0.75}
CHANGE = 0.05
COUNTS = {"north": 40, "south": 300, "west": 111, "east": 7}


def start_adapter():
    modules = {m: random_matrix(*shape, seed=i) for i, (m, shape) in enumerate(SHAPES.items())}
    return Adapter(modules, SCALINGS, saved={"head.weight": torch.ones(4, 5)})


def trained_adapter(start, name, factors="BA", size=CHANGE):
    draw = torch.Generator().manual_seed(sum(name.encode()))

    def moved(tensor, trains=True):
        uniform = torch.rand(tensor.shape, generator=draw, dtype=torch.float64) * 2 - 1
        return tensor + (size * uniform).to(tensor.dtype) if trains else tensor

    modules = {
        m: LowRank(moved(f.B, "B" in factors), moved(f.A, "A" in factors))
        for m, f in start.modules.items()
    }
    saved = {key: moved(tensor) for key, tensor in start.saved.items()}
    return Adapter(modules, SCALINGS, saved=saved, name=name)


def make_layout(start, **changes):
    fields = {
        "factors": "BA",
        "sketch_ranks": 1,
        "num_parties": len(COUNTS),
        "max_examples": 500,
        "max_change": CHANGE,
        "expected_examples": 450,
        "seed": 3,
    }
    return AdapterSums(start, **(fields | changes))


def shaped(values, blocks):
    return {block.name: values[block.name] for block in blocks}


def plain_sum(values):
    names = next(iter(values.values()))
    return {name: sum(own[name] for own in values.values()) for name in names}


def keeps(layout, changes, means, in_second_sum):
    return {
        m: next_feedback(
            change,
            means.modules[m],
            in_second_sum=in_second_sum,
            feedback_limit=layout.feedback_limit(m),
        )
        for m, change in changes.modules.items()
    }


def context(start):
    ranks = {module: f.rank for module, f in start.modules.items()}
    return RoundContext(ranks=ranks, scalings=SCALINGS, reference=start, seed=5)


def effective(result, module):
    total = to_dense(result.adapter.effective(module))
    for part in (result.residual, result.carried):
        if module in part:
            total = total + to_dense(part[module].to(torch.float64))
    return total


def mean_product(trained, module):
    total = sum(COUNTS[c] for c in trained)
    return sum(COUNTS[c] / total * to_dense(a.effective(module)) for c, a in trained.items())


@pytest.mark.parametrize("name", ["fedmomentum", "fedexlora", "flora"])
def test_an_exact_methods_result_and_feedback_are_the_mean_of_the_clients(name):
    start = start_adapter()
    layout = make_layout(start)
    trained = {client: trained_adapter(start, client) for client in COUNTS}
    feedback = {m: random_matrix(*shape[:2], 2, seed=9).scaled(1e-3) for m, shape in SHAPES.items()}
    changes = {c: layout.changes(trained[c], COUNTS[c], feedback) for c in COUNTS}
    means = layout.mean_changes(
        plain_sum({c: layout.first_values(m) for c, m in changes.items()}), torch.float64
    )
    totals = plain_sum({c: layout.second_values(m, means) for c, m in changes.items()})
    adapters, weights = layout.stand_ins(means, totals)
    result = aggregate_updates(adapters, weights, METHODS[name](), context(start))
    kept = [keeps(layout, m, means, True) for m in changes.values()]
    for module, scaling in SCALINGS.items():
        missing = sum(scaling * to_dense(own[module]) for own in kept)
        before = len(COUNTS) * scaling * to_dense(feedback[module])
        wanted = mean_product(trained, module) + before
        error = (effective(result, module) + missing - wanted).norm() / wanted.norm()
        assert error < 1e-10
    wanted = sum(COUNTS[c] * trained[c].saved["head.weight"] for c in COUNTS) / 458
    assert torch.allclose(result.adapter.saved["head.weight"], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["fedit", "ffalora", "fedsvd"])
def test_mean_factors_need_one_sum_without_a_sketch(name):
    method = METHODS[name]()
    start = start_adapter()
    factors = method.uploaded_factors(1)
    layout = make_layout(start, factors=factors, sketch_ranks=0)
    assert not layout.has_second_sum
    assert not [b.name for b in layout.first_blocks() if b.name.startswith("sketch")]
    trained = {client: trained_adapter(start, client, factors) for client in COUNTS}
    changes = {c: layout.changes(trained[c], COUNTS[c], {}) for c in COUNTS}
    sums = plain_sum({c: layout.first_values(m) for c, m in changes.items()})
    adapters, weights = layout.stand_ins(layout.mean_changes(sums, torch.float64), None)
    assert len(adapters) == 1
    got = aggregate_updates(adapters, weights, method, context(start))
    wanted = aggregate_updates(
        list(trained.values()), list(COUNTS.values()), method, context(start)
    )
    for module in SHAPES:
        error = effective(got, module) - effective(wanted, module)
        assert error.norm() < 1e-10


def test_a_round_under_masks_with_a_drop_in_the_first_sum(tmp_path):
    """From adapters to the next adapter, residual and feedback, in messages' precision."""
    start = start_adapter()
    layout = make_layout(start)
    trained = {client: trained_adapter(start, client) for client in COUNTS}
    changes = {c: layout.changes(trained[c], COUNTS[c], {}) for c in COUNTS}
    blocks = layout.first_blocks()
    values = {c: shaped(layout.first_values(m), blocks) for c, m in changes.items()}
    sums, first = secure_sum(1, blocks, values, tmp_path, {"east": 2})
    assert first == ["north", "south", "west"]
    means = layout.mean_changes(sums)
    assert means.num_examples == 451

    second_layout = make_layout(start, num_parties=3)
    blocks = second_layout.second_blocks()
    values = {c: second_layout.second_values(changes[c], means) for c in first}
    sums, second = secure_sum(2, blocks, values, tmp_path, {})
    adapters, weights = layout.stand_ins(means, sums)
    result = aggregate_updates(adapters, weights, METHODS["fedmomentum"](), context(start))
    kept = [keeps(layout, changes[c], means, c in second) for c in first]
    for module, scaling in SCALINGS.items():
        missing = sum(scaling * to_dense(own[module]) for own in kept)
        wanted = mean_product({c: trained[c] for c in first}, module)
        change = wanted - to_dense(start.effective(module))
        error = (effective(result, module) + missing - wanted).norm()
        assert error < 1e-5 * change.norm()
    # who dropped within the first sum is not in the round at all
    assert set(kept[0]) == set(SHAPES)


@pytest.mark.parametrize("sketch_ranks", [1, 2, 9])
def test_changes_within_the_two_public_bounds_are_within_all_bounds(sketch_ranks):
    """At the bounds in every element, signs as bad as can be, with more feedback than fits."""
    start = start_adapter()
    layout = make_layout(start, sketch_ranks=sketch_ranks, max_examples=300)
    changes = {}
    for sign, client in ((1, "north"), (-1, "south")):
        modules = {
            m: LowRank(f.B + sign * CHANGE, f.A + CHANGE * torch.sign(layout._omega(m)[:, 0]))
            for m, f in start.modules.items()
        }
        saved = {key: tensor + CHANGE for key, tensor in start.saved.items()}
        trained = Adapter(modules, SCALINGS, saved=saved, name=client)
        huge = {m: random_matrix(*shape[:2], 2, seed=1).scaled(1e6) for m, shape in SHAPES.items()}
        changes[client] = layout.changes(trained, 300, huge)
    blocks = layout.first_blocks()
    # A bound is a bound on real numbers: float32 may lie a last digit beyond it.
    loose = [type(b)(name=b.name, size=b.size, bound=b.bound * (1 + 1e-6)) for b in blocks]
    values = {c: layout.first_values(m) for c, m in changes.items()}
    for own in values.values():
        encode(own, loose, 4)
    means = layout.mean_changes(plain_sum(values))
    for change in changes.values():
        encode(layout.second_values(change, means), layout.second_blocks(), 4)


@pytest.mark.parametrize("max_change", [CHANGE, 1e3 * CHANGE, 1e6 * CHANGE])
def test_the_reported_rounding_error_is_that_of_the_integers(max_change):
    """Of the summed changes of both factors and of tensors trained in full, weights included."""
    start = start_adapter()
    layout = make_layout(start, max_change=max_change)
    blocks = layout.first_blocks()
    own = {
        name: layout.first_values(layout.changes(trained_adapter(start, name), count, {}))
        for name, count in COUNTS.items()
    }
    exact = plain_sum(own)
    total = sum(encode(shaped(values, blocks), blocks, 4) for values in own.values())
    decoded = decode(total, blocks, 4)
    changes = [b.name for b in blocks if b.name != "examples" and not b.name.startswith("sketch")]
    error = sum(float((exact[n] - torch.from_numpy(decoded[n])).square().sum()) for n in changes)
    norm = sum(float(exact[n].square().sum()) for n in changes)
    reported = layout.rounding({n: torch.from_numpy(v) for n, v in decoded.items()}, len(own))
    assert reported == pytest.approx((error / norm) ** 0.5, rel=0.15)


def test_the_reported_rounding_error_is_one_where_everything_is_lost():
    start = start_adapter()
    layout = make_layout(start)
    zeros = {b.name: torch.zeros(b.size, dtype=torch.float64) for b in layout.first_blocks()}
    assert layout.rounding(zeros, 4) == 1.0


def test_values_beyond_the_bounds_are_refused():
    start = start_adapter()
    layout = make_layout(start)
    too_large = layout.changes(trained_adapter(start, "north", size=30 * CHANGE), 400, {})
    with pytest.raises(DataError, match="block '.*' of this party's update has an element of size"):
        encode(layout.first_values(too_large), layout.first_blocks(), 4)
    for count in (0, 501):
        with pytest.raises(DataError, match=f"has {count} examples, and .* count 1 to 500") as e:
            layout.changes(trained_adapter(start, "north"), count, {})
        assert str(count) not in public_text(e.value)
    with pytest.raises(AdapterError, match="at most 600000000 examples, .* set a lower bound"):
        make_layout(start, max_examples=600_000_000)
    other = Adapter({"q_proj": start.modules["q_proj"]}, SCALINGS, name="north")
    with pytest.raises(AdapterError, match="north: module down_proj"):
        layout.changes(other, 5, {})


def test_blocks_and_values_have_the_same_layout_whatever_the_values():
    start = start_adapter()
    layout = make_layout(start)
    for size in (0.0, CHANGE):
        changes = layout.changes(trained_adapter(start, "north", size=size), 5, {})
        values = layout.first_values(changes)
        assert [(b.name, b.size) for b in layout.first_blocks()] == [
            (name, len(own)) for name, own in values.items()
        ]
        means = layout.mean_changes(values)
        assert [(b.name, b.size) for b in layout.second_blocks()] == [
            (name, len(own)) for name, own in layout.second_values(changes, means).items()
        ]
