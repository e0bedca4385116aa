import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.linalg.low_rank import (
    LowRank,
    difference,
    energy_rank,
    numerical_rank,
    weighted_sum,
    zeros,
)
from fedmomentum.linalg.spectral import principal_angles, randomized_svd, relative_error
from tests.helpers import (
    TOLERANCE,
    clients,
    dense_sum,
    error,
    generator,
    random_matrix,
    some_weights,
)

sizes = st.integers(1, 24)


@settings(max_examples=60, deadline=None)
@given(
    out=sizes,
    in_=sizes,
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
def test_factored_algebra_equals_dense(out, in_, ranks, seed):
    g = generator(seed)
    parts = [
        LowRank(
            torch.randn(out, r, generator=g, dtype=torch.float64),
            torch.randn(r, in_, generator=g, dtype=torch.float64),
        )
        for r in ranks
    ]
    weights = torch.randn(len(parts), generator=g, dtype=torch.float64)
    dense = dense_sum(parts, weights) if parts else torch.zeros(out, in_)
    total = weighted_sum(parts, weights)
    assert torch.allclose(total.dense(), dense, atol=1e-10)
    assert math.isclose(total.norm(), float(dense.norm()), abs_tol=1e-10, rel_tol=1e-10)
    assert math.isclose(
        total.inner(parts[0]), float((dense * parts[0].dense()).sum()), abs_tol=1e-9, rel_tol=1e-10
    )
    U, S, Vh = total.svd()
    assert torch.allclose((U * S) @ Vh, dense, atol=1e-10)
    eye = torch.eye(len(S), dtype=torch.float64)
    assert torch.allclose(U.mT @ U, eye, atol=1e-10) and torch.allclose(Vh @ Vh.mT, eye, atol=1e-10)
    wanted = torch.linalg.svdvals(dense)[: len(S)]
    assert torch.allclose(S, wanted, atol=1e-10)
    assert relative_error(total.recompress(), total) < 1e-10 or dense.norm() == 0


def test_svd_is_exact_for_ill_conditioned_factors():
    matrix = random_matrix(60, 50, 12, seed=3, condition=1e6)
    U, S, Vh = matrix.svd()
    assert error((U * S) @ Vh, matrix.dense()) < 1e-10
    assert torch.allclose(U.mT @ U, torch.eye(12, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_and_single_precision_are_read_and_float32_is_returned(dtype):
    matrix = random_matrix(30, 20, 4, dtype=dtype)
    recompressed = matrix.recompress()
    assert recompressed.dtype == torch.float32 and recompressed.rank == 4
    assert (
        error(recompressed.dense(), matrix.B.double() @ matrix.A.double())
        < TOLERANCE[torch.float32]
    )


def test_norm_of_a_tiny_difference_survives():
    """sqrt(<D, D>) would return 1e-8 or NaN here."""
    one = random_matrix(30, 20, 4)
    perturbation = random_matrix(30, 20, 1, seed=1).scaled(1e-12)
    other = LowRank(torch.cat([one.B, perturbation.B], 1), torch.cat([one.A, perturbation.A], 0))
    assert math.isclose(difference(other, one).norm(), perturbation.norm(), rel_tol=1e-3)


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("size", [1.0, 1e-18, 1e18])
def test_a_norm_in_float32_keeps_five_digits_whatever_cancels_and_whatever_the_size(share, size):
    one, perturbation = random_matrix(30, 20, 4), random_matrix(30, 20, 2, seed=1).scaled(share)
    close = difference(
        LowRank(torch.cat([one.B, perturbation.B], 1), torch.cat([one.A, perturbation.A], 0)), one
    ).scaled(size)
    close = close.to(torch.float32)  # its parts cancel to the bit
    assert math.isclose(
        close.norm(torch.float32), float(close.to(torch.float64).dense().norm()), rel_tol=1e-5
    )


def test_recompression_is_optimal_and_keeps_the_requested_energy():
    total = weighted_sum(clients(), some_weights(3))
    S = torch.linalg.svdvals(total.dense())
    for rank in (1, 3, 7):
        best = S[rank:].square().sum().sqrt()
        assert math.isclose(
            difference(total, total.recompress(rank=rank)).norm(), float(best), rel_tol=1e-9
        )
    for energy in (0.3, 0.9, 0.999):
        kept = total.recompress(energy=energy)
        share = kept.inner(kept) / total.inner(total)
        assert share >= energy - 1e-12
        smaller = (
            total.recompress(rank=kept.rank - 1)
            if kept.rank > 1
            else zeros(total.shape, dtype=torch.float64)
        )
        assert smaller.inner(smaller) / total.inner(total) < energy


def test_energy_and_numerical_rank_of_an_empty_matrix():
    assert energy_rank(torch.zeros(3), 0.9) == 0 and numerical_rank(torch.zeros(3), (5, 5)) == 0
    assert zeros((3, 4)).norm() == 0.0 and zeros((3, 4)).svd()[1].shape == (0,)


def test_randomized_svd_with_the_published_width_finds_the_sum():
    total = weighted_sum(clients(), some_weights(3))
    U, S, Vh = randomized_svd(total, total.rank, generator(0))
    assert error((U * S) @ Vh, total.dense()) < 1e-5
    repeated = randomized_svd(total, total.rank, generator(0))
    assert torch.equal(repeated[1], S)


@pytest.mark.parametrize("side", ["in", "out"])
def test_principal_angles_by_construction(side):
    basis = torch.linalg.qr(torch.randn(9, 4, generator=generator(5), dtype=torch.float64)).Q
    wanted = torch.tensor([1e-9, 0.3, math.pi / 2], dtype=torch.float64)
    # three directions turned by the wanted angles out of the plane of the first three
    extra = torch.linalg.qr(
        torch.cat([basis, torch.randn(9, 3, generator=generator(6), dtype=torch.float64)], 1)
    ).Q
    turned = basis[:, :3] * wanted.cos() + extra[:, 4:7] * wanted.sin()
    right_factor = torch.randn(3, 5, generator=generator(7), dtype=torch.float64)
    left, right = LowRank(basis[:, :3], right_factor), LowRank(turned, right_factor)
    if side == "in":
        left, right = LowRank(left.A.mT, left.B.mT), LowRank(right.A.mT, right.B.mT)
    assert torch.allclose(
        principal_angles(left, right)[side == "out"], wanted, atol=1e-12, rtol=1e-6
    )
    assert torch.allclose(
        principal_angles(left, left)[side == "out"], torch.zeros(3, dtype=torch.float64), atol=1e-12
    )


def test_errors_name_the_value_received():
    B, A = torch.zeros(3, 2), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"B \(3, 2\) and A \(3, 4\)"):
        LowRank(B, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="float64"):
        LowRank(B, A.double())
    with pytest.raises(ValueError, match="NaN or Inf"):
        LowRank(B.fill_(float("nan")), A).svd()
    with pytest.raises(ValueError, match="one shape"):
        weighted_sum([zeros((2, 3)), zeros((3, 2))], [1, 1])
    with pytest.raises(ValueError, match="one weight per matrix"):
        weighted_sum([zeros((2, 3))], [1, 1])
    with pytest.raises(ValueError, match="inner product"):
        zeros((2, 3)).inner(zeros((3, 2)))


def test_repr_shows_the_form_and_pickling_works():
    matrix = random_matrix(5, 4, 2, dtype=torch.float32)
    assert repr(matrix) == "LowRank(5x4, rank 2, float32)"
    unpickled = pickle.loads(pickle.dumps(matrix))
    assert torch.equal(unpickled.B, matrix.B) and torch.equal(unpickled.A, matrix.A)
