"""The leading directions of a weighted sum of factored matrices, and exactly what they leave, near what reading costs.

Clients that come from one adapter have most of their sum in common, and iteration finds that at once. A Gram matrix
needs nothing in common, but squares the condition of what it is made of. A QR decomposition does neither; of large
factors it takes some ten times as long, of small ones it is the fewest steps. So the cheapest way is taken that is
known to be good enough. Whichever it is, the rest is the sum minus what was taken out, by construction: nothing is
lost, however well the directions were found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from fedmomentum.by_gram import by_gram
from fedmomentum.by_iteration import by_iteration, common_rows
from fedmomentum.deflation import Leading
from fedmomentum.lowrank import CORE_DTYPE, LowRank, numerical_rank
from fedmomentum.sums import Matrix, exact_sum, merged, norm, plus, rank_of, strongest

# Up to so many products a Gram matrix of both sides, `(out + in) R^2`, QR decompositions in float64 are the quickest.
SMALL = 2**21


def leading(
    matrices: Sequence[LowRank],
    weights: Sequence[float] | Tensor,
    rank: int,
    *,
    also: Sequence[Matrix] = (),
    dtype: torch.dtype,
    reference: LowRank | None = None,
    generator: torch.Generator | None = None,
) -> Leading:
    r"""The best approximation of rank at most `rank` of `sum_i w_i B_i A_i`, and what it leaves.

    With the stack `B = [w_1 B_1, ...]` `(out, R)`, `A = [A_1; ...]` `(R, in)`, the cheapest that is good enough of:

    - `iterated`: subspace iteration from the clients' mean A, where they have a direction in common (`by_iteration`).
    - `gram32`, `gram64`: R x R Gram matrices in that precision (`by_gram`).
    - `dense`: R is so large that the dense sum is the smaller form. Subspace iteration on it, warm from
      `reference`.
    - `svd`: `LowRank.svd`, for small factors, for float64, for parts that cancel, and wherever a bound fails.

    Each keeps `||sum - U S V^T||` within 1.0001 of the best of that rank, or within the round-off of float32 beside
    the sum.

    Args:
        matrices: n matrices of one shape.
        weights: n finite numbers.
        rank: how many directions, at least 1.
        also: more matrices of that shape, each with factor 1.
        dtype: float32 or float64; that of `rest`, and what the tall products may be made in.
        reference: a matrix whose row space is near the wanted one; only a start, the result does not depend on it
            beyond the bound.
        generator: draws the rest of that start.

    Raises:
        ValueError: see `weighted_sum`; a factor holds NaN or Inf.
    """
    if dtype != CORE_DTYPE and not _is_small(chain(matrices, also)):
        total = exact_sum(matrices, weights, also, dtype=dtype)
        if isinstance(total, Tensor):
            return _of_dense(total, rank, dtype, reference, generator)
        stack, lengths = total, torch.linalg.vector_norm(total.A, dim=1)
        rows, total = common_rows(stack.A, lengths, weights, rank), merged(stack)
        if rows is not None and rank < total.rank:
            lengths = lengths if total is stack else torch.linalg.vector_norm(total.A, dim=1)
            if found := by_iteration(total, lengths, rows):
                return found
        for core in (torch.float32, torch.float64):
            if rank < total.rank and (found := by_gram(total, rank, core)):
                return found
    total = exact_sum(matrices, weights, also)
    if isinstance(total, Tensor):
        return _of_dense(total, rank, dtype, reference, generator)
    return _by_svd(total, rank, dtype)


def _is_small(matrices: Iterable[Matrix]) -> bool:
    R = 0
    for matrix in matrices:
        R += rank_of(matrix)
        if sum(matrix.shape) * R**2 > SMALL:
            return False
    return True


def _of_dense(
    delta: Tensor, rank: int, dtype: torch.dtype, reference: LowRank | None, generator: torch.Generator | None
) -> Leading:
    generator = generator or torch.Generator().manual_seed(0)
    shape = delta.shape[0], delta.shape[1]
    U, S, Vh, beyond = strongest(delta, rank, generator, near=reference)
    m = min(rank, numerical_rank(S, shape))
    others = _components(U, S, Vh, m, numerical_rank(S, shape, CORE_DTYPE))
    rest = others if beyond is None else plus(beyond, others)
    return Leading(U[:, :m], S[:m], Vh[:m], rest.to(dtype), "dense", norm(rest) ** 2)


def _by_svd(total: LowRank, rank: int, dtype: torch.dtype) -> Leading:
    U, S, Vh = total.svd()
    held = numerical_rank(S, total.shape, CORE_DTYPE)  # below it is round-off of the core itself
    m = min(rank, numerical_rank(S, total.shape))
    rest = _components(U, S, Vh, m, held).to(dtype)
    return Leading(U[:, :m], S[:m], Vh[:m], rest, "svd", float(S[m:].square().sum()))


def _components(U: Tensor, S: Tensor, Vh: Tensor, start: int, end: int) -> LowRank:
    """The singular directions from `start` to `end`."""
    root = S[start:end].sqrt()  # on both sides: the product of two small factors may be too small for float32
    return LowRank(U[:, start:end] * root, root[:, None] * Vh[start:end])
