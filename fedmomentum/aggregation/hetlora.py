"""HetLoRA: factors padded with zeros, weighted by the clients' norms; ranks that prune themselves.

Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024,
arXiv 2401.06432.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import averaging_error, mean_factors
from fedmomentum.lowrank import LowRank
from fedmomentum.sums import Each, Matrix, norm, plus


@dataclass(frozen=True)
class HetLoRA(Method):
    r"""`B = sum_i w_i [B_i, 0]`, `A = sum_i w_i [A_i; 0]`, with `w_i` in proportion to `||B_i A_i||_F`.

    The norm is over all of a client's modules. A client of rank `r_i` takes the first `r_i` columns and rows.
    Not exact: a product of means. Scalings that differ count on B, so that products are right, and their norms.

    Args:
        decay: gamma; the components from `floor(gamma r_i)` on are a client's tail.
        strength: lambda of the penalty on the tail.
        min_rank: no client is pruned below it.

    Raises:
        ValueError: a decay outside (0, 1], a negative strength, a minimal rank below 1.

    Source:
        arXiv 2401.06432, which has no code; gamma 0.99, lambda 0.01 and the least rank 5 are second hand. Where
        all products are zero, weights are uniform.
    """

    decay: float = 0.99
    strength: float = 0.01
    min_rank: int = 5
    title = "HetLoRA"
    paper = (
        "Cho et al., Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models, EMNLP 2024, "
        "arXiv 2401.06432"
    )
    unequal_ranks = True

    def __post_init__(self) -> None:
        """Check the settings when they are made."""
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a share of the rank and must be in (0, 1]; got {self.decay!r}")
        if self.strength < 0:
            raise ValueError(f"strength must not be negative; got {self.strength!r}")
        if self.min_rank < 1:
            raise ValueError(f"min_rank must be at least 1; got {self.min_rank!r}")

    def weigh(self, weights: Tensor, norms: Callable[[], Tensor]) -> Tensor:
        """`||B_i A_i||_F / sum_j ||B_j A_j||_F` over all modules; the shares of examples play no part."""
        sizes = norms().to(torch.float64)
        sizes = sizes.clamp(min=1e-12 * float(sizes.max()) or 1.0)  # weights are positive, also of a zero product
        return sizes / sizes.sum()

    def penalty(self, modules: Sequence[LowRank]) -> Tensor | None:
        """`lambda sum_l ||B_l[:, floor(gamma r):]||_F ||A_l[floor(gamma r):]||_F`; it has a gradient."""
        return self.strength * self._tails(modules) if self.strength else None

    def next_rank(self, rank: int, start: Sequence[LowRank], trained: Sequence[LowRank]) -> int:
        """`max(min_rank, floor(gamma r))` where training made the tail smaller; never more than `rank`."""
        if float(self._tails(trained)) >= float(self._tails(start)):
            return rank
        return min(rank, max(self.min_rank, int(self.decay * rank)))

    def _tails(self, modules: Sequence[LowRank]) -> Tensor:
        cut = [int(self.decay * module.rank) for module in modules]
        return torch.stack([m.B[:, c:].norm() * m.A[c:].norm() for m, c in zip(modules, cut, strict=True)]).sum()

    def __call__(
        self,
        updates: Sequence[LowRank],
        weights: Tensor,
        *,
        rank: int,
        reference: LowRank | None = None,
        carried: Matrix | None = None,
        server_round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Aggregate:
        """Pad and average one module; see `Method`. Findings: `dropped_energy`."""
        check_updates(updates, weights, rank)
        widest = max(rank, *(u.rank for u in updates))
        padded = Each(lambda u: LowRank(pad(u.B, (0, widest - u.rank)), pad(u.A, (0, 0, 0, widest - u.rank))), updates)
        mean = mean_factors(padded, weights)
        adapter, tail = self.localise(mean, rank)
        lost = plus(averaging_error(padded, weights, mean), tail)
        return Aggregate(adapter.to(adapter_dtype(updates)), findings={"dropped_energy": norm(lost) ** 2})
