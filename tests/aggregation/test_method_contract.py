"""The contract: what every method must obey. A new method is added to METHODS and to nothing here.

Each law is asked of the methods that claim it by what they declare. `SETTINGS` lists further
settings of a method that are worth the same tests. Methods that train one factor get updates that
share the other (`valid_updates`).
"""

import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.aggregation import FedMomentum, FedRotLoRA, FLoRIST, LoRAFAIR, Method
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.linalg.low_rank import LowRank, zeros
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.lora.adapter import fresh_adapter
from tests.helpers import (
    TOLERANCE,
    aggregate,
    clients,
    dense_sum,
    error,
    generator,
    random_matrix,
    some_weights,
    valid_updates,
)

SETTINGS = [
    FedMomentum(split="procrustes"),
    FedMomentum(split="procrustes", svd="randomized"),
    FedMomentum(split="procrustes", energy=0.8),
    FedMomentum(split="singular"),
    FedMomentum(split="aligned"),
    FedMomentum(energy=0.9),
    FedMomentum(split="aligned", energy=0.5),
    FedMomentum(svd="randomized"),
    FedMomentum(residual="carried"),
    FedMomentum(residual="carried", split="aligned", svd="randomized"),
    FedMomentum(merge_every=2),
    FedMomentum(residual="dropped"),
    FLoRIST(energy=1.0),
    FedRotLoRA(rotation="hard"),
    LoRAFAIR(objective="ridge"),
]
ALL = [method() for method in METHODS.values()] + SETTINGS
MOMENTUM = [m for m in ALL if isinstance(m, FedMomentum) and m.svd == "exact"]


def methods_where(claim) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", [method for method in ALL if claim(method)], ids=repr)


every = methods_where(lambda method: True)
exact = methods_where(lambda method: method.exact)
inexact = methods_where(lambda method: not method.exact)
unequal = methods_where(lambda method: method.unequal_ranks)
equal = methods_where(lambda method: not method.unequal_ranks)
best = methods_where(lambda method: method.best_rank)
best_of_both = methods_where(lambda method: method.best_rank and method.trained_factors(1) == "BA")
momentum = pytest.mark.parametrize("method", MOMENTUM, ids=repr)

REFERENCE = random_matrix(40, 30, 4, seed=77)


def reconstructed(result) -> torch.Tensor:
    """The sum that an aggregate represents."""
    parts = [result.adapter, result.residual, result.carried]
    return sum(to_dense(part.to(torch.float64)) for part in parts if part is not None)


def lost(result, wanted: torch.Tensor) -> tuple[float, float]:
    """The norm of what an aggregate left out, and the norm that it reports, both relative to the sum."""
    reported = math.sqrt(result.findings.get("dropped_energy", 0.0)) / float(
        torch.linalg.matrix_norm(wanted)
    )
    return error(reconstructed(result), wanted), reported


def float_tolerance(method, dtype) -> float:
    """The sketch works in float32 by definition, whatever its input."""
    return (
        TOLERANCE[torch.float32] if getattr(method, "svd", "") == "randomized" else TOLERANCE[dtype]
    )


@every
def test_it_is_a_method_that_says_whether_it_is_exact(method):
    assert isinstance(method, Method) and isinstance(method.exact, bool)


@every
def test_declarations_are_consistent(method):
    assert method.title and ("arXiv" in method.paper or "OpenReview" in method.paper)
    for server_round in range(1, 6):
        for factors in (
            method.trained_factors(server_round),
            method.sent_factors(server_round),
            method.shared_factors,
        ):
            assert factors in ("BA", "B", "A", "")
        assert method.trained_factors(server_round)
        assert set(method.uploaded_factors(server_round)) == set(
            method.trained_factors(server_round)
        ) & set(method.shared_factors)
    assert not (method.fresh and method.sent_factors(1)) and not (
        method.exact and method.shared_factors != "BA"
    )


@every
@pytest.mark.parametrize("server_round", [1, 2])
def test_factors_that_are_not_sent_are_known_to_clients_or_can_be_drawn(method, server_round):
    updates, weights = clients(ranks=(4, 4)), some_weights(2)
    updates = valid_updates(method, updates, REFERENCE, server_round)
    result = aggregate(
        method, updates, weights, rank=4, reference=REFERENCE, server_round=server_round, seed=5
    ).adapter
    drawn = fresh_adapter((40, 30), 4, generator(5), dtype=torch.float64)
    for factor in set("BA") - set(method.sent_factors(server_round)):
        if factor in method.shared_factors:
            known = drawn if method.fresh else REFERENCE
            assert torch.equal(getattr(result, factor), getattr(known, factor))


@exact
@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(4, 40),
    in_=st.integers(4, 40),
    rank=st.integers(1, 4),
    num=st.integers(1, 6),
    seed=st.integers(0, 99),
    server_round=st.integers(1, 3),
)
def test_law_1_nothing_is_lost(method, out, in_, rank, num, seed, server_round):
    updates = valid_updates(
        method, clients((out, in_), (rank,) * num, seed=seed), None, server_round
    )
    weights = some_weights(num, seed)
    result = aggregate(method, updates, weights, rank=rank, server_round=server_round)
    assert error(reconstructed(result), dense_sum(updates, weights)) < 10 * float_tolerance(
        method, torch.float64
    )
    assert result.findings.get("dropped_energy", 0.0) == pytest.approx(0, abs=1e-20)


@inexact
@pytest.mark.parametrize("server_round", [1, 2])
def test_law_1_what_is_lost_is_reported(method, server_round):
    updates, weights = clients(ranks=(4,) * 3, condition=10), some_weights(3)
    result = aggregate(
        method, updates, weights, rank=4, reference=REFERENCE, server_round=server_round
    )
    is_lost, reported = lost(result, dense_sum(updates, weights))
    assert is_lost > 0.05 and reported == pytest.approx(is_lost, rel=1e-9)


@every
def test_law_2_a_single_client_is_returned_unchanged(method):
    (update,) = valid_updates(method, clients(ranks=(4,)), REFERENCE)
    result = aggregate(method, [update], torch.ones(1), rank=4, reference=REFERENCE)
    is_lost, reported = lost(result, update.dense())
    if method.exact or not hasattr(method, "energy"):
        assert is_lost < float_tolerance(method, torch.float64)
    else:  # it truncates even one client's product, by no more than it reports
        assert is_lost == pytest.approx(reported, abs=1e-9) and reported**2 <= 1 - method.energy
    if method.sent_factors(1):  # others start from a new adapter
        assert error(result.adapter.dense(), update.dense()) < float_tolerance(
            method, torch.float64
        )


@every
def test_law_2_clients_that_agree_get_what_they_agree_on(method):
    updates = valid_updates(method, clients(ranks=(4,)), REFERENCE) * 3
    result = aggregate(method, updates, some_weights(3), rank=4, reference=REFERENCE)
    is_lost, reported = lost(result, updates[0].dense())
    assert is_lost == pytest.approx(reported, abs=1e-9)
    if method.sent_factors(1):
        assert error(result.adapter.dense(), updates[0].dense()) < float_tolerance(
            method, torch.float64
        )
        for part in (result.residual, result.carried):
            assert part is None or part.norm() < float_tolerance(method, torch.float64)


@every
@pytest.mark.parametrize("server_round", [1, 2])
def test_law_2_order_of_clients_does_not_matter(method, server_round):
    reference = random_matrix(40, 30, 3, seed=77)
    updates, weights = (
        valid_updates(method, clients(ranks=(3,) * 4), reference, server_round),
        some_weights(4),
    )
    tolerance = 1e-12 if getattr(method, "svd", "") != "randomized" else TOLERANCE[torch.float32]
    wanted = None
    for order in itertools.permutations(range(4)):
        result = aggregate(
            method,
            [updates[i] for i in order],
            weights[list(order)],
            rank=3,
            reference=reference,
            server_round=server_round,
            seed=1,
        )
        wanted = result if wanted is None else wanted
        assert error(reconstructed(result), reconstructed(wanted)) < tolerance
        if method.sent_factors(1):
            assert error(result.adapter.dense(), wanted.adapter.dense()) < tolerance
        else:
            assert torch.equal(result.adapter.A, wanted.adapter.A)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_law_3_rank_dtype_and_shape_are_as_requested(method, dtype):
    updates, weights = valid_updates(method, clients(ranks=(4, 4), dtype=dtype)), some_weights(2)
    result = aggregate(method, updates, weights, rank=4, reference=REFERENCE.to(dtype))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for part in (result.adapter, result.residual, result.carried):
        if part is not None:
            assert (
                part.dtype == wanted and part.shape == (40, 30) and part.device == updates[0].device
            )
    assert result.adapter.rank == 4
    if method.exact:
        assert error(reconstructed(result), dense_sum(updates, weights)) < float_tolerance(
            method, wanted
        )


@unequal
@pytest.mark.parametrize("ranks", [(1, 2, 8), (8, 1), (30, 30, 30), (5,)])
def test_unequal_ranks_and_sums_of_full_rank(method, ranks):
    updates, weights = clients(ranks=ranks), some_weights(len(ranks))
    for rank in (1, 4, 30):
        result = aggregate(method, updates, weights, rank=rank)
        assert result.adapter.rank == rank
        is_lost, reported = lost(result, dense_sum(updates, weights))
        assert reported == pytest.approx(is_lost, abs=1e-9) if not method.exact else reported < 1e-9
        if method.exact:
            assert is_lost < float_tolerance(method, torch.float64)


@equal
def test_unequal_ranks_are_refused_where_they_have_no_meaning(method):
    updates = [random_matrix(40, 30, 4), random_matrix(40, 30, 2)]
    with pytest.raises(
        ValueError, match=rf"{method.title} averages factors .* rank 4; got ranks \[4, 2\]"
    ):
        aggregate(method, updates, some_weights(2), rank=4, reference=REFERENCE)
    with pytest.raises(ValueError, match=f"{method.title} needs every client at rank 4; got 2"):
        method.client_adapter(REFERENCE, 2)


@every
def test_a_clients_own_adapter_and_its_tail_are_the_global_one(method):
    updates = valid_updates(method, clients(ranks=(4, 4)), REFERENCE)
    adapter = aggregate(method, updates, some_weights(2), rank=4, reference=REFERENCE).adapter
    for rank in (1, 3, 4) if method.unequal_ranks else (4,):
        own, tail = method.client_adapter(adapter, rank)
        assert own.rank == rank and tail.rank == 4 - rank
        assert torch.allclose(own.dense() + tail.dense(), adapter.dense(), atol=1e-12)
        assert float(own.A.norm(dim=1).min()) > 0  # every direction can train
        if method.best_rank:
            S = torch.linalg.svdvals(adapter.dense())
            assert tail.norm() == pytest.approx(float(S[rank:].square().sum().sqrt()), abs=1e-10)
    with pytest.raises(ValueError, match="rank"):
        method.client_adapter(adapter, 5)


@best
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_adapter_is_the_best_of_its_rank(method, condition, dtype):
    """|sum - adapter| <= 1.0001 x the Eckart-Young error, in particular for ill-conditioned factors."""
    updates = valid_updates(method, clients((60, 50), (6, 6, 6), dtype=dtype, condition=condition))
    weights = some_weights(3)
    wanted = dense_sum(updates, weights)
    result = aggregate(method, updates, weights, rank=6)
    least = torch.linalg.svdvals(wanted)[6:].square().sum().sqrt()
    found = torch.linalg.matrix_norm(wanted - result.adapter.B.double() @ result.adapter.A.double())
    assert found <= 1.0001 * least + 1e-6 * torch.linalg.matrix_norm(wanted)
    if method.exact:
        assert error(reconstructed(result), wanted) < float_tolerance(method, dtype)


@momentum
@pytest.mark.parametrize("condition", [1.0, 1e6])
def test_factors_have_the_form_of_their_split(method, condition):
    """U and V orthonormal to 1e-5 in float32, both recovered from the factors."""
    updates = clients((60, 50), (6, 6), dtype=torch.float32, condition=condition)
    weights = some_weights(2)
    result = aggregate(method, updates, weights, rank=4)
    B, A = result.adapter.B.double(), result.adapter.A.double()
    S = torch.linalg.svdvals(dense_sum(updates, weights))[:4]
    eye = torch.eye(4, dtype=torch.float64)
    if method.split == "balanced":
        assert torch.allclose(B.mT @ B, torch.diag(S), atol=1e-5 * float(S[0]))
        assert torch.allclose(A @ A.mT, torch.diag(S), atol=1e-5 * float(S[0]))
    elif method.split == "singular":
        assert torch.allclose(A @ A.mT, eye, atol=1e-5)
        assert torch.allclose((B / S).mT @ (B / S), eye, atol=1e-4)
    assert torch.allclose(torch.linalg.svdvals(B @ A)[:4], S, rtol=1e-5)


@every
def test_inputs_are_untouched_and_calls_are_pure(method):
    reference = random_matrix(40, 30, 4, seed=50)
    updates, weights = valid_updates(method, clients(ranks=(4, 4)), reference), some_weights(2)
    before = [(u.B.clone(), u.A.clone()) for u in [*updates, reference]]
    first = aggregate(method, updates, weights, rank=4, reference=reference, seed=3)
    second = aggregate(method, updates, weights, rank=4, reference=reference, seed=3)
    assert torch.equal(first.adapter.B, second.adapter.B) and torch.equal(
        first.adapter.A, second.adapter.A
    )
    for update, (B, A) in zip([*updates, reference], before, strict=True):
        assert torch.equal(update.B, B) and torch.equal(update.A, A)


@best
@pytest.mark.parametrize("filled", [0, 1, 3])
def test_law_3_no_dead_direction(method, filled):
    """Where the sum has a lower rank, the spare directions are alive in A, zero in B, and off the kept rows."""
    reference = random_matrix(40, 30, 4, seed=9)
    if method.trained_factors(1) == "B":
        factor = random_matrix(40, 4, filled) if filled else zeros((40, 4), dtype=torch.float64)
        update = LowRank(factor.dense(), reference.A)
    else:
        update = random_matrix(40, 30, filled) if filled else zeros((40, 30), dtype=torch.float64)
    result = aggregate(
        method, [update, update], torch.tensor([0.25, 0.75]), rank=4, reference=reference
    )
    A, B = result.adapter.A, result.adapter.B
    assert A.shape == (4, 30) and float(torch.linalg.svdvals(A)[-1]) > 1e-3
    assert torch.equal(B[:, filled:], torch.zeros(40, 4 - filled, dtype=B.dtype))
    assert float((A[:filled] @ A[filled:].mT).abs().max() if filled else 0.0) < 1e-9
    # the spare rows are the previous A's, seen off the kept rows
    off = A[filled:] - A[filled:] @ torch.linalg.pinv(reference.A) @ reference.A
    if filled == 0:
        assert float(off.norm()) < 1e-9 * float(A.norm())
    assert (
        error(reconstructed(result) + 1e-30, update.dense() + 1e-30)
        < float_tolerance(method, torch.float64)
        or filled == 0
    )


@best_of_both
def test_law_3_spare_rows_without_a_reference_are_at_loras_scale(method):
    result = aggregate(method, [zeros((400, 300))], torch.ones(1), rank=8, seed=0)
    norms = result.adapter.A.norm(dim=1)
    assert float(norms.min()) > 0.4 and float(norms.max()) < 0.8  # 1/sqrt(3) = 0.577
    assert torch.equal(result.adapter.B, torch.zeros_like(result.adapter.B))


@best_of_both
def test_singular_values_at_round_off_are_spare_and_their_energy_is_not_lost(method):
    update = random_matrix(40, 30, 1)
    tiny = random_matrix(40, 30, 1, seed=4).scaled(1e-9)
    noisy = LowRank(torch.cat([update.B, tiny.B], 1), torch.cat([update.A, tiny.A], 0))
    result = aggregate(method, [noisy], torch.ones(1), rank=2)
    # One direction of two, whatever the rotation between the factors; both are alive in A.
    largest, smallest = torch.linalg.svdvals(result.adapter.B).tolist()
    assert smallest < 1e-14 * largest
    assert float(torch.linalg.svdvals(result.adapter.A)[-1]) > 1e-3
    is_lost, reported = lost(result, noisy.dense())
    assert (
        is_lost < float_tolerance(method, torch.float64)
        if method.exact
        else reported == pytest.approx(is_lost, rel=1e-5)
    )


@every
def test_bad_input_is_refused_by_name(method):
    updates, weights = valid_updates(method, clients(ranks=(4, 4))), some_weights(2)
    broken = LowRank(updates[1].B.clone(), updates[1].A.clone())
    broken.A[2, 3] = math.nan
    with pytest.raises(ValueError, match="update 1 holds NaN or Inf in its factor A"):
        aggregate(method, [updates[0], broken], weights, rank=4)
    for rank in (0, 31):
        with pytest.raises(ValueError, match="rank must be from 1 to 30"):
            aggregate(method, updates, weights, rank=rank)
    with pytest.raises(ValueError, match="sum to 1"):
        aggregate(method, updates, torch.tensor([0.5, 0.6]), rank=4)
    with pytest.raises(ValueError, match="positive and finite"):
        aggregate(method, updates, torch.tensor([1.5, -0.5]), rank=4)
    with pytest.raises(ValueError, match="one weight a client"):
        aggregate(method, updates, torch.ones(1), rank=4)
    with pytest.raises(ValueError, match="one shape"):
        aggregate(method, [updates[0], random_matrix(30, 40, 4)], weights, rank=4)
    with pytest.raises(ValueError, match="no updates"):
        aggregate(method, [], torch.ones(0), rank=4)


@methods_where(lambda method: method.trained_factors(1) != "BA")
@pytest.mark.parametrize("server_round", [1, 2])
def test_a_factor_that_should_be_frozen_and_is_not_is_refused(method, server_round):
    updates = valid_updates(method, clients(ranks=(4, 4)), REFERENCE, server_round)
    (frozen,) = set("BA") - set(method.trained_factors(server_round))
    altered = LowRank(updates[1].B.clone(), updates[1].A.clone())
    getattr(altered, frozen)[0, 0] += 1e-12
    with pytest.raises(
        ValueError, match=f"update 1 has another factor {frozen} than update 0; .* {method.title}"
    ):
        aggregate(method, [updates[0], altered], some_weights(2), rank=4, server_round=server_round)


@every
def test_repr_equality_and_pickling(method):
    same = eval(repr(method), {type(method).__name__: type(method)})
    assert same == method and hash(same) == hash(method) and same is not method
    assert pickle.loads(pickle.dumps(method)) == method
    with pytest.raises(AttributeError):
        method.exact_ly = 1  # frozen


def test_names_of_the_table_are_its_classes():
    assert METHODS == {cls.__name__.lower(): cls for cls in METHODS.values()}
