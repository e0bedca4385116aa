"""The truncated SVD of a weighted sum of factored matrices, at close to the cost of reading them.

Clients that start from one adapter share most of their sum, and subspace iteration finds the shared
part at once. A Gram matrix does not need a shared part, but squares the condition number of the
factors. A QR decomposition has neither drawback; it takes about ten times as long for large
factors, but has the fewest steps for small ones. So we take the cheapest path known to be accurate
enough. On every path, the residual is the sum minus the directions by construction: nothing is
lost, however inaccurate the directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, numerical_rank
from fedmomentum.linalg.matrix import Matrix, add, norm, rank_bound
from fedmomentum.linalg.truncated_svd.deflation import TruncatedSVD
from fedmomentum.linalg.truncated_svd.dense import dense_truncated_svd
from fedmomentum.linalg.truncated_svd.gram import gram_truncated_svd
from fedmomentum.linalg.truncated_svd.subspace_iteration import iterative_truncated_svd, mean_rows
from fedmomentum.linalg.weighted_sum import deduplicate_rows, exact_sum

# Up to this many multiplications for the Gram matrices of both sides, `(out + in) R^2`, QR
# decompositions in float64 are fastest.
MAX_QR_MULTIPLICATIONS = 2**21


def truncated_svd(
    matrices: Sequence[LowRank],
    weights: Sequence[float] | Tensor,
    rank: int,
    *,
    extra: Sequence[Matrix] = (),
    dtype: torch.dtype,
    reference: LowRank | None = None,
    generator: torch.Generator | None = None,
) -> TruncatedSVD:
    r"""Compute the best approximation of `sum_i w_i B_i A_i` at a given rank, and the residual.

    With the stack `B = [w_1 B_1, ...]` `(out, R)`, `A = [A_1; ...]` `(R, in)`, use the cheapest of
    these paths that is accurate enough:

    - `iterated`: subspace iteration from the clients' mean A, if they have directions in common
      (`iterative_truncated_svd`).
    - `gram32`, `gram64`: R x R Gram matrices in that precision (`gram_truncated_svd`).
    - `dense`: subspace iteration on the dense sum, started from `reference`, if R is so large that
      the dense sum is the smaller form (`dense_truncated_svd`).
    - `svd`: `LowRank.svd`, for small factors, for float64, for terms that cancel, and whenever a
      bound fails.

    Each keeps `||sum - U S V^T||` within 1.0001 times the minimum error at that rank, or within
    float32 round-off relative to the sum.

    Args:
        matrices: N matrices of the same shape.
        weights: N finite numbers.
        rank: Number of directions, at least 1.
        extra: More matrices of that shape, each with weight 1.
        dtype: Float32 or float64, for the residual; tall products may be computed in it too.
        reference: A matrix whose row space is near the leading one; only a starting point, which
            affects the result only within the bound.
        generator: Samples the rest of the starting point.

    Raises:
        ValueError: If the sum is not defined (`exact_sum`), or a factor contains NaN or Inf.
    """
    if dtype != CORE_DTYPE and not _is_small(chain(matrices, extra)):
        total = exact_sum(matrices, weights, extra, dtype=dtype)
        if isinstance(total, Tensor):
            return _decompose_dense(total, rank, dtype, reference, generator)
        result = _decompose_large(total, weights, rank)
        if result is not None:
            return result
    total = exact_sum(matrices, weights, extra)
    if isinstance(total, Tensor):
        return _decompose_dense(total, rank, dtype, reference, generator)
    return _decompose_factored(total, rank, dtype)


def _is_small(matrices: Iterable[Matrix]) -> bool:
    """Return whether QR decompositions of the stacked factors are the fastest path."""
    R = 0
    for matrix in matrices:
        R += rank_bound(matrix)
        if sum(matrix.shape) * R**2 > MAX_QR_MULTIPLICATIONS:
            return False
    return True


def _decompose_large(
    stack: LowRank, weights: Sequence[float] | Tensor, rank: int
) -> TruncatedSVD | None:
    """Try the paths for large float32 factors; return None if none is accurate enough."""
    lengths = torch.linalg.vector_norm(stack.A, dim=1)
    rows = mean_rows(stack.A, lengths, weights, rank)
    total = deduplicate_rows(stack)
    if rank >= total.rank:
        return None
    if rows is not None:
        if total is not stack:
            lengths = torch.linalg.vector_norm(total.A, dim=1)
        result = iterative_truncated_svd(total, lengths, rows)
        if result is not None:
            return result
    result = gram_truncated_svd(total, rank, torch.float32)
    if result is not None:
        return result
    return gram_truncated_svd(total, rank, torch.float64)


def _decompose_dense(
    delta: Tensor,
    rank: int,
    dtype: torch.dtype,
    reference: LowRank | None,
    generator: torch.Generator | None,
) -> TruncatedSVD:
    """Decompose a dense sum, whose memory is reused for the residual."""
    generator = generator or torch.Generator().manual_seed(0)
    shape = delta.shape[0], delta.shape[1]
    U, S, Vh, remainder = dense_truncated_svd(delta, rank, generator, near=reference)
    m = min(rank, numerical_rank(S, shape))
    residual: Matrix = _components(U, S, Vh, m, numerical_rank(S, shape, CORE_DTYPE))
    if remainder is not None:
        residual = add(remainder, residual)
    energy = norm(residual) ** 2
    return TruncatedSVD(U[:, :m], S[:m], Vh[:m], residual.to(dtype), "dense", energy)


def _decompose_factored(total: LowRank, rank: int, dtype: torch.dtype) -> TruncatedSVD:
    """Decompose stacked float64 factors exactly."""
    U, S, Vh = total.svd()
    m = min(rank, numerical_rank(S, total.shape))
    # Singular values beyond this index are round-off of the float64 core itself.
    end = numerical_rank(S, total.shape, CORE_DTYPE)
    residual = _components(U, S, Vh, m, end).to(dtype)
    energy = float(S[m:].square().sum())
    return TruncatedSVD(U[:, :m], S[:m], Vh[:m], residual, "svd", energy)


def _components(U: Tensor, S: Tensor, Vh: Tensor, start: int, end: int) -> LowRank:
    """Return the singular directions from `start` to `end`.

    `S^1/2` goes to both sides: the whole of a small S on one side could underflow in float32.
    """
    root = S[start:end].sqrt()
    return LowRank(U[:, start:end] * root, root[:, None] * Vh[start:end])
