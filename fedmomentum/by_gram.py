"""The leading directions of a factored sum by Gram matrices: for sums whose factors are well conditioned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedmomentum.deflation import FLOOR, MAX_CANCELLATION, SLACK, Leading, product, taken_out
from fedmomentum.lowrank import CORE_DTYPE, LowRank, gram, numerical_rank

# Power iteration finds a norm from below: its steps, and by how much it may be short.
POWERS = 4
SAFETY = 2.0


def by_gram(total: LowRank, rank: int, dtype: torch.dtype) -> Leading | None:
    """`leading` of `total = B A`, by Gram matrices in `dtype`: None where the bound does not hold in it.

    `A A^T = L L^T`, `L^T (B^T B) L = Z diag(S^2) Z^T`, all R x R; `U S = B L Z_r`, `V^T = Z_r^T L^-1 A`.
    `O((d + k) R^2 + R^3)`, and `O((d + k) R r)` for the rest.

    The directions are those of a sum that differs from the true one by at most p, so that
    `||sum - U S V^T|| <= best + 2 p`; they are taken where `p <= SLACK best` or `p <= FLOOR ||sum||`.

    Args:
        total: float32 factors, used up where directions are returned.
        rank: how many directions, below the rank of `total`.
        dtype: float32 or float64.

    Source:
        Fukaya et al., Shifted Cholesky QR, arXiv 1809.11085, for what a Gram matrix can bear.
    """
    eps = math.sqrt(total.rank) * torch.finfo(dtype).eps  # of a Gram matrix, relative: round-off adds like noise
    G_A = gram(total.A, dtype)
    if not _is_normal(G_A.diagonal()):
        return None
    of_A = _factored(G_A)
    G_A, L, sizes = of_A.C, of_A.L, of_A.sizes
    if not eps * of_A.condition <= SLACK:  # p cannot hold, whatever B is
        return None
    G_B = gram(total.B.mT, dtype)
    if not _is_normal(G_B.diagonal()):
        return None
    G_B = G_B * sizes * sizes[:, None]  # the rows of A are taken at unit length, and their lengths to B
    of_B = _factored(G_B)
    energy = float((G_A * G_B).sum(dtype=CORE_DTYPE))
    size = of_A.norm * of_B.norm * float(of_B.sizes.max())  # ||A|| ||B||
    p = eps * size * (of_A.condition + of_B.condition)
    if not p <= SLACK * math.sqrt(max(energy, 0.0)) or size > MAX_CANCELLATION * math.sqrt(energy):
        return None
    squares, Z = torch.linalg.eigh(L.mT @ G_B @ L)  # ascending
    squares = squares[-rank:].flip(0).to(CORE_DTYPE).clamp(min=0)
    left = max(energy - float(squares.sum()), 0.0)
    if not p <= max(SLACK * math.sqrt(left), FLOOR * math.sqrt(energy)):
        return None
    if numerical_rank(squares.sqrt(), total.shape) < rank:
        return None
    Z = torch.linalg.qr(Z[:, -rank:].flip(1).to(CORE_DTYPE)).Q  # (R, rank)
    L, sizes = L.to(CORE_DTYPE), sizes[:, None].to(CORE_DTYPE)
    Y = torch.linalg.solve_triangular(L.mT, Z, upper=True) / sizes  # V^T = Y^T A
    X = sizes * (L @ Z)  # U S = B X; Y^T X = I
    W, V = product(X.mT.to(dtype), total.B.mT).mT, product(Y.mT.to(dtype), total.A)
    path = "gram32" if dtype == torch.float32 else "gram64"
    return taken_out(total, sizes[:, 0], Y, X, W, V, path, left)


def _is_normal(squares: Tensor, reach: float = 1e64) -> bool:
    """Whether the greatest of these squared norms is far from where float32 numbers lose digits."""
    return 1 / reach < float(squares.max()) < reach


class _Factored(NamedTuple):
    """Of the Gram matrix of some factors at unit length: itself, `C = L L^T`, and the factors' lengths.

    `norm` and `condition` are those of the factors, `sqrt(||C||)` and `sqrt(||C|| ||C^-1||)`: by power iteration, and
    with `SAFETY` for what that underestimates. The condition is infinite where C is singular.
    """

    C: Tensor
    L: Tensor
    sizes: Tensor
    norm: float
    condition: float


def _factored(G: Tensor) -> _Factored:
    sizes = G.diagonal().sqrt()
    reach = 1e24 if G.dtype == torch.float32 else 1e200  # of the squares themselves
    if not _is_normal(G.diagonal(), reach) or not bool((sizes > 0).all()):
        return _Factored(G, G, sizes, math.inf, math.inf)
    C = G / sizes / sizes[:, None]
    L, failed = torch.linalg.cholesky_ex(C)
    if int(failed):
        return _Factored(C, L, sizes, math.inf, math.inf)
    top, inverse = _top(lambda x: C @ x, C), _top(lambda x: torch.cholesky_solve(x, L), C)
    return _Factored(C, L, sizes, SAFETY * math.sqrt(top), SAFETY * math.sqrt(top * inverse))


def _top(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The greatest eigenvalue of a positive matrix, from below: power iteration of a few columns at once."""
    drawn = torch.randn(len(like), 8, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    x = drawn.to(like)
    for _ in range(POWERS):
        x = apply(x / torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x))
