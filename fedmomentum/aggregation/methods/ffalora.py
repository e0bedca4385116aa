"""FFA-LoRA: A is frozen and the same for all clients; B is averaged.

Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FFALoRA(Method):
    r"""The mean of B with one frozen A: `B = sum_i w_i B_i`, and `sum_i w_i B_i A = B A` exactly.

    B `(out, rank)` starts at zero; A `(rank, in)` is LoRA's random initialization, sampled from a
    seed that every client has.

    Learning rate: tune it separately, usually larger than FedIT's; the scaling only rescales it.

    Source:
        arXiv 2403.12313. Third-party code freezes A before the adapter is attached, so that A is
        trained and then discarded; here, a client with a different A is rejected.
    """

    title = "FFA-LoRA"
    paper = (
        "Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv "
        "2403.12313"
    )
    depends_on = "factors"
    exact = True

    def trained_factors(self, server_round: int) -> str:
        """Return B, in every round."""
        return "B"

    def sent_factors(self, server_round: int) -> str:
        """Return B: the mean. A never changes."""
        return "B"

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Average B."""
        A = updates[0].A.to(CORE_DTYPE)
        return ModuleAggregate(LowRank(updates.mean_factors().B, A))
