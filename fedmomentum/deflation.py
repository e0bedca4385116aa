"""A factored sum with some directions taken out: what both cheap ways of finding directions end in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedmomentum.lowrank import CHUNK, CORE_DTYPE, LowRank
from fedmomentum.sums import Matrix, norm

# How much worse than the best of its rank the directions may be, as a share of the best's error ...
SLACK = 4e-5
# ... or of the whole sum, where the best leaves next to nothing: half the step of float32.
FLOOR = 6e-8
# The norms of the factors over that of their product: beyond it the parts cancel, and float32 loses digits of the sum.
MAX_CANCELLATION = 16.0
# Folding rows into others may enlarge the round-off of those by this.
MAX_GROWTH = 1.5


@dataclass(frozen=True, eq=False)
class Leading:
    """`sum_i w_i B_i A_i = U diag(S) Vh + rest`.

    Attributes:
        U: `(out, m)`, orthonormal columns, float64.
        S: `(m,)`, descending, all above round-off, float64.
        Vh: `(m, in)`, orthonormal rows, float64.
        rest: the remainder, in the dtype asked for: factored, its rank the sum of the ranks minus m or less, or dense
            where the sum is and not all of its directions were looked for.
        path: how it was found: `iterated`, `gram32`, `gram64`, `dense` or `svd`.
        known: `||rest||_F^2`, where it came with the rest of the work.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    rest: Matrix
    path: str
    known: float | None = None

    @cached_property
    def left(self) -> float:
        """`||rest||_F^2`; where it is not known it costs two Gram matrices, so only whoever asks pays for it."""
        return norm(self.rest) ** 2 if self.known is None else self.known

    @property
    def energy(self) -> float:
        """`||sum_i w_i B_i A_i||_F^2`."""
        return float(self.S.square().sum()) + self.left


def taken_out(
    total: LowRank, lengths: Tensor, Y: Tensor, X: Tensor, W: Tensor, V: Tensor, path: str, known: float | None = None
) -> Leading:
    """The directions of `W V = (B X)(Y^T A)`, and `B A` without them.

    Args:
        total: `B A`, of rank R; its memory is used up by the rest.
        lengths: `(R,)`, of the rows of A.
        Y: `(R, m)`, float64, with `Y^T X = 1`.
        X: `(R, m)`, float64.
        W: `(out, m)`, B X: columns of some length, orthogonal but for round-off.
        V: `(m, in)`, Y^T A: rows likewise.
        path: how they were found.
        known: `||rest||_F^2`, if it is.
    """
    U, S, Vh = _orthonormal(W, V)
    rest = _deflated(total, lengths.to(CORE_DTYPE), Y, X.to(total.dtype), V.to(total.dtype))
    return Leading(U, S, Vh, rest, path, known)


def product(left: Tensor, rows: Tensor) -> Tensor:
    """`left rows`, `(m, R)` times `(R, size)`, in the dtype of `left`; other rows are cast a piece at a time."""
    if left.dtype == rows.dtype:
        return left @ rows
    return torch.cat([left @ rows[:, i : i + CHUNK].to(left.dtype) for i in range(0, rows.shape[1], CHUNK)], dim=1)


def _orthonormal(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of `W V`, `(out, m)` times `(m, in)`, whose columns and rows are orthogonal but for round-off."""
    W, V = W.to(CORE_DTYPE), V.to(CORE_DTYPE)
    G_W, G_V = W.mT @ W, V @ V.mT
    w, v = G_W.diagonal().sqrt(), G_V.diagonal().sqrt()
    L_W, L_V = torch.linalg.cholesky(G_W / w / w[:, None]), torch.linalg.cholesky(G_V / v / v[:, None])
    P, S, Qh = torch.linalg.svd(L_W.mT * w * v @ L_V)
    U = W @ (torch.linalg.solve_triangular(L_W.mT, P, upper=True) / w[:, None])
    return U, S, (torch.linalg.solve_triangular(L_V, Qh, upper=False, left=False) / v) @ V


def _deflated(total: LowRank, lengths: Tensor, Y: Tensor, X: Tensor, V: Tensor) -> LowRank:
    r"""`B A - (B X)(Y^T A)` in `R - m` components instead of `R`, for `V = Y^T A` and `Y^T X = I`.

    `A' = A - X V` has `Y^T A' = 0`: the rows K of A', m of them, are `-Y_K^-T Y_J^T A'_J`, so that

        B A' = (B_J - B_K Y_K^-T Y_J^T)(A_J - X_J V).

    K are the last rows, where that keeps `Y_K^-T Y_J^T` small; else those in which Gaussian elimination with partial
    pivoting finds its pivots in Y: both for rows of A of unit length. The result is made within the memory of `total`,
    which is used up: new memory costs as much as the product.
    """
    keep, Y = total.rank - Y.shape[1], Y * lengths[:, None]
    T, singular = torch.linalg.solve_ex(Y[keep:].mT, Y[:keep].mT)  # (m, R - m)
    if int(singular) or not float(torch.linalg.vector_norm(T)) <= MAX_GROWTH * keep**0.5:
        K, J = _pivots(Y)
        moved = J != torch.arange(keep, device=J.device)
        T = lengths[K, None] * torch.linalg.solve(Y[K].mT, Y[J].mT) / lengths[J]
        B_K = total.B[:, K]
        for factor in (total.B.mT, total.A, X):
            factor[:keep][moved] = factor[J[moved]]
    else:
        T, B_K = lengths[keep:, None] * T / lengths[:keep], total.B[:, keep:]
    B, A = total.B[:, :keep], total.A[:keep]
    return LowRank(B.addmm_(B_K, T.to(total.dtype), alpha=-1), A.addmm_(X[:keep], V, alpha=-1))


def _pivots(Y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `(R, m)` that elimination takes as pivots, and the others: in order, but for the last ones.

    The others are `0, ..., R - m - 1`, with those of them that are pivots replaced by what is no pivot beyond.
    """
    order, m = list(range(len(Y))), Y.shape[1]
    for i, pivot in enumerate(torch.linalg.lu_factor(Y).pivots.tolist()):
        order[i], order[pivot - 1] = order[pivot - 1], order[i]
    chosen, keep = set(order[:m]), len(Y) - m
    spare = iter([i for i in range(keep, len(Y)) if i not in chosen])
    others = [next(spare) if i in chosen else i for i in range(keep)]
    K, J = (torch.tensor(rows, device=Y.device) for rows in (order[:m], others))
    return K, J
