"""The leading singular directions of a dense sum, by subspace iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank
from fedmomentum.linalg.matrix import Matrix, norm

# If the shorter side of a dense matrix is at most this, a full SVD takes only a fraction of a
# second, so all directions are computed.
MAX_FULL_SVD_SIDE = 512
MAX_ITERATIONS = 100
# The iteration has converged when a sweep adds less than this fraction of the remaining energy. The
# error is then within 1.0001 times the best, even if each sweep gains 0.99 times as much as the
# previous one.
CONVERGENCE_TOL = 1e-6


def dense_truncated_svd(
    matrix: Matrix,
    rank: int,
    generator: torch.Generator,
    *,
    energy: float = 0.0,
    near: LowRank | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the leading singular directions and the remainder, or all directions if cheap.

    The leading directions of a dense matrix D are computed by subspace iteration, `Q = qr(D X)`,
    `X = D^T Q`, in float64, until the sum of the leading squared singular values stops growing;
    `O(d k rank)` per sweep. All directions are computed if the matrix is factored or small, or if a
    large part of all directions is requested.

    Args:
        matrix: `(out, in)`. The memory of a dense matrix is reused for the remainder.
        rank: Minimum number of directions, below both sides.
        generator: Samples the start of the iteration.
        energy: More than `rank` directions are computed if the first `rank` hold less than this
            fraction of the squared norm.
        near: A matrix whose row space is close to the leading one, which saves sweeps.

    Returns:
        U `(out, m)`, S `(m,)` descending, Vh `(m, in)`, float64, and `D - U S Vh`, or None if all
        directions were computed.

    Source:
        Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    if isinstance(matrix, LowRank):
        return *matrix.svd(), None
    matrix_energy = norm(matrix) ** 2
    shortest = min(matrix.shape)
    while shortest > MAX_FULL_SVD_SIDE:
        width = rank + max(8, rank // 4)
        # Iterating on more than a quarter of all directions costs as much as the full SVD.
        if 4 * width >= shortest:
            break
        start = _start(matrix, width, generator, near)
        U, S, Vh = _iterate(matrix, rank, start, matrix_energy)
        if float(S.square().sum()) >= energy * matrix_energy:
            return U, S, Vh, matrix.addmm_(U * S, Vh, alpha=-1)
        rank *= 2
    return *torch.linalg.svd(matrix, full_matrices=False), None


def _start(D: Tensor, width: int, generator: torch.Generator, near: LowRank | None) -> Tensor:
    """Return `(in, width)` Gaussian columns, the first ones replaced by the rows of `near.A`."""
    X = torch.randn(
        D.shape[1], width, generator=generator, dtype=CORE_DTYPE, device=generator.device
    ).to(D.device)
    if near is not None:
        X[:, : min(width, near.rank)] = near.A[:width].mT
    return X


def _iterate(
    D: Tensor, rank: int, X: Tensor, matrix_energy: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run subspace iteration on the columns of X, and return the leading `rank` directions."""
    energy = -1.0
    for _ in range(MAX_ITERATIONS):
        Q = torch.linalg.qr(D @ X).Q  # (out, width)
        X, R = torch.linalg.qr(D.mT @ Q)  # (in, width), (width, width)
        U, S, Vh = torch.linalg.svd(R.mT)  # Q^T D = R^T X^T
        previous_energy = energy
        energy = float(S[:rank].square().sum())
        if energy - previous_energy <= CONVERGENCE_TOL * (matrix_energy - energy):
            break
    return Q @ U[:, :rank], S[:rank], Vh[:rank] @ X.mT
