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
# ... and by no more than this where directions are sums of vectors as long as that.
MAX_GROWTH = 4.0
# Beyond this ratio of a squared singular value left to the last one taken, iteration is slow.
MAX_RATIO = 0.25
# Parts of this size, or of its inverse, are far from the edges of float32.
REACH = 1e12


def common_rows(A: Tensor, lengths: Tensor, weights: Sequence[float] | Tensor, rank: int) -> Tensor | None:
    """`sum_i w_i A_i` `(rank, in)` of a stack that begins with n parts of that rank, if it has their common direction.

    Parts of other ranks are not told apart, and then have nothing in common. `lengths` are those of the rows.
    """
    w = torch.as_tensor(weights, dtype=CORE_DTYPE, device=A.device)
    if len(A) < len(w) * rank or not float(w.min()) > 0:
        return None
    shares, num_rows = w / w.sum(), len(w) * rank
    mean = (shares.to(A) @ A[:num_rows].view(len(w), -1)).view(rank, -1)
    whole = shares @ lengths[:num_rows].to(w).square().view(len(w), rank).sum(1)
    return mean if float(torch.linalg.vector_norm(mean)) ** 2 > COMMON * float(whole) else None


def by_iteration(total: LowRank, lengths: Tensor, rows: Tensor) -> Leading | None:
    r"""`leading` of `total = B A`, as many directions as `rows` has: None where that is not known to be good enough.

    With X `(m, in)` the rows and a sketch, a sweep is

        H = A X^T,  Q R = B H,  P = B^T Q,  Z = P^T A,  Z Z^T = T diag(S^2) T^T,

    and the next X is T^T Z. What is found is `(B H') (Y^T A)`, with `H' = H R^-1 T` and `Y = P T` scaled so that
    `Y^T H' = 1`: the rest is exact whatever was found. If a sweep adds g to the energy found, and rho is the squared
    ratio of the largest singular value left to the last one found, then no more than `g rho / (1 - rho)` is still to be
    gained. That must be below `SLACK` of what is left, or `FLOOR^2` of the whole. What is left is estimated
    from the sketch, whose columns are sums of disjoint sets of columns of `B A` with random signs.

    `O((d + k) R r)`: four products of that size a sweep, and three for the directions and the rest.

    Args:
        total: float32 factors, used up where directions are returned.
        lengths: `(R,)`, of the rows of A.
        rows: `(rank, in)`, near the leading row space; rank below that of `total`.

    Source:
        Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4 and section 9.
    """
    rank, (B, A) = len(rows), (total.B, total.A)
    if rank + SKETCH > min(total.shape):
        return None
    parts = (_signs(NUM_SIGNS, total.rank).to(A) * lengths).mT  # (R, NUM_SIGNS)
    X, m, drawn, kept = torch.cat([rows, _signs(SKETCH, A.shape[1]).to(A)]), rank + SKETCH, A.new_zeros(len(B), 0), 0.0
    for _ in range(MAX_SWEEPS):
        H = A @ X.mT  # (R, m)
        Y = B @ torch.cat([H, parts], dim=1)  # (out, m + NUM_SIGNS)
        apart, Y = float(torch.linalg.vector_norm(Y[:, m:])), torch.cat([Y[:, :m], drawn], dim=1)
        drawn = Y[:, -SKETCH:]  # by the first sweep
        Q, R = torch.linalg.qr(Y)  # what the sketch adds may all but lie in the span of the rest: no Gram matrix here
        Q, R, seen = Q[:, :m], R[:m, :m].to(CORE_DTYPE), R[:, -SKETCH:].to(CORE_DTYPE)  # drawn = (all of Q) seen
        if not 1 / REACH < apart < REACH or not bool((R.diagonal() != 0).all()):
            return None
        before = kept or _captured(rows, R[:rank, :rank])
        P = B.mT @ Q  # (R, m)
        Z = P.mT @ A  # (m, in)
        squares, T = torch.linalg.eigh(gram(Z).to(CORE_DTYPE))
        squares, T = squares.flip(0).clamp(min=0), T.flip(1)
        seen[:m] -= T[:, :rank] @ (T[:, :rank].mT @ seen[:m])
        sizes, missed = squares.tolist(), torch.linalg.eigvalsh(gram(seen.mT)).tolist()
        kept, left, last, largest = sum(sizes[:rank]), sum(missed), sizes[rank - 1], max(missed[-1], sizes[rank])
        if not largest < MAX_RATIO * last:
            return None
        gain, energy = max(kept - before, 0.0) * largest / (last - largest), kept + left
        if not apart <= energy**0.5:  # the parts cancel rather than add up
            return None
        if gain <= max(SLACK * left, FLOOR**2 * energy):
            break
        X = T.mT.to(Z) @ Z
    else:
        return None
    if numerical_rank(squares[:rank].sqrt(), total.shape) < rank:
        return None
    T, P = T[:, :rank], P.to(CORE_DTYPE)
    C, turned = torch.linalg.solve_triangular(R, T, upper=True), P @ T  # (m, rank), (R, rank)
    grown = [_length(_length(R)[:, None] * C), _length(_length(P)[:, None] * T) / _length(turned)]
    if float(torch.cat(grown).max()) <= MAX_GROWTH and ROUND_OFF**2 * energy <= SLACK * left:
        H = H.to(CORE_DTYPE) @ C  # (R, rank)
        M = torch.linalg.inv(H.mT @ turned)
        W, V = Y[:, :m] @ C.to(Y), (T @ M).mT.to(Z) @ Z  # B H and (P T M)^T A, but for round-off
    else:
        H = product(T.mT @ Z.to(CORE_DTYPE), A.mT).mT
        M = torch.linalg.inv(H.mT @ turned)
        W, V = product(H.mT, B.mT).mT, product((turned @ M).mT, A)
    return taken_out(total, lengths, turned @ M, H, W, V, "iterated")


def _length(M: Tensor) -> Tensor:
    """Of each column."""
    return torch.linalg.vector_norm(M, dim=0)


def _captured(rows: Tensor, R: Tensor) -> float:
    """`||M V||_F^2` for an orthonormal basis V of the rows X, where `M X^T = Q R`; 0 if they have no basis."""
    G = gram(rows).to(CORE_DTYPE)
    L, failed = torch.linalg.cholesky_ex(G)
    return 0.0 if int(failed) else float(torch.linalg.solve_triangular(L, R.mT.to(G), upper=False).square().sum())


@lru_cache(64)
def _signs(count: int, size: int) -> Tensor:
    """`(count, size)` of random signs in disjoint runs of columns, a run a row, and zeros; `S S^T` has mean 1."""
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0), device="cpu") * 2.0 - 1
    return torch.stack([signs * (torch.arange(size, device="cpu") * count // size == row) for row in range(count)])
