"""Sums of many low-rank matrices, of the size of the smaller of two forms: stacked factors, or one dense matrix.

A sum of total rank R has `(d + k) R` numbers in factors and `d k` as a matrix. So what a sum takes is bounded whatever
the number of matrices, and so is what is made from it. Matrices are read one after the other, in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor

from fedmomentum.lowrank import CORE_DTYPE, LowRank, weighted_sum

Matrix = LowRank | Tensor
"""A matrix as two factors, or dense."""
Item = TypeVar("Item")

BLOCK = 256
"""So many columns of factors are multiplied at once: enough for a fast product, and 38 MB at 14336 x 4096."""
SMALL = 512
"""Of a dense matrix with a side no longer than this all directions are found: that takes a fraction of a second."""
MAX_SWEEPS = 100
LOOK = 64
"""So many numbers of a row tell whether it may be equal to another."""
SETTLED = 1e-6
"""Directions are found when a sweep adds less than this share of the energy that is left out. The error is then within
1.0001 of the best even if each sweep gained 0.99 times what the one before it did."""


class Each(Sequence[LowRank]):
    """`make(item)` for each item, made when it is looked up and not kept: factors that are read from disk in turn."""

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
            return Each(self._make, range(self._len)[index])
        if index >= self._len:
            raise IndexError(index)
        return self._make(index)


def exact_sum(
    matrices: Sequence[LowRank],
    weights: Sequence[float] | Tensor,
    also: Sequence[Matrix] = (),
    *,
    dtype: torch.dtype = CORE_DTYPE,
) -> Matrix:
    r"""`sum_i w_i B_i A_i`, plus the matrices in `also`: stacked where `R (d + k) < d k`, else dense, in float64.

    Args:
        matrices: n matrices of one shape, each looked up twice: for its rank, and to be added.
        weights: n finite numbers.
        also: more matrices of that shape, each with factor 1. A dense one makes the sum dense.
        dtype: of stacked factors; a dense sum is added up in float64.

    Raises:
        ValueError: no matrices, shapes that differ, or another number of weights.
    """
    weights = [float(w) for w in weights]
    if not matrices and not also:
        raise ValueError("no matrices to sum")
    if len(matrices) != len(weights):
        raise ValueError(f"one weight a matrix: got {len(matrices)} matrices, {len(weights)} weights")
    first = matrices[0] if matrices else also[0]
    (out_size, in_size), device = first.shape, first.device
    factored, rank = [matrix for matrix in also if isinstance(matrix, LowRank)], 0
    for part in (matrices, also):
        for matrix in part:
            if tuple(matrix.shape) != (out_size, in_size):
                raise ValueError(f"a sum of a {out_size} x {in_size} matrix and one of {tuple(matrix.shape)}")
            rank += matrix.rank if isinstance(matrix, LowRank) else 0
    if len(factored) == len(also) and rank * (out_size + in_size) < out_size * in_size:
        return weighted_sum([*matrices, *factored], weights + [1.0] * len(factored), dtype=dtype)
    total = torch.zeros(out_size, in_size, dtype=CORE_DTYPE, device=device)
    for part, scales in ((matrices, weights), (factored, [1.0] * len(factored))):
        for owners, B, A in _blocks(part):
            B *= torch.tensor(scales, dtype=CORE_DTYPE, device=device)[owners]
            total.addmm_(B, A)
    for matrix in also:
        if isinstance(matrix, Tensor):
            _add(total, matrix)
    return total


def merged(total: LowRank) -> LowRank:
    """The same matrix without components that are zero, or whose row of A, or column of B, is another's to the bit.

    Such come from modules that several clients leave as they are, and from tails that they keep.
    """
    for turned in (False, True):
        B, A = (total.A.mT, total.B.mT) if turned else (total.B, total.A)
        owner = _owners(A)
        if owner is not None:
            kept, place = owner[owner >= 0].unique(return_inverse=True)
            sums = torch.zeros(len(B), len(kept), dtype=B.dtype, device=B.device)
            B, A = sums.index_add_(1, place, B[:, owner >= 0]), A[kept].contiguous()
            total = LowRank(A.mT, B.mT) if turned else LowRank(B, A)
    return total


def _owners(rows: Tensor) -> Tensor | None:
    """`(n,)`: for each of n rows the index of one that equals it, the same for all equals; -1 for a row of zeros.

    None if all differ and none is zero. Equal rows begin alike, so of rows sorted by the sum of their first numbers
    neighbours are compared.
    """
    first = rows[:, 0].tolist()
    if len({*first, 0.0}) > len(first):  # the usual case: all differ in one number already, and it is nowhere zero
        return None
    sums, order = rows[:, :LOOK].sum(1).sort()
    zero = order[(sums == 0).nonzero()[:, 0]]
    close = (sums.diff().abs() <= 1e-5 * sums.abs()[1:]).nonzero()[:, 0]
    zero = zero[~rows[zero].any(1)]
    equal = close[(rows[order[close]] == rows[order[close + 1]]).all(1)]
    if not len(equal) and not len(zero):
        return None
    head, owner = torch.arange(len(order), device=order.device), torch.empty_like(order)
    head[equal + 1] = 0
    owner[order] = order[head.cummax(0).values]
    owner[zero] = -1
    return owner


def _add(total: Tensor, matrix: Tensor) -> Tensor:
    """In place and row by row: where dtypes differ, torch would first make a copy of the whole matrix."""
    for row, more in zip(total, matrix, strict=True):
        row += more
    return total


def _blocks(matrices: Sequence[LowRank], dtype: torch.dtype = CORE_DTYPE) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Whose each column is `(R,)`, B `(out, R)`, A `(R, in)` in `dtype`: of some matrices at a time, in order."""
    waiting: list[tuple[int, LowRank]] = []
    for i, matrix in enumerate(matrices):
        if matrix.rank:
            waiting.append((i, matrix))
        if waiting and (i == len(matrices) - 1 or sum(held.rank for _, held in waiting) >= BLOCK):
            B = torch.cat([held.B for _, held in waiting], dim=1).to(dtype)
            A = torch.cat([held.A for _, held in waiting], dim=0).to(dtype)
            owners = [i for i, held in waiting for _ in range(held.rank)]
            waiting = []
            yield torch.tensor(owners, device=B.device), B, A


def inner(left: Matrix, right: Matrix, dtype: torch.dtype = CORE_DTYPE) -> float:
    """Frobenius inner product, in float64; products with factors are made in `dtype`."""
    if isinstance(left, LowRank) and isinstance(right, LowRank):
        return left.inner(right, dtype)
    if isinstance(left, LowRank) or isinstance(right, LowRank):
        factors, dense = (left, right) if isinstance(left, LowRank) else (right, left)
        assert isinstance(factors, LowRank) and isinstance(dense, Tensor)
        return float(inner_with_each([factors], dense, dtype)[0])
    return sum(float(torch.dot(a.to(CORE_DTYPE), b.to(CORE_DTYPE))) for a, b in zip(left, right, strict=True))


def inner_with_each(matrices: Sequence[LowRank], other: Matrix, dtype: torch.dtype = CORE_DTYPE) -> Tensor:
    """`(n,)`, float64: the Frobenius inner product of each of n matrices with `other`; products are made in `dtype`.

    `<B A, B' A'> = sum((B^T B') * (A A'^T))`, and `<B A, D> = sum(B * (D A^T))` for a dense D.
    """
    result = torch.zeros(len(matrices), dtype=CORE_DTYPE, device="cpu")
    other = other.to(dtype)
    for owners, B, A in _blocks(matrices, dtype):
        if isinstance(other, LowRank):
            columns = ((B.mT @ other.B) * (A @ other.A.mT)).sum(1, dtype=CORE_DTYPE)
        else:
            columns = (B * (other @ A.mT)).sum(0, dtype=CORE_DTYPE)
        result.index_add_(0, owners.cpu(), columns.cpu())
    return result


def times(matrix: Matrix, x: Tensor) -> Tensor:
    """`matrix x` for a vector `(in,)`, in its dtype; a dense matrix is not cast."""
    if isinstance(matrix, LowRank):
        return matrix.B.to(x) @ (matrix.A.to(x) @ x)
    return (matrix @ x.to(matrix)).to(x)


def norm(matrix: Matrix, dtype: torch.dtype = CORE_DTYPE) -> float:
    """Frobenius norm; of factors in `dtype`, as `LowRank.norm`."""
    if isinstance(matrix, LowRank):
        return matrix.norm(dtype)
    return float(torch.linalg.vector_norm(matrix, dtype=CORE_DTYPE))


def as_dense(matrix: Matrix) -> Tensor:
    """The `(out, in)` matrix, formed on purpose."""
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


def rank_of(matrix: Matrix) -> int:
    """An upper bound of the rank."""
    return matrix.rank if isinstance(matrix, LowRank) else min(matrix.shape)


def plus(left: Matrix, right: Matrix) -> Matrix:
    """`left + right` in float64: stacked where both are factored, else dense, in the memory of a dense left."""
    if isinstance(left, Tensor):
        return left.addmm_(right.B.to(left), right.A.to(left)) if isinstance(right, LowRank) else _add(left, right)
    if isinstance(right, Tensor):
        return plus(right.to(CORE_DTYPE, copy=True), left)
    return weighted_sum([left, right], [1.0, 1.0])


def scaled(matrix: Matrix, factor: float, dtype: torch.dtype) -> Matrix:
    """`factor * matrix`, cast to `dtype`."""
    if isinstance(matrix, LowRank):
        return matrix.scaled(factor).to(dtype)
    return (matrix * factor if factor != 1 else matrix).to(dtype)


def strongest(
    matrix: Matrix, rank: int, generator: torch.Generator, *, energy: float = 0.0, near: LowRank | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Singular values and vectors: all of them where that is cheap, else the leading ones and what they leave.

    Of a dense matrix D the leading ones are found by subspace iteration, `Q = qr(D X)`, `X = D^T Q`, in float64, until
    a sweep adds no more to `sum of the leading rank S^2`; `O(d k rank)` a sweep. All are found where the matrix is
    factored or small, or the directions wanted are a good part of all.

    Args:
        matrix: `(out, in)`; a dense one is used up, its memory being that of what is left.
        rank: how many are wanted at least, below both sides.
        generator: draws where the iteration starts.
        energy: more than `rank` are wanted where that many hold less than this share of the squared norm.
        near: where its row space is close to the leading one, fewer sweeps are needed.

    Returns:
        U `(out, m)`, S `(m,)` descending, Vh `(m, in)`, float64, and `D - U S Vh`; None where m is all.

    Source:
        Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4.
    """
    if isinstance(matrix, LowRank):
        return *matrix.svd(), None
    whole = norm(matrix) ** 2
    while 4 * (width := rank + max(8, rank // 4)) < min(matrix.shape) > SMALL:
        U, S, Vh = _swept(matrix, rank, width, whole, generator, near)
        if float(S.square().sum()) >= energy * whole:
            return U, S, Vh, matrix.addmm_(U * S, Vh, alpha=-1)
        rank *= 2
    return *torch.linalg.svd(matrix, full_matrices=False), None


def _swept(
    D: Tensor, rank: int, width: int, whole: float, generator: torch.Generator, near: LowRank | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Subspace iteration on `width` directions; the leading `rank`."""
    X = torch.randn(D.shape[1], width, generator=generator, dtype=CORE_DTYPE, device=generator.device).to(D.device)
    if near is not None:
        X[:, : min(width, near.rank)] = near.A[:width].mT
    kept = -1.0
    for _ in range(MAX_SWEEPS):
        Q = torch.linalg.qr(D @ X).Q  # (out, width)
        X, R = torch.linalg.qr(D.mT @ Q)  # (in, width), (width, width)
        U, S, Vh = torch.linalg.svd(R.mT)  # Q^T D = R^T X^T
        before, kept = kept, float(S[:rank].square().sum())
        if kept - before <= SETTLED * (whole - kept):
            break
    return Q @ U[:, :rank], S[:rank], Vh[:rank] @ X.mT
