"""How `U S V^T` is shared between B and A: the gauge. B A is the same for each; training is not. torch only.

All tensors are float64: U `(out, m)`, S `(m,)` positive and descending, Vh `(m, in)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmomentum.lowrank import LowRank

# A condition above this says that the clients' mean A is no basis for the kept row space: adapters that had a
# common start measured 1.2, adapters that had none up to 1000.
MAX_CONDITION = 100.0
# A spare row below this share of LoRA's own scale is as good as zero, and is drawn anew.
MIN_SPARE_NORM = 1e-3


def balanced_split(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """`B = U S^1/2`, `A = S^1/2 V^T`: both factors of equal norm (arXiv 2603.08014)."""
    root = S.sqrt()
    return U * root, root[:, None] * Vh


def singular_split(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """`B = U S`, `A = V^T`: the rows of A have unit length."""
    return U * S, Vh


def aligned_split(U: Tensor, S: Tensor, Vh: Tensor, *, mean_A: Tensor) -> tuple[Tensor, Tensor, bool]:
    r"""`G = mean_A V`, `A = G V^T`, `B = U S G^-1`: A stays the clients' mean A, seen in the kept row space.

    Where `G` is singular or its condition passes `MAX_CONDITION`, the balanced split is rotated towards
    `mean_A` instead: `O = argmin ||O S^1/2 V^T - mean_A||_F` over orthogonal O (Procrustes),
    `A = O S^1/2 V^T`, `B = U S^1/2 O^T`. With fewer kept directions than rows of `mean_A`, the leading rows
    are the ones to align with.

    Args:
        U: `(out, m)`.
        S: `(m,)`.
        Vh: `(m, in)`.
        mean_A: `(rank, in)`, the clients' weighted mean A, rank >= m.

    Returns:
        B `(out, m)`, A `(m, in)`, and whether the aligned gauge was used (False: the fallback).
    """
    keep = len(S)
    if keep == 0:
        return U, Vh, True
    G = mean_A[:keep] @ Vh.mT  # (m, m)
    spectrum = torch.linalg.svdvals(G)
    if float(spectrum[-1]) * MAX_CONDITION > float(spectrum[0]):
        return torch.linalg.solve(G, U * S, left=False), G @ Vh, True
    B, A = balanced_split(U, S, Vh)
    X, _, Yh = torch.linalg.svd(mean_A[:keep] @ A.mT)
    rotation = X @ Yh  # (m, m), orthogonal
    return B @ rotation.mT, rotation @ A, False


def mean_rows(updates: Sequence[LowRank], weights: Tensor, rank: int) -> Tensor:
    """`sum_i w_i A_i` `(rank, in)`; rows that a smaller client lacks count as zero, rows beyond are left out."""
    mean = torch.zeros(rank, updates[0].shape[1], dtype=torch.float64, device=updates[0].device)
    for w_i, update in zip(weights.tolist(), updates, strict=True):
        rows = min(rank, update.rank)
        mean[:rows] += w_i * update.A[:rows].to(torch.float64)
    return mean


def with_spares(
    B: Tensor, A: Tensor, Vh: Tensor, *, rank: int, reference: LowRank | None, generator: torch.Generator | None
) -> LowRank:
    """The factors of `m` kept directions at full `rank`: spare rows of A are alive, spare columns of B are zero.

    A direction that is zero in both factors would never train again.
    """
    spare = rank - len(Vh)
    if spare:
        generator = generator or torch.Generator().manual_seed(0)
        A = torch.cat([A, spare_rows(Vh, spare, reference, generator)])
        B = torch.cat([B, B.new_zeros(len(B), spare)], dim=1)
    return LowRank(B, A)


def spare_rows(Vh: Tensor, count: int, reference: LowRank | None, generator: torch.Generator) -> Tensor:
    """`count` rows of A for directions that hold nothing: alive (not zero), and orthogonal to the kept rows.

    The previous A's row space projected off the kept one, strongest directions first; where that is empty,
    random rows at the scale of LoRA's own initialisation (uniform in +-1/sqrt(in)), projected likewise.

    Args:
        Vh: `(m, in)` orthonormal rows that are kept.
        count: how many spare rows are wanted, `m + count <= in`.
        reference: the adapter the clients were sent, if any.
        generator: draws the random rows.

    Returns:
        `(count, in)` rows.
    """
    in_size = Vh.shape[1]
    rows = Vh.new_zeros(0, in_size)
    if reference is not None and reference.rank:
        left = _project_off(reference.A.to(Vh.dtype), Vh)
        _, S, rows = torch.linalg.svd(left, full_matrices=False)
        alive = min(count, int((MIN_SPARE_NORM / math.sqrt(3) < S).sum()))  # 1/sqrt(3): a LoRA row's norm
        rows = S[:alive, None] * rows[:alive]
    if len(rows) < count:
        shape = (count - len(rows), in_size)
        draw = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        draw = (draw * 2 - 1) / math.sqrt(in_size)
        directions = torch.cat([Vh, torch.nn.functional.normalize(rows, dim=1)])
        rows = torch.cat([rows, _project_off(draw.to(Vh.device), directions)])
    return rows


def _project_off(rows: Tensor, orthonormal: Tensor) -> Tensor:
    """`rows` minus their part in the span of the orthonormal rows; twice, for the digits."""
    for _ in range(2):
        rows = rows - rows @ orthonormal.mT @ orthonormal
    return rows
