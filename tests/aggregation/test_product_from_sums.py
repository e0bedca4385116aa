"""The mean of products from two sums: exact in every round, with any participants, with masks too."""

import functools
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.aggregation.client_updates import ClientUpdates
from fedmomentum.aggregation.method import AggregationContext, Method
from fedmomentum.aggregation.product_from_sums import (
    ClientChange,
    FirstTerms,
    combine_sums,
    first_terms,
    mean_change,
    next_feedback,
    second_terms,
    sketch_matrix,
    stand_ins,
)
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.secure_sum.fixed_point import count_block
from fedmomentum.secure_sum.messages import Block, SumPlan, min_threshold
from fedmomentum.secure_sum.server import SumServer
from tests.helpers import valid_updates
from tests.secure_sum.sums import make_parties, roster, run_sum, sum_error

OUT, IN, RANK = 14, 11, 3
SCALING = 2.5


def factors(draw, rank=RANK, size=1.0):
    return LowRank(
        size * torch.randn(OUT, rank, generator=draw, dtype=torch.float64),
        size * torch.randn(rank, IN, generator=draw, dtype=torch.float64),
    )


def train(draw, start, size=0.3):
    step = factors(draw, start.rank, size)
    return LowRank(start.B + step.B, start.A + step.A)


def add_terms(terms):
    return FirstTerms(
        *(
            functools.reduce(operator.add, [getattr(t, name) for t in terms])
            for name in ("num_examples", "b", "a", "sketch")
        )
    )


def effective(matrix):
    return SCALING * to_dense(matrix)


def mean_of_products(trained, counts):
    """The exact mean in effective units: what secure sums must give."""
    total = sum(counts.values())
    return sum(counts[c] / total * effective(trained[c]) for c in trained)


class Federation:
    """Clients that keep their own feedback; a round's sums are unmasked here."""

    def __init__(self, seed, width):
        self.draw = torch.Generator().manual_seed(seed)
        self.width = width
        self.feedback = {}
        self.expected = 1

    def round(self, start, counts, second, number=1):
        """A round of the clients in `counts`, of which `second` are in the second sum."""
        omega = sketch_matrix("q_proj", IN, self.width, number)
        trained = {client: train(self.draw, start) for client in counts}
        changes = {
            client: ClientChange.of(
                start, trained[client], counts[client], self.feedback.get(client)
            )
            for client in counts
        }
        mean = mean_change(
            add_terms([first_terms(change, omega, self.expected) for change in changes.values()]),
            omega,
        )
        total = sum(second_terms(changes[c], mean) for c in second) if second else None
        for client, change in changes.items():
            self.feedback[client] = next_feedback(change, mean, in_second_sum=client in second)
        self.expected = mean.num_examples
        return trained, combine_sums(start, mean, total)

    def missing(self):
        zero = torch.zeros(OUT, IN, dtype=torch.float64)
        return sum((effective(f) for f in self.feedback.values()), zero)


def close(got, wanted, tolerance=1e-10):
    return (got - wanted).norm() <= tolerance * max(1.0, float(wanted.norm()))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 999), width=st.integers(1, 12))
def test_the_model_and_what_clients_keep_are_the_exact_mean_in_every_round(data, seed, width):
    """Over rounds with changing participants, weights and drops between the sums."""
    clients = [f"client {i}" for i in range(6)]
    federation = Federation(seed, width)
    start = factors(federation.draw)
    for number in range(4):
        chosen = data.draw(st.lists(st.sampled_from(clients), min_size=3, unique=True))
        counts = {client: data.draw(st.integers(1, 500)) for client in chosen}
        second = data.draw(st.lists(st.sampled_from(chosen), unique=True))
        before = federation.missing()
        trained, (mean, cross) = federation.round(start, counts, second, number)
        got = effective(mean) + effective(cross) + federation.missing()
        assert close(got, mean_of_products(trained, counts) + before)
        # The next round starts from other factors, as after a method's truncation.
        start = factors(federation.draw)


@pytest.mark.parametrize("num_clients", [3, 4])
def test_a_sketch_of_n_minus_1_times_the_rank_needs_no_feedback(num_clients):
    federation = Federation(1, (num_clients - 1) * RANK)
    start = factors(federation.draw)
    counts = {f"client {i}": 10 + 7 * i for i in range(num_clients)}
    trained, (mean, cross) = federation.round(start, counts, list(counts))
    assert close(effective(mean) + effective(cross), mean_of_products(trained, counts))
    assert federation.missing().norm() < 1e-10
    # and one column less is not enough
    narrower = Federation(1, (num_clients - 1) * RANK - 1)
    narrower.round(factors(narrower.draw), counts, list(counts))
    assert narrower.missing().norm() > 1e-3


def test_a_sketch_as_wide_as_the_matrix_is_high_is_exact():
    federation = Federation(2, OUT + 5)
    counts = {f"client {i}": 3 for i in range(9)}
    federation.round(factors(federation.draw), counts, list(counts))
    assert federation.missing().norm() < 1e-10


def test_a_client_that_drops_between_the_sums_keeps_its_full_cross_term():
    federation = Federation(3, RANK)
    start = factors(federation.draw)
    counts = {"a": 5, "b": 20, "c": 9}
    trained, (mean, _) = federation.round(start, counts, ["a", "b"])
    total = sum(counts.values())
    deviation = LowRank(trained["c"].B - mean.B, trained["c"].A - mean.A)
    assert close(
        effective(federation.feedback["c"]), counts["c"] / total * effective(deviation), 1e-12
    )


def test_without_a_second_sum_the_mean_factors_are_used_and_clients_keep_the_difference():
    federation = Federation(4, RANK)
    start = factors(federation.draw)
    counts = {"a": 5, "b": 20, "c": 9}
    trained, (mean, cross) = federation.round(start, counts, [])
    assert cross.rank == 0
    B = sum(counts[c] * trained[c].B for c in counts) / 34
    assert torch.allclose(mean.B, B, atol=1e-12)
    wanted = mean_of_products(trained, counts) - effective(mean)
    assert close(federation.missing(), wanted)


def test_feedback_returns_and_stays_bounded_at_half_participation():
    """Without feedback the error only grows; with it the error stays about constant."""
    federation = Federation(5, RANK)
    clients = [f"client {i}" for i in range(6)]
    kept, lost = [], torch.zeros(OUT, IN, dtype=torch.float64)
    for number in range(60):
        start = factors(federation.draw)
        counts = {c: 10 for c in clients[number % 2 :: 2]}
        without_feedback = Federation(number, RANK)
        without_feedback.round(start, counts, list(counts), number)
        lost += without_feedback.missing()
        federation.round(start, counts, list(counts), number)
        kept.append(float(federation.missing().norm()))
    assert max(kept[30:]) < 1.5 * max(kept[:30])
    assert max(kept) < float(lost.norm())


def test_feedback_is_kept_in_the_smaller_form_and_either_form_is_applied():
    federation = Federation(6, RANK)
    counts = {"a": 5, "b": 20, "c": 9}
    forms = []
    for number in range(4):
        before = federation.missing()
        trained, parts = federation.round(factors(federation.draw), counts, list(counts), number)
        got = sum(effective(part) for part in parts) + federation.missing()
        assert close(got, mean_of_products(trained, counts) + before)
        forms.append(type(federation.feedback["a"]))
    # 3 (14 + 11) < 14 * 11, and 9 (14 + 11) is not
    assert forms == [LowRank, LowRank, torch.Tensor, torch.Tensor]


@settings(max_examples=20, deadline=None)
@given(limit=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_feedback_beyond_its_limit_returns_in_parts_and_is_not_lost(limit, seed):
    draw = torch.Generator().manual_seed(seed)
    start = factors(draw)
    counts = {"a": 5, "b": 20, "c": 9}
    trained = {c: train(draw, start) for c in counts}
    changes = {c: ClientChange.of(start, trained[c], counts[c], factors(draw)) for c in counts}
    omega = sketch_matrix("q_proj", IN, RANK, 1)
    terms = [first_terms(m, omega, 34, limit) for m in changes.values()]
    for change, own in zip(changes.values(), terms, strict=True):
        plain = change.num_examples * (change.b @ change.a @ omega)
        assert (own.sketch - plain).abs().max() <= limit * (1 + 1e-9)
    mean = mean_change(add_terms(terms), omega)
    second = [second_terms(m, mean, limit) for m in changes.values()]
    for change, own in zip(changes.values(), second, strict=True):
        alone = ClientChange(change.num_examples, change.b, change.a)
        assert (own - second_terms(alone, mean)).abs().max() <= limit * (1 + 1e-9)
    kept = [
        next_feedback(m, mean, in_second_sum=True, feedback_limit=limit) for m in changes.values()
    ]
    got = sum(effective(part) for part in (*combine_sums(start, mean, sum(second)), *kept))
    before = sum(effective(m.feedback) for m in changes.values())
    assert close(got, mean_of_products(trained, counts) + before)


def test_one_trained_factor_has_no_cross_term():
    """Where all have the same A, as in FFA-LoRA, the mean of B is exact."""
    draw = torch.Generator().manual_seed(7)
    start = factors(draw)
    trained = [LowRank(train(draw, start).B, start.A) for _ in range(3)]
    changes = [ClientChange.of(start, t, 4) for t in trained]
    omega = sketch_matrix("q_proj", IN, RANK, 1)
    mean = mean_change(add_terms([first_terms(change, omega, 12) for change in changes]), omega)
    parts = combine_sums(start, mean, None)
    assert close(effective(parts[0]), sum(effective(t) for t in trained) / 3)
    assert all(
        to_dense(next_feedback(m, mean, in_second_sum=False)).norm() < 1e-12 for m in changes
    )


def test_rounded_messages_of_the_server_cost_nothing_in_what_clients_keep():
    """Q in float32 is not orthonormal to float64, and the law holds all the same."""
    draw = torch.Generator().manual_seed(8)
    start = factors(draw)
    trained = {c: train(draw, start) for c in "abc"}
    counts = {"a": 5, "b": 20, "c": 9}
    changes = {c: ClientChange.of(start, trained[c], counts[c]) for c in "abc"}
    omega = sketch_matrix("q_proj", IN, RANK, 1)
    mean = mean_change(add_terms([first_terms(m, omega, 34) for m in changes.values()]), omega)
    rounded = type(mean)(mean.num_examples, mean.b, mean.a, mean.Q.float().double())
    second = sum(second_terms(m, rounded) for m in changes.values())
    parts = combine_sums(start, rounded, second)
    kept = [next_feedback(m, rounded, in_second_sum=True) for m in changes.values()]
    got = sum(effective(part) for part in (*parts, *kept))
    assert close(got, mean_of_products(trained, counts))


def test_unequal_ranks_are_refused():
    draw = torch.Generator().manual_seed(9)
    with pytest.raises(ValueError, match="which is of another shape"):
        ClientChange.of(factors(draw), factors(draw, rank=2), 5)


def test_the_sketch_is_the_same_everywhere_and_differs_by_module_and_seed():
    sketches = [
        sketch_matrix("q", 5, 2, 1),
        sketch_matrix("k", 5, 2, 1),
        sketch_matrix("q", 5, 2, 2),
    ]
    assert torch.equal(sketches[0], sketch_matrix("q", 5, 2, 1))
    assert len({float(omega.sum()) for omega in sketches}) == 3


# ── methods ──


def test_one_method_weighs_clients_by_their_updates():
    """So it cannot know its weights from sums."""
    own = [n for n, m in METHODS.items() if m.client_weights is not Method.client_weights]
    assert own == ["hetlora"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("round_number", [1, 2])
def test_methods_give_with_sums_what_they_give_with_updates(name, round_number):
    """Adapter, residual and what is carried, through both sums with a sketch of (n - 1) r.

    All but FedRot-LoRA, which rotates single updates.
    """
    method = METHODS[name]()
    draw = torch.Generator().manual_seed(11)
    start = factors(draw)
    updates = valid_updates(method, [train(draw, start) for _ in range(4)], start, round_number)
    counts = [3, 50, 20, 27]
    weights = torch.tensor(counts, dtype=torch.float64) / 100
    context = AggregationContext(rank=RANK, reference=start, server_round=round_number, seed=4)
    wanted = method.aggregate(ClientUpdates(updates, weights), context)

    changes = [ClientChange.of(start, u, n) for u, n in zip(updates, counts, strict=True)]
    omega = sketch_matrix("q_proj", IN, 3 * RANK, 1)
    mean = mean_change(add_terms([first_terms(m, omega, 100) for m in changes]), omega)
    second = None
    if method.trained_factors(round_number) == "BA":
        second = sum(second_terms(change, mean) for change in changes)
    mean_updates, mean_weights = stand_ins(*combine_sums(start, mean, second))
    # a factor that is not trained is the one that all have, to the bit
    got = method.aggregate(
        ClientUpdates(valid_updates(method, mean_updates, start, round_number), mean_weights),
        context,
    )
    differ = [
        float((to_dense(a) - to_dense(b)).norm()) if a is not None else 0.0
        for a, b in (
            (got.adapter, wanted.adapter),
            (got.residual, wanted.residual),
            (got.carried, wanted.carried),
        )
    ]
    assert (got.residual is None) == (wanted.residual is None)
    if name == "fedrotlora":
        assert max(differ) > 1e-3
    else:
        assert max(differ) < 1e-8 * float(to_dense(wanted.adapter).norm() + 1)


@pytest.mark.parametrize("width", [0, 1, RANK, RANK + 1, 3 * RANK])
def test_stand_ins_have_the_mean_factors_and_the_mean_product(width):
    draw = torch.Generator().manual_seed(12)
    mean, cross = factors(draw), factors(draw, rank=width)
    updates, weights = stand_ins(mean, cross)
    client_updates = ClientUpdates(updates, weights)
    assert {u.rank for u in updates} == {RANK} and abs(float(weights.sum()) - 1) < 1e-12
    assert torch.allclose(client_updates.mean_factors().B, mean.B, atol=1e-10)
    assert torch.allclose(client_updates.mean_factors().A, mean.A, atol=1e-10)
    assert close(effective(client_updates.sum()), effective(mean) + effective(cross))
    with pytest.raises(ValueError, match="do not hold a cross term"):
        stand_ins(mean, factors(draw), 0)
    more = ClientUpdates(*stand_ins(mean, cross, 4))
    assert len(more) == 8 and close(effective(more.sum()), effective(mean) + effective(cross))


# ── under masks ──


def secure_sum(number, blocks, values, folder, leaves):
    """A masked sum of tensors by block, and who survived it."""
    parties = sorted(values)
    plan = SumPlan(
        run_id="run",
        server_round=1,
        number=number,
        attempt=1,
        parties=parties,
        threshold=min_threshold(len(parties)),
        work="0" * 64,
        blocks=blocks,
    )
    flat = {
        party: {name: np.asarray(t, dtype=np.float64).reshape(-1) for name, t in own.items()}
        for party, own in values.items()
    }
    result = run_sum(
        SumServer(plan, roster(parties)), make_parties(plan, flat, folder), dict(leaves)
    )
    first = values[parties[0]]
    shaped = {
        name: torch.from_numpy(total).reshape(np.shape(first[name]))
        for name, total in result.values.items()
    }
    return shaped, result.survivors


def test_the_law_under_masks_with_drops_in_and_between_the_sums(tmp_path):
    """Five clients; one drops within the first sum, one within the second: to the fixed point's bound."""
    draw = torch.Generator().manual_seed(10)
    start = factors(draw)
    clients = [f"client {i}" for i in range(5)]
    counts = dict(zip(clients, (31, 400, 77, 120, 5), strict=True))
    trained = {c: train(draw, start) for c in clients}
    feedback = factors(draw, size=0.05)
    changes = {c: ClientChange.of(start, trained[c], counts[c], feedback) for c in clients}
    omega = sketch_matrix("q_proj", IN, RANK, 1)

    # Bounds are public: here from what no client of the test exceeds.
    blocks = [
        count_block("examples", 1, 5),
        Block(name="b", size=OUT * RANK, bound=600.0),
        Block(name="a", size=RANK * IN, bound=600.0),
        Block(name="sketch", size=OUT * RANK, bound=5000.0),
    ]
    terms = {}
    for client, change in changes.items():
        own = first_terms(change, omega, 600)
        terms[client] = {
            "examples": [own.num_examples],
            "b": own.b,
            "a": own.a,
            "sketch": own.sketch,
        }
    summed, first = secure_sum(1, blocks, terms, tmp_path, {"client 0": 2})
    assert first == clients[1:]
    num_examples = int(summed["examples"])
    assert num_examples == sum(counts[c] for c in first)
    mean = mean_change(FirstTerms(num_examples, summed["b"], summed["a"], summed["sketch"]), omega)

    wide = [Block(name="cross", size=RANK * IN, bound=2000.0)]
    terms = {c: {"cross": second_terms(changes[c], mean)} for c in first}
    summed, second = secure_sum(2, wide, terms, tmp_path, {"client 4": 2})
    assert second == clients[1:4]
    parts = combine_sums(start, mean, summed["cross"])
    kept = [next_feedback(changes[c], mean, in_second_sum=c in second) for c in first]
    got = sum(effective(part) for part in (*parts, *kept))
    wanted = mean_of_products({c: trained[c] for c in first}, {c: counts[c] for c in first}) + len(
        first
    ) * effective(feedback)

    # What rounding to the fixed point can do: to b and a times the other factor, and to the cross.
    off = {b.name: sum_error(b, 5, 4) / num_examples for b in blocks}
    bound = off["b"] * (OUT * RANK) ** 0.5 * float((start.A + mean.a).norm())
    bound += off["a"] * (RANK * IN) ** 0.5 * float((start.B + mean.b).norm())
    bound += sum_error(wide[0], 4, 3) / num_examples * (RANK * IN) ** 0.5
    error = float((got - wanted).norm())
    assert error <= SCALING * bound
    assert bound < 1e-4 * float(wanted.norm())
    # and masks are what rounds: it is no longer exact to 1e-10
    assert error > 1e-10


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("round_number", [1, 2])
def test_a_method_depends_on_what_it_declares(name, round_number):
    """One of `factors` gives the same without the cross term; one of `product` does not."""
    method = METHODS[name]()
    draw = torch.Generator().manual_seed(21)
    start = factors(draw)
    context = AggregationContext(rank=RANK, reference=start, server_round=round_number, seed=4)
    mean = train(draw, start)
    results = []
    for cross in (factors(draw, rank=2), LowRank(mean.B[:, :0], mean.A[:0])):
        updates, weights = stand_ins(mean, cross)
        updates = valid_updates(method, updates, start, round_number)
        results.append(method.aggregate(ClientUpdates(updates, weights), context))
    with_cross, without = results
    differ = sum(
        float((to_dense(a) - to_dense(b)).norm())
        for a, b in (
            (with_cross.adapter, without.adapter),
            (with_cross.residual, without.residual),
            (with_cross.carried, without.carried),
        )
        if a is not None
    )
    if method.depends_on == "factors":
        assert differ < 1e-10
    elif method.depends_on == "product":
        assert differ > 1e-3
    else:
        assert name in ("hetlora", "fedrotlora")
