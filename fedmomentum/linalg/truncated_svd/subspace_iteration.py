"""The leading directions of a factored sum by subspace iteration, for clients with a common start.

Their sum is `B_mean A_mean` up to products of two small changes, so the rows of A_mean almost span
its leading row space, and one or two sweeps are enough. A sweep takes four thin products; a Gram
matrix takes more. Ill-conditioned factors do no harm, since no ill-conditioned matrix is inverted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, gram, numerical_rank
from fedmomentum.linalg.truncated_svd.deflation import (
    ATOL,
    RTOL,
    Directions,
    TruncatedSVD,
    deflate,
    product,
)

# The mean A must have at least this fraction of the squared norm of the clients' A; otherwise they
# have too little in common.
MIN_COMMON_FRACTION = 0.5
# Columns of the sketch, which reveals the remaining energy and directions beyond the clients' mean.
SKETCH_COLUMNS = 16
# Columns of random signs that estimate the norm of the terms of the sum.
NUM_SIGNS = 4
MAX_ITERATIONS = 3
# Float32 products may miss the directions by this fraction of the norm of the sum, slightly more
# than any measured error ...
ROUNDOFF_TOL = 4e-7
# ... provided that directions are sums of vectors at most this many times as long.
MAX_GROWTH = 4.0
# Above this ratio of the largest remaining squared singular value to the last leading one,
# convergence is slow.
MAX_RATIO = 0.25
# Terms with a norm between the inverse of this and this are far from the limits of float32.
MAX_MAGNITUDE = 1e12


def mean_rows(
    A: Tensor, lengths: Tensor, weights: Sequence[float] | Tensor, rank: int
) -> Tensor | None:
    """Return the clients' mean A, computed from their stacked A, if they have much in common.

    If the clients' ranks differ from `rank`, the stack is split at the wrong rows, so that they
    seem to have nothing in common.

    Args:
        A: `(R, in)`, a stack that begins with the rows of n clients of that rank.
        lengths: `(R,)`, the norms of the rows.
        weights: N weights.
        rank: The clients' rank.

    Returns:
        `sum_i w_i A_i` `(rank, in)`, or None if it has less than `MIN_COMMON_FRACTION` of the
        squared norm of the clients' A.
    """
    w = torch.as_tensor(weights, dtype=CORE_DTYPE, device=A.device)
    num_rows = len(w) * rank
    if len(A) < num_rows or not float(w.min()) > 0:
        return None
    fractions = w / w.sum()
    clients_A = A[:num_rows].view(len(w), -1)
    mean = (fractions.to(A) @ clients_A).view(rank, -1)
    row_squares = lengths[:num_rows].to(w).square()
    squares = row_squares.view(len(w), rank).sum(1)
    mean_square = float(torch.linalg.vector_norm(mean)) ** 2
    return mean if mean_square > MIN_COMMON_FRACTION * float(fractions @ squares) else None


def iterative_truncated_svd(total: LowRank, lengths: Tensor, rows: Tensor) -> TruncatedSVD | None:
    r"""Compute leading directions of `total = B A`, as many as `rows` has, by subspace iteration.

    With X `(m, in)` consisting of the rows and a sketch, a sweep is

        H = A X^T,  Q R = B H,  P = B^T Q,  Z = P^T A,  Z Z^T = T diag(S^2) T^T,

    and the next X is `T^T Z`. The result is `(B H') (Y^T A)`, with `H' = H R^-1 T` and `Y = P T`
    scaled so that `Y^T H' = I`: the residual is exact whatever the directions. If a sweep adds g to
    the captured energy, and rho is the squared ratio of the largest remaining singular value to the
    last captured one, then at most `g rho / (1 - rho)` is left to gain. That must be at most `RTOL`
    of the remaining energy, or `ATOL^2` of the total. The remaining energy is estimated from the
    sketch, whose columns are sums of disjoint sets of columns of `B A` with random signs.

    `O((d + k) R r)`: four products of that size per sweep, and three for directions and residual.

    Args:
        total: Float32 factors; their memory is reused if directions are returned.
        lengths: `(R,)`, the norms of the rows of A.
        rows: `(rank, in)`, near the leading row space; rank below that of `total`.

    Returns:
        The SVD, or None if the directions are not known to be accurate enough.

    Source:
        Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4 and section 9.
    """
    rank = len(rows)
    if rank + SKETCH_COLUMNS > min(total.shape):
        return None
    converged = _iterate(total, lengths, rows)
    if converged is None:
        return None
    sweep, energies = converged
    if numerical_rank(sweep.squares[:rank].sqrt(), total.shape) < rank:
        return None
    return deflate(total, lengths, _directions(total, sweep, energies, rank), "iterated")


class _Sweep(NamedTuple):
    """One sweep over `B A`: `H = A X^T`, `Q R = B H`, `P = B^T Q`, `Z = P^T A`.

    Attributes:
        H: `(R, m)`.
        Y: `(out, m)`, B H, followed by the sketch if X no longer contains it.
        R: `(m, m)`, float64.
        P: `(R, m)`.
        Z: `(m, in)`.
        T: `(m, m)`, the eigenvectors of `Z Z^T`, descending, float64.
        squares: `(m,)`, its eigenvalues: the squared singular values of `Q^T B A`, float64.
        sketch: `(m or more, SKETCH_COLUMNS)`, the coordinates of the sketch in Q, float64.
        terms_norm: An estimate of the norm of the terms of the sum, before they cancel.
    """

    H: Tensor
    Y: Tensor
    R: Tensor
    P: Tensor
    Z: Tensor
    T: Tensor
    squares: Tensor
    sketch: Tensor
    terms_norm: float


class _Energies(NamedTuple):
    """Squared norms after a sweep.

    Attributes:
        captured: Squared norm of the leading directions.
        remaining: Squared norm of the sum without them, estimated from the sketch.
        last: The last leading squared singular value.
        largest_remaining: The largest remaining one, as far as the sweep and the sketch reveal it.
    """

    captured: float
    remaining: float
    last: float
    largest_remaining: float

    @property
    def total(self) -> float:
        """Squared norm of the sum."""
        return self.captured + self.remaining


def _iterate(total: LowRank, lengths: Tensor, rows: Tensor) -> tuple[_Sweep, _Energies] | None:
    """Sweep until convergence; return None if it is slow or exceeds the limits of float32."""
    rank = len(rows)
    test_rows = _disjoint_signs(SKETCH_COLUMNS, total.A.shape[1]).to(total.A)
    X = torch.cat([rows, test_rows])
    signs = _disjoint_signs(NUM_SIGNS, total.rank).to(total.A)
    signs = (signs * lengths).mT  # (R, NUM_SIGNS)
    sketch = total.A.new_zeros(len(total.B), 0)  # in the first sweep it is part of X
    captured = 0.0
    for _ in range(MAX_ITERATIONS):
        sweep = _sweep(total, X, signs, sketch)
        if sweep is None:
            return None
        sketch = sweep.Y[:, -SKETCH_COLUMNS:]
        previous = captured or _captured_energy(rows, sweep.R[:rank, :rank])
        energies = _energies(sweep, rank)
        captured = energies.captured
        last = energies.last
        largest_remaining = energies.largest_remaining
        if not largest_remaining < MAX_RATIO * last:
            return None
        if not sweep.terms_norm <= energies.total**0.5:  # the terms cancel
            return None
        gain = max(captured - previous, 0.0) * largest_remaining / (last - largest_remaining)
        if gain <= max(RTOL * energies.remaining, ATOL**2 * energies.total):
            return sweep, energies
        X = sweep.T.mT.to(sweep.Z) @ sweep.Z
    return None


def _sweep(total: LowRank, X: Tensor, signs: Tensor, sketch: Tensor) -> _Sweep | None:
    """Multiply X by `B A` and by its transpose; return None at the limits of float32.

    Args:
        total: `B A`.
        X: `(m, in)`.
        signs: `(R, NUM_SIGNS)`, random signs times the norms of the rows of A.
        sketch: `(out, SKETCH_COLUMNS)` or `(out, 0)`, additional columns to decompose.
    """
    m = len(X)
    H = total.A @ X.mT  # (R, m)
    Y = total.B @ torch.cat([H, signs], dim=1)  # (out, m + NUM_SIGNS)
    terms_norm = float(torch.linalg.vector_norm(Y[:, m:]))
    Y = torch.cat([Y[:, :m], sketch], dim=1)
    # The sketch may almost lie in the span of the rest, so use a QR decomposition, not Gram.
    Q, R = torch.linalg.qr(Y)
    Q = Q[:, :m]
    sketch_in_Q = R[:, -SKETCH_COLUMNS:].to(CORE_DTYPE)
    R = R[:m, :m].to(CORE_DTYPE)
    is_normal = 1 / MAX_MAGNITUDE < terms_norm < MAX_MAGNITUDE
    if not is_normal or not bool((R.diagonal() != 0).all()):
        return None
    P = total.B.mT @ Q  # (R, m)
    Z = P.mT @ total.A  # (m, in)
    squares, T = torch.linalg.eigh(gram(Z).to(CORE_DTYPE))  # ascending
    squares = squares.flip(0).clamp(min=0)
    return _Sweep(H, Y, R, P, Z, T.flip(1), squares, sketch_in_Q, terms_norm)


def _energies(sweep: _Sweep, rank: int) -> _Energies:
    """Measure the leading directions, and what the sketch reveals beyond them."""
    leading = sweep.T[:, :rank]
    m = len(leading)
    beyond = sweep.sketch.clone()
    beyond[:m] -= leading @ (leading.mT @ beyond[:m])
    remaining = torch.linalg.eigvalsh(gram(beyond.mT)).tolist()
    squares = sweep.squares.tolist()
    return _Energies(
        captured=sum(squares[:rank]),
        remaining=sum(remaining),
        last=squares[rank - 1],
        largest_remaining=max(remaining[-1], squares[rank]),
    )


def _directions(total: LowRank, sweep: _Sweep, energies: _Energies, rank: int) -> Directions:
    """Return the leading directions of a sweep, in float64 if float32 may miss them."""
    T = sweep.T[:, :rank]
    P = sweep.P.to(CORE_DTYPE)
    C = torch.linalg.solve_triangular(sweep.R, T, upper=True)  # (m, rank)
    PT = P @ T  # (R, rank)

    # How much longer the terms of B H C and of P T are than the sums.
    growth_of_W = _column_norms(_column_norms(sweep.R)[:, None] * C)
    growth_of_V = _column_norms(_column_norms(P)[:, None] * T) / _column_norms(PT)
    growth = float(torch.cat([growth_of_W, growth_of_V]).max())
    is_negligible = ROUNDOFF_TOL**2 * energies.total <= RTOL * energies.remaining
    if growth <= MAX_GROWTH and is_negligible:
        X = sweep.H.to(CORE_DTYPE) @ C  # (R, rank)
        M = torch.linalg.inv(X.mT @ PT)
        # B X and (P T M)^T A up to round-off, from products that are already computed.
        W = sweep.Y[:, : len(C)] @ C.to(sweep.Y)
        V = (T @ M).mT.to(sweep.Z) @ sweep.Z
        return Directions(X, PT @ M, W, V)
    X = product(T.mT @ sweep.Z.to(CORE_DTYPE), total.A.mT).mT
    M = torch.linalg.inv(X.mT @ PT)
    Y = PT @ M
    W = product(X.mT, total.B.mT).mT
    V = product(Y.mT, total.A)
    return Directions(X, Y, W, V)


def _column_norms(M: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(M, dim=0)
    return norms


def _captured_energy(rows: Tensor, R: Tensor) -> float:
    """Return `||M V||_F^2` for an orthonormal basis V of the rows X, where `M X^T = Q R`.

    0 if the rows are linearly dependent.
    """
    G = gram(rows).to(CORE_DTYPE)
    L, failed = torch.linalg.cholesky_ex(G)
    if int(failed):
        return 0.0
    coordinates = torch.linalg.solve_triangular(L, R.mT.to(G), upper=False)
    return float(coordinates.square().sum())


@lru_cache(64)
def _disjoint_signs(count: int, size: int) -> Tensor:
    """Return `(count, size)`: each row has random signs in its own run of columns, zeros elsewhere.

    For such S, the expected value of `||M S^T||_F^2` is `||M||_F^2`.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2.0 - 1
    run_of_column = torch.arange(size, device="cpu") * count // size
    return torch.stack([signs * (run_of_column == row) for row in range(count)])
