"""RoLoRA: B and A are trained and averaged in turn.

Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS 2025,
arXiv 2502.01755.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class RoLoRA(Method):
    r"""Alternating means: `B = sum_i w_i B_i` in odd rounds, `A = sum_i w_i A_i` in even ones.

    The other factor is frozen and the same for all clients, so each round is exact:
    `sum_i w_i B_i A = B A`. B `(out, rank)` goes first: while it is zero, A `(rank, in)` has no
    gradient.

    Learning rate: tune it separately; the paper searches 5e-4 to 1e-1.

    Source:
        arXiv 2502.01755. The paper's mean is uniform; here weights are fractions of examples, as
        for all methods. A public port counts rounds from 0 and trains A first, which learns
        nothing; we start with B.
    """

    title = "RoLoRA"
    paper = (
        "Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, "
        "NeurIPS 2025, arXiv 2502.01755"
    )
    depends_on = "factors"
    exact = True

    def trained_factors(self, server_round: int) -> str:
        """Return B in odd rounds, A in even ones; rounds count from 1."""
        return "B" if server_round % 2 else "A"

    def sent_factors(self, server_round: int) -> str:
        """Return the factor that was just averaged."""
        return self.trained_factors(server_round)

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Average the factor that was trained."""
        mean = updates.mean_factors()
        frozen = updates[0].to(CORE_DTYPE)
        # All clients have the same frozen factor, so take it from the first.
        if self.trained_factors(context.server_round) == "B":
            return ModuleAggregate(LowRank(mean.B, frozen.A))
        return ModuleAggregate(LowRank(frozen.B, mean.A))
