"""Exact weighted sums of many matrices, factored or dense, whichever is smaller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, weighted_sum
from fedmomentum.linalg.matrix import Matrix, add_dense_, stacked_blocks

# Number of elements of a row summed for its hash; rows with different sums are not equal.
HASH_COLUMNS = 64
# Hashes of equal rows may differ by this fraction if summed in a different order.
HASH_TOLERANCE = 1e-5


def exact_sum(
    matrices: Sequence[LowRank],
    weights: Sequence[float] | Tensor,
    extra: Sequence[Matrix] = (),
    *,
    dtype: torch.dtype = CORE_DTYPE,
) -> Matrix:
    r"""Compute `sum_i w_i B_i A_i` plus the matrices in `extra`, in the smaller form.

    That is, as stacked factors if `R (d + k) < d k` for the sum of ranks R, else dense in float64.

    Args:
        matrices: N matrices of the same shape, each looked up twice: for its rank, and to be added.
        weights: N finite numbers.
        extra: More matrices of that shape, each with weight 1. A dense one makes the sum dense.
        dtype: The dtype of stacked factors; a dense sum is accumulated in float64.

    Raises:
        ValueError: If there are no matrices, shapes differ, or there is not one weight per matrix.
    """
    weights = [float(w) for w in weights]
    if not matrices and not extra:
        raise ValueError("no matrices to sum")
    if len(matrices) != len(weights):
        raise ValueError(
            f"one weight per matrix: got {len(matrices)} matrices, {len(weights)} weights"
        )
    first = matrices[0] if matrices else extra[0]
    out_size, in_size = first.shape
    rank = _sum_of_ranks(matrices, (out_size, in_size))
    rank += _sum_of_ranks(extra, (out_size, in_size))
    factored = [matrix for matrix in extra if isinstance(matrix, LowRank)]
    ones = [1.0] * len(factored)
    if len(factored) == len(extra) and rank * (out_size + in_size) < out_size * in_size:
        return weighted_sum([*matrices, *factored], weights + ones, dtype=dtype)

    total = torch.zeros(out_size, in_size, dtype=CORE_DTYPE, device=first.device)
    _add_products_(total, matrices, weights)
    _add_products_(total, factored, ones)
    for matrix in extra:
        if isinstance(matrix, Tensor):
            add_dense_(total, matrix)
    return total


def _sum_of_ranks(matrices: Sequence[Matrix], shape: tuple[int, int]) -> int:
    """Sum the ranks of the factored matrices, and check that all have the given shape."""
    rank = 0
    for matrix in matrices:
        if tuple(matrix.shape) != shape:
            raise ValueError(
                f"a sum of a {shape[0]} x {shape[1]} matrix and one of {tuple(matrix.shape)}"
            )
        if isinstance(matrix, LowRank):
            rank += matrix.rank
    return rank


def _add_products_(total: Tensor, matrices: Sequence[LowRank], weights: Sequence[float]) -> None:
    """Add `sum_i w_i B_i A_i` to a dense `total` in place."""
    scales = torch.tensor(weights, dtype=CORE_DTYPE, device=total.device)
    for owners, B, A in stacked_blocks(matrices):
        B *= scales[owners]
        total.addmm_(B, A)


def deduplicate_rows(total: LowRank) -> LowRank:
    """Return the same matrix without components that are zero or share a factor with another.

    Components whose rows of A, or columns of B, are bitwise equal are merged. Such components come
    from modules that several clients leave unchanged, and from tails that clients keep. If there
    are none, `total` itself is returned.
    """
    total = _merge_equal_rows(total)
    transposed = LowRank(total.A.mT, total.B.mT)
    merged = _merge_equal_rows(transposed)
    return total if merged is transposed else LowRank(merged.A.mT, merged.B.mT)


def _merge_equal_rows(total: LowRank) -> LowRank:
    """Sum the columns of B over equal rows of A, and drop zero rows."""
    representative = _representatives(total.A)
    if representative is None:
        return total
    is_nonzero = representative >= 0
    rows, place = torch.unique(representative[is_nonzero], return_inverse=True)
    B = torch.zeros(len(total.B), len(rows), dtype=total.dtype, device=total.device)
    B.index_add_(1, place, total.B[:, is_nonzero])
    return LowRank(B, total.A[rows].contiguous())


def _representatives(rows: Tensor) -> Tensor | None:
    """Return for each of n rows the index of a row equal to it, the same one for all equal rows.

    Equal rows have equal hashes, so it suffices to compare neighbors after sorting by hash.

    Returns:
        `(n,)`, -1 for a row of zeros; None if all rows differ and none is zero.
    """
    # The usual case: the rows' first elements already all differ, and none is zero.
    first_elements = rows[:, 0].tolist()
    if len({*first_elements, 0.0}) > len(first_elements):
        return None
    hashes, order = rows[:, :HASH_COLUMNS].sum(1).sort()
    is_close = hashes.diff().abs() <= HASH_TOLERANCE * hashes.abs()[1:]
    close = is_close.nonzero()[:, 0]
    equal = close[(rows[order[close]] == rows[order[close + 1]]).all(1)]
    zero = order[(hashes == 0).nonzero()[:, 0]]
    zero = zero[~rows[zero].any(1)]
    if not len(equal) and not len(zero):
        return None
    # A run of equal rows starts at the last position that does not continue another run.
    start = torch.arange(len(order), device=order.device)
    start[equal + 1] = 0
    representative = torch.empty_like(order)
    representative[order] = order[start.cummax(0).values]
    representative[zero] = -1
    return representative
