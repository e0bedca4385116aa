"""Matrices in the smaller of two forms, stacked factors or one dense matrix, and sequences of them.

A sum of total rank R has `(d + k) R` elements as factors and `d k` as a dense matrix. So the size
of a sum, and of anything computed from it, is bounded however many matrices there are. Matrices are
read one at a time, in the given order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, weighted_sum

Matrix = LowRank | Tensor
"""A matrix as two factors, or dense."""
Item = TypeVar("Item")

# Number of factor columns multiplied at a time: enough for a fast product; 38 MB for a
# 14336 x 4096 matrix.
BLOCK_COLUMNS = 256


class LazySequence(Sequence[LowRank]):
    """`make(item)` for each item, computed on lookup and not cached.

    Meant for factors that are read from disk one at a time.

    Args:
        make: Returns the matrix of an item.
        items: What the matrices are made from.
    """

    def __init__(self, make: Callable[[Item], LowRank], items: Sequence[Item]) -> None:
        self._make: Callable[[int], LowRank] = lambda index: make(items[index])
        self._len = len(items)

    def __len__(self) -> int:
        return self._len

    @overload
    def __getitem__(self, index: int) -> LowRank: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LowRank]: ...
    def __getitem__(self, index: int | slice) -> LowRank | Sequence[LowRank]:
        if isinstance(index, slice):
            return LazySequence(self._make, range(self._len)[index])
        if index >= self._len:
            raise IndexError(index)
        return self._make(index)


def add_dense_(total: Tensor, matrix: Tensor) -> Tensor:
    """Add `matrix` to `total` in place, row by row.

    If the dtypes differ, adding at once would make torch copy the whole matrix first.
    """
    for total_row, row in zip(total, matrix, strict=True):
        total_row += row
    return total


def add_to_weight_(weight: Tensor, matrix: Matrix) -> None:
    """Add a matrix to a live weight `(out, in)` in place, on its device and in its dtype.

    A factored matrix is added in `2 out in rank` operations, without allocating a second matrix of
    the weight's size.
    """
    if isinstance(matrix, LowRank):
        weight.addmm_(matrix.B.to(weight.device), matrix.A.to(weight.device))
    else:
        weight += matrix.to(weight.device)


def stacked_blocks(
    matrices: Sequence[LowRank], dtype: torch.dtype = CORE_DTYPE
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the stacked factors of a few consecutive matrices at a time.

    Yields:
        The index of the matrix that each column belongs to `(R,)`, B `(out, R)` and A `(R, in)` in
        `dtype`, with R at least `BLOCK_COLUMNS` except in the last block.
    """
    owners: list[int] = []
    block: list[LowRank] = []
    for i, matrix in enumerate(matrices):
        if matrix.rank:
            owners += [i] * matrix.rank
            block.append(matrix)
        is_last = i == len(matrices) - 1
        if block and (is_last or len(owners) >= BLOCK_COLUMNS):
            B = torch.cat([m.B for m in block], dim=1).to(dtype)
            A = torch.cat([m.A for m in block], dim=0).to(dtype)
            owners_of_columns = torch.tensor(owners, device=B.device)
            owners = []
            block = []
            yield owners_of_columns, B, A


def inner(left: Matrix, right: Matrix, dtype: torch.dtype = CORE_DTYPE) -> float:
    """Return the Frobenius inner product in float64, with products of factors in `dtype`."""
    if isinstance(left, LowRank):
        if isinstance(right, LowRank):
            return left.inner(right, dtype)
        return float(inner_products([left], right, dtype)[0])
    if isinstance(right, LowRank):
        return float(inner_products([right], left, dtype)[0])
    total = 0.0
    for left_row, right_row in zip(left, right, strict=True):
        total += float(torch.dot(left_row.to(CORE_DTYPE), right_row.to(CORE_DTYPE)))
    return total


def inner_products(
    matrices: Sequence[LowRank], other: Matrix, dtype: torch.dtype = CORE_DTYPE
) -> Tensor:
    """Compute the Frobenius inner product of each of n matrices with `other`.

    `<B A, B' A'> = sum((B^T B') * (A A'^T))`, and `<B A, D> = sum(B * (D A^T))` for a dense D.

    Args:
        matrices: N matrices, read one block at a time.
        other: A matrix of the same shape.
        dtype: The dtype for the products.

    Returns:
        `(n,)`, float64, on the CPU.
    """
    result = torch.zeros(len(matrices), dtype=CORE_DTYPE, device="cpu")
    other = other.to(dtype)
    for owners, B, A in stacked_blocks(matrices, dtype):
        if isinstance(other, LowRank):
            columns = ((B.mT @ other.B) * (A @ other.A.mT)).sum(1, dtype=CORE_DTYPE)
        else:
            columns = (B * (other @ A.mT)).sum(0, dtype=CORE_DTYPE)
        result.index_add_(0, owners.cpu(), columns.cpu())
    return result


def matvec(matrix: Matrix, x: Tensor) -> Tensor:
    """Return `matrix x` for a vector x `(in,)`, in the dtype of x; a dense matrix is not cast."""
    if isinstance(matrix, LowRank):
        return matrix.B.to(x) @ (matrix.A.to(x) @ x)
    return (matrix @ x.to(matrix)).to(x)


def norm(matrix: Matrix, dtype: torch.dtype = CORE_DTYPE) -> float:
    """Return the Frobenius norm; `dtype` applies to factors, as in `LowRank.norm`."""
    if isinstance(matrix, LowRank):
        return matrix.norm(dtype)
    return float(torch.linalg.vector_norm(matrix, dtype=CORE_DTYPE))


def to_dense(matrix: Matrix) -> Tensor:
    """Return the dense `(out, in)` matrix."""
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


def rank_bound(matrix: Matrix) -> int:
    """Return an upper bound on the rank."""
    return matrix.rank if isinstance(matrix, LowRank) else min(matrix.shape)


def add(left: Matrix, right: Matrix) -> Matrix:
    """Return `left + right`: stacked in float64 if both are factored, else dense.

    A dense `left` is modified in place and returned; a dense `right` is copied in float64.
    """
    if isinstance(left, Tensor):
        if isinstance(right, LowRank):
            return left.addmm_(right.B.to(left), right.A.to(left))
        return add_dense_(left, right)
    if isinstance(right, Tensor):
        return add(right.to(CORE_DTYPE, copy=True), left)
    return weighted_sum([left, right], [1.0, 1.0])


def scale(matrix: Matrix, factor: float, dtype: torch.dtype) -> Matrix:
    """Return `factor * matrix`, cast to `dtype`."""
    if isinstance(matrix, LowRank):
        return matrix.scaled(factor).to(dtype)
    return (matrix * factor if factor != 1 else matrix).to(dtype)
