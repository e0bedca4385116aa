"""FedSA-LoRA: A is shared and averaged; every client keeps its own B.

Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025,
arXiv 2410.01463.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.matrix import norm

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FedSALoRA(Method):
    r"""A shared mean A, a personal B: `A = sum_i w_i A_i` `(rank, in)`, and client i has `B_i A`.

    `B_i` never leaves its client. There is no global product: evaluate each client with its own
    `B_i` `(out, rank)`. The aggregate's B is the mean of the B in the updates. Offline, these are
    the clients' own, which yields the global model that others report; within a run, the server has
    none of them, so the mean is the B that all clients started from.

    Learning rate: the paper trains with SGD, 2e-2 on GLUE and 5e-3 on GSM8K.

    Source:
        arXiv 2410.01463 and its code (Pengxin-Guo/FedSA-LoRA), which also keeps classification
        heads local. A public port leaks B from one client to the next; here it stays.
    """

    title = "FedSA-LoRA"
    paper = (
        "Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR "
        "2025, arXiv 2410.01463"
    )
    depends_on = "factors"
    shared_factors = "A"

    def sent_factors(self, server_round: int) -> str:
        """Return A: the mean."""
        return "A"

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Average the factors. Findings: `dropped_energy`, of the product of the means."""
        mean = updates.mean_factors()
        error = norm(updates.averaging_error(mean), updates.dtype)
        return ModuleAggregate(mean, findings={"dropped_energy": error**2})
