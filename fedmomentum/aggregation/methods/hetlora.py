"""HetLoRA: zero-padded factors, weighted by the clients' norms, with self-pruning ranks.

Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import add, norm

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


# Weights must be positive: a client whose product is zero gets this weight relative to the largest.
MIN_RELATIVE_NORM = 1e-12
# How far below a whole number `gamma r` may be because of rounding, relative to it.
ROUNDING = 1e-12


@dataclass(frozen=True)
class HetLoRA(Method):
    r"""The mean of zero-padded factors: `B = sum_i w_i [B_i, 0]`, `A = sum_i w_i [A_i; 0]`.

    `w_i` is proportional to `||B_i A_i||_F`, with the norm over all modules of a client. A client
    of rank `r_i` takes the first `r_i` columns of B and rows of A. Not exact, because it is a
    product of means. Scalings are multiplied into B, so that products and norms are right.

    Args:
        decay: Gamma; a client's components from index `floor(gamma r_i)` on are its tail.
        strength: Lambda, the coefficient of the penalty on the tail.
        min_rank: No client is pruned below this rank.

    Raises:
        ValueError: If `decay` is outside (0, 1], `strength` is negative or `min_rank` is below 1.

    Source:
        arXiv 2401.06432, which has no code; gamma 0.99, lambda 0.01 and the minimum rank of 5 are
        secondhand. If all products are zero, the weights are uniform.
    """

    decay: float = 0.99
    strength: float = 0.01
    min_rank: int = 5
    title = "HetLoRA"
    paper = (
        "Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, "
        "EMNLP 2024, arXiv 2401.06432"
    )
    unequal_ranks = True

    def __post_init__(self) -> None:
        """Validate the settings."""
        if not 0 < self.decay <= 1:
            raise ValueError(
                f"decay is a fraction of the rank and must be in (0, 1]; got {self.decay!r}"
            )
        if self.strength < 0:
            raise ValueError(f"strength must not be negative; got {self.strength!r}")
        if self.min_rank < 1:
            raise ValueError(f"min_rank must be at least 1; got {self.min_rank!r}")

    def client_weights(self, weights: Tensor, norms: Callable[[], Tensor]) -> Tensor:
        """Return `||B_i A_i||_F / sum_j ||B_j A_j||_F`; the fractions of examples are not used."""
        sizes = norms().to(torch.float64)
        floor = MIN_RELATIVE_NORM * float(sizes.max())
        sizes = sizes.clamp(min=floor or 1.0)
        return sizes / sizes.sum()

    def penalty(self, modules: Sequence[LowRank]) -> Tensor | None:
        """Return `lambda sum_l ||B_l[:, floor(gamma r):]||_F ||A_l[floor(gamma r):]||_F`.

        It is differentiable with respect to the factors.
        """
        return self.strength * self._tail_norm(modules) if self.strength else None

    def next_rank(self, rank: int, start: Sequence[LowRank], trained: Sequence[LowRank]) -> int:
        """Return `max(min_rank, floor(gamma r))`, at most `rank`, if training shrank the tail."""
        if float(self._tail_norm(trained)) >= float(self._tail_norm(start)):
            return rank
        return min(rank, max(self.min_rank, self._kept_rank(rank)))

    def _kept_rank(self, rank: int) -> int:
        """Return `floor(gamma r)`; the tolerance is for products such as 0.29 * 100."""
        return math.floor(self.decay * rank * (1 + ROUNDING))

    def _tail_norm(self, modules: Sequence[LowRank]) -> Tensor:
        norms = []
        for module in modules:
            cut = self._kept_rank(module.rank)
            norms.append(module.B[:, cut:].norm() * module.A[cut:].norm())
        return torch.stack(norms).sum()

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Pad and average the factors. Findings: `dropped_energy`."""
        max_rank = max(context.rank, *updates.ranks)
        padded = updates.map(lambda update: _pad_zeros(update, max_rank))
        mean = padded.mean_factors()
        adapter, tail = self.client_adapter(mean, context.rank)
        # What is lost: the averaging error and the components beyond the rank.
        dropped = add(padded.averaging_error(mean), tail)
        return ModuleAggregate(adapter, findings={"dropped_energy": norm(dropped) ** 2})


def _pad_zeros(factors: LowRank, rank: int) -> LowRank:
    """Append zero columns to B and zero rows to A up to `rank`."""
    missing = rank - factors.rank
    return LowRank(pad(factors.B, (0, missing)), pad(factors.A, (0, 0, 0, missing)))
