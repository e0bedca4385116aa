"""How `U S V^T` is split into B and A: the gauge, which affects training but not the product.

All tensors are float64: U `(out, m)`, S `(m,)` positive and descending, Vh `(m, in)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import LowRank

# Above this condition number, the clients' mean A is not a usable basis of the kept row space:
# adapters with a common start measured 1.2, adapters without one up to 1000.
MAX_CONDITION = 100.0
# The norm of a row of A in LoRA's own initialization, which is uniform in +-1/sqrt(in).
LORA_ROW_NORM = 1 / math.sqrt(3)
# A row shorter than this fraction of that norm is practically zero, and is replaced.
MIN_RELATIVE_NORM = 1e-3


def balanced_split(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return `B = U S^1/2`, `A = S^1/2 V^T`: factors of equal norm (arXiv 2603.08014)."""
    root = S.sqrt()
    return U * root, root[:, None] * Vh


def singular_split(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return `B = U S`, `A = V^T`: the rows of A have unit length."""
    return U * S, Vh


def aligned_split(
    U: Tensor, S: Tensor, Vh: Tensor, *, mean_A: Tensor
) -> tuple[Tensor, Tensor, bool]:
    r"""Return `A = G V^T`, `B = U S G^-1` with `G = mean_A V`: the mean A in the kept row space.

    If `G` is singular or its condition exceeds `MAX_CONDITION`, the balanced split is rotated
    toward `mean_A` instead: `O = argmin ||O S^1/2 V^T - mean_A||_F` over orthogonal O
    (Procrustes), `A = O S^1/2 V^T`, `B = U S^1/2 O^T`. With fewer kept directions than rows of
    `mean_A`, the factors are aligned with its leading rows.

    Args:
        U: `(out, m)`.
        S: `(m,)`.
        Vh: `(m, in)`.
        mean_A: `(rank, in)`, the clients' weighted mean A, rank >= m.

    Returns:
        B `(out, m)`, A `(m, in)`, and whether they are aligned (False: the fallback).
    """
    m = len(S)
    if m == 0:
        return U, Vh, True
    G = mean_A[:m] @ Vh.mT  # (m, m)
    spectrum = torch.linalg.svdvals(G)
    if float(spectrum[-1]) * MAX_CONDITION > float(spectrum[0]):
        return torch.linalg.solve(G, U * S, left=False), G @ Vh, True
    # Procrustes: the rotation nearest to a matrix is U V^T of its SVD.
    B, A = balanced_split(U, S, Vh)
    X, _, Yh = torch.linalg.svd(mean_A[:m] @ A.mT)
    rotation = X @ Yh  # (m, m), orthogonal
    return B @ rotation.mT, rotation @ A, False


def procrustes_split(
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    mean: LowRank,
    *,
    reference: LowRank | None,
    generator: torch.Generator,
) -> LowRank:
    r"""Return the balanced split, rotated toward the clients' mean factors.

    With `X = U S^1/2`, `Y = S^1/2 V^T` and the mean factors `B_m`, `A_m` of rank r::

        B = X O^T,  A = O Y,  O = argmin ||O Y - A_m||_F^2 + ||X O^T - B_m||_F^2

    over `(r, m)` matrices with orthonormal columns; the minimum is `O = Q P^T` where
    `P Sigma Q^T = svd(Y A_m^T + X^T B_m)`. The product is that of the balanced split, and each row
    of A stays close to the row that the clients trained, so optimizer moments remain meaningful.
    With fewer directions than rows, the r - m combinations of rows that O leaves out are filled as
    in `pad_rank`.

    Args:
        U: `(out, m)`.
        S: `(m,)`.
        Vh: `(m, in)`.
        mean: The clients' weighted mean factors, of rank r >= m.
        reference: The adapter that the clients started from, if any.
        generator: Samples spare rows.

    Returns:
        The factors, of rank r.
    """
    X, Y = balanced_split(U, S, Vh)
    m = len(S)
    alignment = Y @ mean.A.mT + X.mT @ mean.B  # (m, r)
    # The nearest matrix with orthonormal columns, from the SVD of the alignment.
    P, _, Qh = torch.linalg.svd(alignment, full_matrices=True)
    rotation = Qh.mT[:, :m] @ P.mT  # (r, m)
    B = X @ rotation.mT
    A = rotation @ Y
    num_spare = mean.rank - m
    if num_spare:
        # These combinations are zero in B; if they were zero in A too, they would never train.
        A = A + Qh.mT[:, m:] @ fill_rows(Vh, num_spare, reference, generator)
    return LowRank(B, A)


def pad_rank(
    B: Tensor,
    A: Tensor,
    Vh: Tensor,
    *,
    rank: int,
    reference: LowRank | None,
    generator: torch.Generator,
) -> LowRank:
    """Pad the factors of m kept directions to `rank`, with zeros in B but not in A.

    Spare rows of A come from `fill_rows`: a direction that is zero in both factors would never
    train again.

    Args:
        B: `(out, m)`.
        A: `(m, in)`.
        Vh: `(m, in)`, orthonormal rows that span the rows of A.
        rank: The rank of the result, at least m.
        reference: The adapter that the clients started from, if any.
        generator: Samples rows where the reference has none.
    """
    num_spare = rank - len(Vh)
    if num_spare:
        A = torch.cat([A, fill_rows(Vh, num_spare, reference, generator)])
        B = torch.cat([B, B.new_zeros(len(B), num_spare)], dim=1)
    return LowRank(B, A)


def fill_rows(
    Vh: Tensor, count: int, reference: LowRank | None, generator: torch.Generator
) -> Tensor:
    """Return rows of A for directions that are zero in B.

    They are nonzero and orthogonal to the kept rows: first the strongest directions of the previous
    A with the kept row space projected out; once these run out, random rows at the scale of LoRA's
    own initialization (uniform in +-1/sqrt(in)), with the same projection.

    Args:
        Vh: `(m, in)`, the kept rows, orthonormal.
        count: How many rows are needed, `m + count <= in`.
        reference: The adapter that the clients started from, if any.
        generator: Samples the random rows.

    Returns:
        `(count, in)` rows.
    """
    in_size = Vh.shape[1]
    rows = Vh.new_zeros(0, in_size)
    if reference is not None and reference.rank:
        previous = _project_off(reference.A.to(Vh.dtype), Vh)
        _, S, rows = torch.linalg.svd(previous, full_matrices=False)
        num_usable = min(count, int((S > MIN_RELATIVE_NORM * LORA_ROW_NORM).sum()))
        rows = S[:num_usable, None] * rows[:num_usable]
    # If the previous A has too few directions left, use LoRA's own initialization.
    if len(rows) < count:
        shape = (count - len(rows), in_size)
        uniform = torch.rand(
            shape, generator=generator, dtype=torch.float64, device=generator.device
        )
        random_rows = (uniform * 2 - 1) / math.sqrt(in_size)
        directions = torch.cat([Vh, torch.nn.functional.normalize(rows, dim=1)])
        rows = torch.cat([rows, _project_off(random_rows.to(Vh.device), directions)])
    return rows


def _project_off(rows: Tensor, orthonormal: Tensor) -> Tensor:
    """Return `rows` minus their projection onto the span of the orthonormal rows.

    Projects twice: the first pass leaves round-off relative to the original length of the rows.
    """
    for _ in range(2):
        rows = rows - rows @ orthonormal.mT @ orthonormal
    return rows
