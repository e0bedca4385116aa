"""The leading directions of a factored sum from Gram matrices, for well-conditioned factors."""

from __future__ import annotations

import math
from collections.abc import Callable
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

# Product of the factors' norms over the norm of their product: beyond this ratio, terms cancel and
# float32 loses digits of the sum.
MAX_CANCELLATION = 16.0
# Power iteration underestimates a norm: its steps and columns, and the factor to correct for it.
POWER_ITERATIONS = 4
POWER_COLUMNS = 8
SAFETY_FACTOR = 2.0
# Squared norms between the inverse of this and this are far from where float32 loses digits ...
MAX_SQUARED_NORM = 1e64
# ... and so are Gram matrices whose largest diagonal element is in this range for their dtype.
MAX_DIAGONAL = {torch.float32: 1e24, torch.float64: 1e200}


def gram_truncated_svd(total: LowRank, rank: int, dtype: torch.dtype) -> TruncatedSVD | None:
    """Compute the leading directions of `total = B A` from R x R Gram matrices.

    `A A^T = L L^T`, `L^T (B^T B) L = Z diag(S^2) Z^T`, all R x R; `U S = B L Z_r`,
    `V^T = Z_r^T L^-1 A`. `O((d + k) R^2 + R^3)`, and `O((d + k) R r)` for the residual.

    The directions are those of a sum that differs from the true one by at most p, so that
    `||sum - U S V^T|| <= minimum error + 2 p`; they are accepted if `p <= RTOL * minimum error` or
    `p <= ATOL ||sum||`.

    Args:
        total: Float32 factors; their memory is reused if directions are returned.
        rank: Number of directions, below the rank of `total`.
        dtype: The dtype of the Gram matrices, float32 or float64.

    Returns:
        The SVD, or None if the bound does not hold in `dtype`.

    Source:
        Fukaya et al., Shifted Cholesky QR, arXiv 1809.11085, for the condition numbers that a Gram
        matrix can handle.
    """
    # Relative round-off of a Gram matrix, which accumulates like independent noise.
    roundoff = math.sqrt(total.rank) * torch.finfo(dtype).eps
    G_A = gram(total.A, dtype)
    if not _is_normal(G_A.diagonal(), MAX_SQUARED_NORM):
        return None
    A = _factorize(G_A)
    if not roundoff * A.condition <= RTOL:  # then p is too large whatever B is
        return None
    G_B = gram(total.B.mT, dtype)
    if not _is_normal(G_B.diagonal(), MAX_SQUARED_NORM):
        return None
    # Scale the rows of A to unit length, and multiply their lengths into B.
    G_B = G_B * A.lengths * A.lengths[:, None]
    B = _factorize(G_B)

    # Compare the perturbation p with the remaining energy and with the sum.
    energy = float((A.gram * G_B).sum(dtype=CORE_DTYPE))
    size = A.norm * B.norm * float(B.lengths.max())  # ||A|| ||B||
    p = roundoff * size * (A.condition + B.condition)
    norm = math.sqrt(max(energy, 0.0))
    if not p <= RTOL * norm or size > MAX_CANCELLATION * norm:
        return None
    squares, Z = torch.linalg.eigh(A.cholesky.mT @ G_B @ A.cholesky)  # ascending
    squares = squares[-rank:].flip(0).to(CORE_DTYPE).clamp(min=0)
    residual_energy = max(energy - float(squares.sum()), 0.0)
    if not p <= max(RTOL * math.sqrt(residual_energy), ATOL * norm):
        return None
    if numerical_rank(squares.sqrt(), total.shape) < rank:
        return None

    # U S = B X and V^T = Y^T A, with Y^T X = I.
    Z = torch.linalg.qr(Z[:, -rank:].flip(1).to(CORE_DTYPE)).Q  # (R, rank)
    L = A.cholesky.to(CORE_DTYPE)
    lengths = A.lengths[:, None].to(CORE_DTYPE)
    Y = torch.linalg.solve_triangular(L.mT, Z, upper=True) / lengths
    X = lengths * (L @ Z)
    W = product(X.mT.to(dtype), total.B.mT).mT
    V = product(Y.mT.to(dtype), total.A)
    path = "gram32" if dtype == torch.float32 else "gram64"
    return deflate(total, lengths[:, 0], Directions(X, Y, W, V), path, residual_energy)


class _FactorizedGram(NamedTuple):
    """The Gram matrix of some vectors scaled to unit length, `C = L L^T`.

    Attributes:
        gram: C.
        cholesky: L.
        lengths: The norms of the vectors before they were scaled.
        norm: Upper estimate of `sqrt(||C||)`, the norm of the matrix of unit vectors.
        condition: Upper estimate of its condition number `sqrt(||C|| ||C^-1||)`; infinite if C is
            singular.
    """

    gram: Tensor
    cholesky: Tensor
    lengths: Tensor
    norm: float
    condition: float


def _factorize(G: Tensor) -> _FactorizedGram:
    """Scale a Gram matrix to unit vectors, factorize it, and estimate its condition."""
    lengths = G.diagonal().sqrt()
    is_positive = bool((lengths > 0).all())
    if not is_positive or not _is_normal(G.diagonal(), MAX_DIAGONAL[G.dtype]):
        return _FactorizedGram(G, G, lengths, math.inf, math.inf)
    C = G / lengths / lengths[:, None]
    L, failed = torch.linalg.cholesky_ex(C)
    if int(failed):
        return _FactorizedGram(C, L, lengths, math.inf, math.inf)
    largest = _largest_eigenvalue(lambda x: C @ x, C)
    largest_of_inverse = _largest_eigenvalue(lambda x: torch.cholesky_solve(x, L), C)
    norm = SAFETY_FACTOR * math.sqrt(largest)
    condition = SAFETY_FACTOR * math.sqrt(largest * largest_of_inverse)
    return _FactorizedGram(C, L, lengths, norm, condition)


def _is_normal(squares: Tensor, limit: float) -> bool:
    """Return whether the largest of these squared norms is between `1 / limit` and `limit`."""
    return 1 / limit < float(squares.max()) < limit


def _largest_eigenvalue(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Underestimate the largest eigenvalue of a positive matrix, by block power iteration."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(len(like), POWER_COLUMNS, generator=generator, device="cpu")
    x = start.to(like)
    for _ in range(POWER_ITERATIONS):
        x = apply(x / torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x))
