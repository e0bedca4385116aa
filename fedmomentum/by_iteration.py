"""The leading directions of a factored sum by subspace iteration: for clients that come from one adapter.

Their sum is `B_mean A_mean` but for products of two small moves, so the rows of A_mean all but span its leading row
space, and a sweep or two are enough. Each takes four thin products; a Gram matrix takes more. Nothing is inverted that
the factors' condition could spoil.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fedmomentum.deflation import FLOOR, SLACK, Leading, product, taken_out
from fedmomentum.lowrank import CORE_DTYPE, LowRank, gram, numerical_rank

# The mean A must hold this share of the squared norm of the clients' A, or they have too little in common.
COMMON = 0.5
# Columns of the sketch: what is left shows in them, and directions beyond the clients' mean.
SKETCH = 16
# Columns of random signs that tell the size of the parts.
NUM_SIGNS = 4
MAX_SWEEPS = 3
# Products in float32 may miss the directions by this share of the whole sum: somewhat more than was ever seen.
ROUND_OFF = 4e-7
# Beyond this ratio of a squared singular value left to the last one taken, iteration is slow.
MAX_RATIO = 0.25
# Products of two numbers of this size, and of their inverse, are far from the edges of float32.
REACH = 1e12


def mean_rows(A: Tensor, weights: Sequence[float] | Tensor, rank: int) -> Tensor | None:
    """`sum_i w_i A_i` `(rank, in)` of a stack that begins with n parts of that rank, if it has their common direction.

    Parts of other ranks are not told apart, and then have nothing in common.
    """
    w = torch.as_tensor(weights, dtype=CORE_DTYPE, device=A.device)
    if len(A) < len(w) * rank or not float(w.min()) > 0:
        return None
    parts, w = A[: len(w) * rank].view(len(w), -1), w / w.sum()
    mean = w.to(A.dtype) @ parts
    whole = float(torch.linalg.vector_norm(parts, dim=1).to(CORE_DTYPE).square() @ w)
    return mean.view(rank, -1) if float(torch.linalg.vector_norm(mean)) ** 2 > COMMON * whole else None


def by_iteration(total: LowRank, rows: Tensor) -> Leading | None:
    r"""`leading` of `total = B A`, as many directions as `rows` has: None where that is not known to be good enough.

    With X `(in, m)` the rows and a sketch, a sweep is

        H = A X,  Q = B H E orthonormal,  P = B^T Q,  Z = A^T P,  Z^T Z = T diag(S^2) T^T,

    and the next X is Z T. What is found is `(B H') (Y^T A)`, with `H' = H E T` and `Y = P T` scaled so that
    `Y^T H' = 1`: the rest is exact whatever was found. If a sweep adds g to the energy found, and rho is the squared
    ratio of the largest singular value left to the last one found, then no more than `g rho / (1 - rho)` is still to be
    gained. That must be below `SLACK` of what is left, or `FLOOR^2` of the whole. What is left is estimated
    from the sketch, whose columns are sums of disjoint sets of columns of `B A` with random signs.

    `O((d + k) R r)`: four products of that size a sweep, and three for the directions and the rest.

    Args:
        total: float32 factors, used up where directions are returned.
        rows: `(rank, in)`, near the leading row space; rank below that of `total`.

    Source:
        Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4 and section 9.
    """
    rank, (B, A) = len(rows), (total.B, total.A)
    lengths = torch.linalg.vector_norm(A, dim=1)
    parts = (_signs(NUM_SIGNS, total.rank).to(A) * lengths).mT  # (R, NUM_SIGNS)
    X, drawn, kept = torch.cat([rows, _signs(SKETCH, A.shape[1]).to(A)]).mT, None, 0.0
    for _ in range(MAX_SWEEPS):
        H = A @ X  # (R, m)
        Y = (B @ torch.cat([H, parts], dim=1)).to(CORE_DTYPE)  # (out, m + NUM_SIGNS)
        apart, Y = float(torch.linalg.vector_norm(Y[:, H.shape[1] :])), Y[:, : H.shape[1]]
        if not 1 / REACH < apart < REACH or (basis := _basis(Y, rank)) is None:
            return None
        Q, E = basis
        if drawn is None:
            drawn, kept = Y[:, rank:].to(A), _captured(rows, Y[:, :rank])
        P = B.mT @ Q  # (R, m)
        Z = A.mT @ P  # (in, m)
        squares, T = torch.linalg.eigh(gram(Z.mT).to(CORE_DTYPE))
        squares, T = squares.flip(0).clamp(min=0), T.flip(1)
        before, kept, last = kept, float(squares[:rank].sum()), float(squares[rank - 1])
        U = Q @ T[:, :rank].to(Q)
        missed = torch.linalg.svdvals(drawn - U @ (U.mT @ drawn)).to(CORE_DTYPE).square()
        left, largest = float(missed.sum()), max(float(missed[0]), float(squares[rank]))
        if not largest < MAX_RATIO * last:
            return None
        gain, energy = max(kept - before, 0.0) * largest / (last - largest), kept + left
        if not apart <= energy**0.5:  # the parts cancel rather than add up
            return None
        if gain <= max(SLACK * left, FLOOR**2 * energy):
            break
        X = Z @ T.to(Z)
    else:
        return None
    if numerical_rank(squares[:rank].sqrt(), total.shape) < rank:
        return None
    T = T[:, :rank]
    H, Y = H.to(CORE_DTYPE) @ (E @ T), P.to(CORE_DTYPE) @ T  # (R, rank)
    Y = Y @ torch.linalg.inv(H.mT @ Y)  # near 1
    core = torch.float32 if ROUND_OFF**2 * energy <= SLACK * left else CORE_DTYPE
    W, V = product(H.mT.to(core), B.mT).mT, product(Y.mT.to(core), A)
    return taken_out(total, lengths, Y, H, W, V, "iterated")


def _basis(Y: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """`Q = Y E` `(out, m)`, orthonormal, in float32, and E; None where the columns of Y have no m directions.

    The columns beyond the first `rank` may all but lie in the span of those: what they add is looked at by itself.
    """
    one, two = Y[:, :rank], Y[:, rank:]
    if (E_1 := _inverse_root(one)) is None:
        return None
    Q = one @ E_1
    C = Q.mT @ two
    two = two - Q @ C
    if (E_2 := _inverse_root(two)) is None:
        return None
    E = torch.cat([torch.cat([E_1, -E_1 @ C @ E_2], dim=1), torch.cat([torch.zeros_like(C.mT), E_2], dim=1)])
    return torch.cat([Q, two @ E_2], dim=1).to(torch.float32), E


def _inverse_root(Y: Tensor) -> Tensor | None:
    """E `(m, m)` with `Y E` orthonormal; None where Y `(out, m)` has fewer directions, as far as its Gram tells."""
    sizes = torch.linalg.vector_norm(Y, dim=0)
    L, failed = torch.linalg.cholesky_ex(Y.mT @ Y / sizes / sizes[:, None])
    if int(failed) or not bool(torch.isfinite(L).all()):
        return None
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    return torch.linalg.solve_triangular(L.mT, eye, upper=True) / sizes[:, None]


def _captured(rows: Tensor, Y: Tensor) -> float:
    """`||M V||_F^2` for an orthonormal basis V of the rows X, given `Y = M X^T`; 0 if they have no basis."""
    E = _inverse_root(rows.to(CORE_DTYPE).mT)
    return 0.0 if E is None else float((Y @ E).square().sum())


@lru_cache(64)
def _signs(count: int, size: int) -> Tensor:
    """`(count, size)` of random signs in disjoint runs of columns, a run a row, and zeros; `S S^T` has mean 1."""
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0), device="cpu") * 2.0 - 1
    return torch.stack([signs * (torch.arange(size, device="cpu") * count // size == row) for row in range(count)])
