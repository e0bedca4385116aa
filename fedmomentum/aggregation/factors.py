"""Averages of factors, what they get wrong, and fresh factors: what several methods are made of. torch only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmomentum.lowrank import CORE_DTYPE, LowRank, zeros
from fedmomentum.sums import Each, Matrix, exact_sum


def mean_factors(updates: Sequence[LowRank], weights: Tensor) -> LowRank:
    """`B = sum_i w_i B_i`, `A = sum_i w_i A_i`, in float64; the updates are of one rank."""
    B, A = (torch.zeros_like(f, dtype=CORE_DTYPE) for f in (updates[0].B, updates[0].A))
    for w_i, update in zip(weights.tolist(), updates, strict=True):
        B.add_(update.B, alpha=w_i)
        A.add_(update.A, alpha=w_i)
    return LowRank(B, A)


def averaging_error(updates: Sequence[LowRank], weights: Tensor, mean: LowRank) -> Matrix:
    """`sum_i w_i B_i A_i - B A = sum_{i<n} w_i (B_i - B)(A_i - A_n)`, for the mean factors `B`, `A`.

    The same as `sum_i w_i (B_i - B)(A_i - A)`, for `sum_i w_i (B_i - B) = 0`, and one client shorter: of rank
    `(n - 1) r`, in float64. Rank 0 where the clients agree in one factor.
    """
    first, last = updates[0], updates[-1]
    if all(torch.equal(u.B, first.B) for u in updates) or all(torch.equal(u.A, first.A) for u in updates):
        return zeros(mean.shape, dtype=CORE_DTYPE, device=mean.device)
    last_A = last.A.to(CORE_DTYPE)
    apart = Each(lambda u: LowRank(u.B - mean.B, u.A - last_A), updates[:-1])
    return exact_sum(apart, weights[:-1])


def check_equal_ranks(title: str, updates: Sequence[LowRank], rank: int) -> None:
    """Refuse what has no average of factors.

    Raises:
        ValueError: a client's rank is not `rank`.
    """
    ranks = [update.rank for update in updates]
    if set(ranks) != {rank}:
        raise ValueError(
            f"{title} averages factors and needs every client at rank {rank}; got ranks {ranks}. "
            "Use fedmomentum, which takes clients of any rank"
        )


def check_shared(title: str, updates: Sequence[LowRank], factor: str) -> None:
    """Refuse clients that do not hold one and the same frozen factor, to the bit.

    Raises:
        ValueError: a client's factor differs from the first client's, by position.
    """
    wanted = getattr(updates[0], factor).to(CORE_DTYPE)
    for position, update in enumerate(updates):
        if not torch.equal(getattr(update, factor).to(CORE_DTYPE), wanted):
            raise ValueError(
                f"update {position} holds another factor {factor} than update 0; in this round of {title} the factor "
                f"{factor} is frozen and the same for all. Use a method that trains both, such as fedmomentum"
            )


def fresh_adapter(
    shape: tuple[int, int],
    rank: int,
    generator: torch.Generator | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> LowRank:
    """LoRA's initialisation: B zero, A uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)).

    Drawn in float64 on the CPU, so that everyone with the generator's seed has the same bits.
    """
    generator = generator or torch.Generator().manual_seed(0)
    out_size, in_size = shape
    draw = torch.rand(rank, in_size, generator=generator, dtype=torch.float64, device=generator.device)
    A = ((draw * 2 - 1) / math.sqrt(in_size)).to(device, dtype)
    return LowRank(A.new_zeros(out_size, rank), A)
