"""Spectra and subspaces of low-rank matrices: principal angles, randomized SVD, relative errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, difference, numerical_rank


def relative_error(actual: LowRank, expected: LowRank) -> float:
    """Return `||actual - expected||_F / ||expected||_F`.

    Infinite if only `expected` is zero, 0 if both are.
    """
    error = difference(actual, expected).norm()
    size = expected.norm()
    if size > 0:
        return error / size
    return 0.0 if error == 0 else math.inf


def randomized_svd(
    matrix: LowRank | Tensor, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the published randomized SVD of the dense sum, for comparison.

    `LowRank.svd` is exact and faster. Here `Delta` is formed densely in float32 and sketched by a
    Gaussian `Omega (in, width)` without power iteration, `Q = qr(Delta Omega)`, and `Q^T Delta` is
    decomposed. With `width >= rank(Delta)` it is exact up to float32 round-off.

    Args:
        matrix: The matrix `Delta`, `(out, in)`, factored or dense.
        width: Columns of the sketch; the paper uses the sum of the clients' ranks.
        generator: Samples `Omega`.

    Returns:
        U `(out, m)`, S `(m,)`, Vh `(m, in)` in float64, `m = min(width, out, in)`.

    Source:
        FedMomentum, arXiv 2603.08014, aggregation step; Halko, Martinsson, Tropp, arXiv 0909.4061,
        algorithm 4.1.
    """
    delta = matrix.to(torch.float32)
    if isinstance(delta, LowRank):
        delta = delta.dense()
    in_size = matrix.shape[1]
    width = min(width, *matrix.shape)
    omega = torch.randn(in_size, width, generator=generator, dtype=torch.float32).to(delta.device)
    Q = torch.linalg.qr(delta @ omega).Q  # (out, width)
    U, S, Vh = torch.linalg.svd(Q.mT @ delta, full_matrices=False)
    return (Q @ U).to(CORE_DTYPE), S.to(CORE_DTYPE), Vh.to(CORE_DTYPE)


def principal_angles(left: LowRank, right: LowRank) -> tuple[Tensor, Tensor]:
    """Compute the angles between the row spaces, and between the column spaces, of two matrices.

    The spaces are those of the numerically non-zero directions; the angles are those of
    `scipy.linalg.subspace_angles`, in ascending order.

    Returns:
        The angles of the row spaces and of the column spaces, each `(min(rank, rank'),)`, in
        radians, in [0, pi/2], float64.

    Source:
        Björck, Golub, Numerical methods for computing angles between linear subspaces, 1973;
        Knyazev, Argentati, SIAM J. Sci. Comput. 23, 2002: use sines below 45 degrees, where cosines
        lose digits.
    """
    columns, rows = _orthonormal_bases(left)
    other_columns, other_rows = _orthonormal_bases(right)
    return _angles(rows, other_rows), _angles(columns, other_columns)


def _orthonormal_bases(matrix: LowRank) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns that span the column space, and others that span the row space."""
    if 0 < matrix.rank < min(matrix.shape):
        Q_b, R_b = torch.linalg.qr(matrix.B.to(CORE_DTYPE))
        Q_a, R_a = torch.linalg.qr(matrix.A.mT.to(CORE_DTYPE))
        S = torch.linalg.svdvals(R_b @ R_a.mT)
        # If the product has full rank, so does each factor, and its Q is a basis.
        if numerical_rank(S, matrix.shape) == matrix.rank:
            return Q_b, Q_a
    U, S, Vh = matrix.svd()
    keep = numerical_rank(S, matrix.shape)
    return U[:, :keep], Vh[:keep].mT


def _angles(P: Tensor, Q: Tensor) -> Tensor:
    """Return the angles between the spans of orthonormal columns P and Q."""
    if P.shape[1] < Q.shape[1]:
        P, Q = Q, P
    projection = P.mT @ Q
    cosines = torch.linalg.svdvals(projection).clamp(max=1)
    sines = torch.linalg.svdvals(Q - P @ projection).clamp(max=1).flip(0)
    return torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())
