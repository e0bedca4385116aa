"""Subtraction of directions from a factored sum, the last step of both cheap truncated SVDs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CHUNK_COLUMNS, CORE_DTYPE, LowRank
from fedmomentum.linalg.matrix import Matrix, norm

# The error of the directions may exceed the minimum error at their rank by this fraction of it ...
RTOL = 4e-5
# ... or, if the best approximation leaves almost nothing, by this fraction of the norm of the sum:
# half of float32's epsilon.
ATOL = 6e-8
# Rewriting rows in terms of others may amplify their round-off by this factor.
MAX_ROUNDOFF_GROWTH = 1.5


@dataclass(frozen=True, eq=False)
class TruncatedSVD:
    """`sum_i w_i B_i A_i = U diag(S) Vh + residual`.

    Attributes:
        U: `(out, m)`, orthonormal columns, float64.
        S: `(m,)`, descending, all above round-off, float64.
        Vh: `(m, in)`, orthonormal rows, float64.
        residual: The sum minus `U diag(S) Vh`, in the requested dtype. Factored, of rank at most
            the sum of the ranks minus m; or dense if the sum is dense and not all of its directions
            were computed.
        path: How it was computed: `iterated`, `gram32`, `gram64`, `dense` or `svd`.
        known_residual_energy: `||residual||_F^2`, if it is a by-product.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Matrix
    path: str
    known_residual_energy: float | None = None

    @cached_property
    def residual_energy(self) -> float:
        """`||residual||_F^2`; if not yet known, the first access costs two Gram matrices."""
        if self.known_residual_energy is not None:
            return self.known_residual_energy
        return norm(self.residual) ** 2

    @property
    def energy(self) -> float:
        """`||sum_i w_i B_i A_i||_F^2`."""
        return float(self.S.square().sum()) + self.residual_energy


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions `W V = (B X)(Y^T A)` of a factored sum `B A` of rank R.

    Attributes:
        X: `(R, m)`, float64.
        Y: `(R, m)`, float64, with `Y^T X = I`.
        W: `(out, m)`, `B X`: columns of any length, orthogonal up to round-off.
        V: `(m, in)`, `Y^T A`: rows of any length, orthogonal up to round-off.
    """

    X: Tensor
    Y: Tensor
    W: Tensor
    V: Tensor


def deflate(
    total: LowRank,
    lengths: Tensor,
    directions: Directions,
    path: str,
    known_residual_energy: float | None = None,
) -> TruncatedSVD:
    """Return the SVD of the directions, and the sum without them as the residual.

    Args:
        total: `B A`, of rank R; its memory is reused for the residual.
        lengths: `(R,)`, the norms of the rows of A.
        directions: What to subtract.
        path: How the directions were computed.
        known_residual_energy: `||residual||_F^2`, if it is known.
    """
    U, S, Vh = _orthonormalize(directions.W, directions.V)
    residual = _subtract(
        total,
        lengths.to(CORE_DTYPE),
        directions.Y,
        directions.X.to(total.dtype),
        directions.V.to(total.dtype),
    )
    return TruncatedSVD(U, S, Vh, residual, path, known_residual_energy)


def product(left: Tensor, rows: Tensor) -> Tensor:
    """Return the product of `left` `(m, R)` and `rows` `(R, size)`, in the dtype of `left`.

    Rows of another dtype are cast a chunk at a time.
    """
    if left.dtype == rows.dtype:
        return left @ rows
    chunks = []
    for start in range(0, rows.shape[1], CHUNK_COLUMNS):
        chunks.append(left @ rows[:, start : start + CHUNK_COLUMNS].to(left.dtype))
    return torch.cat(chunks, dim=1)


def _orthonormalize(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of `W V`, `(out, m)` times `(m, in)`, by Cholesky decompositions.

    This is accurate because the columns of W and the rows of V are orthogonal up to round-off.
    """
    W = W.to(CORE_DTYPE)
    V = V.to(CORE_DTYPE)
    G_W = W.mT @ W
    G_V = V @ V.mT
    # Normalize to Gram matrices of unit vectors; w and v are the lengths.
    w = G_W.diagonal().sqrt()
    v = G_V.diagonal().sqrt()
    L_W = torch.linalg.cholesky(G_W / w / w[:, None])
    L_V = torch.linalg.cholesky(G_V / v / v[:, None])
    P, S, Qh = torch.linalg.svd(L_W.mT * w * v @ L_V)
    U = W @ (torch.linalg.solve_triangular(L_W.mT, P, upper=True) / w[:, None])
    Vh = (torch.linalg.solve_triangular(L_V, Qh, upper=False, left=False) / v) @ V
    return U, S, Vh


def _subtract(total: LowRank, lengths: Tensor, Y: Tensor, X: Tensor, V: Tensor) -> LowRank:
    r"""Return `B A - (B X)(Y^T A)` in `R - m` components instead of R.

    With `V = Y^T A` and `Y^T X = I`, `A' = A - X V` has `Y^T A' = 0`: m of its rows, K, are
    `-Y_K^-T Y_J^T A'_J` in terms of the others, J, so that

        B A' = (B_J - B_K Y_K^-T Y_J^T)(A_J - X_J V).

    K are the last rows if that keeps `Y_K^-T Y_J^T` small; otherwise the pivot rows of Gaussian
    elimination on Y with partial pivoting. Both apply to rows of A scaled to unit length. The
    result reuses the memory of `total`: allocating costs as much as the product.
    """
    keep = total.rank - Y.shape[1]
    Y = Y * lengths[:, None]
    T, singular = torch.linalg.solve_ex(Y[keep:].mT, Y[:keep].mT)  # (m, R - m)
    is_small = float(torch.linalg.vector_norm(T)) <= MAX_ROUNDOFF_GROWTH * keep**0.5
    if not int(singular) and is_small:
        T = lengths[keep:, None] * T / lengths[:keep]
        B_K = total.B[:, keep:]
    else:
        K, J = _pivot_rows(Y)
        T = lengths[K, None] * torch.linalg.solve(Y[K].mT, Y[J].mT) / lengths[J]
        B_K = total.B[:, K]
        # Rows of J beyond `keep` replace pivots.
        is_moved = J != torch.arange(keep, device=J.device)
        for factor in (total.B.mT, total.A, X):
            factor[:keep][is_moved] = factor[J[is_moved]]
    B = total.B[:, :keep].addmm_(B_K, T.to(total.dtype), alpha=-1)
    A = total.A[:keep].addmm_(X[:keep], V, alpha=-1)
    return LowRank(B, A)


def _pivot_rows(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of Y `(R, m)` that Gaussian elimination picks as pivots, and the others.

    The others are `0, ..., R - m - 1`, except that pivots among these are replaced by non-pivot
    rows from beyond that range.
    """
    R, m = Y.shape
    order = list(range(R))
    for i, pivot in enumerate(torch.linalg.lu_factor(Y).pivots.tolist()):
        order[i], order[pivot - 1] = order[pivot - 1], order[i]
    keep = R - m
    pivots = set(order[:m])
    replacements = iter([row for row in range(keep, R) if row not in pivots])
    others = []
    for row in range(keep):
        others.append(next(replacements) if row in pivots else row)
    return torch.tensor(order[:m], device=Y.device), torch.tensor(others, device=Y.device)
