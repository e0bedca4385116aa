"""FedIT: average the two factors.

Zhang et al., Towards Building the FederatedGPT: Federated Instruction Tuning, ICASSP 2024,
arXiv 2305.05644.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.matrix import norm

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FedIT(Method):
    r"""FedAvg on the factors, the baseline: `B = sum_i w_i B_i`, `A = sum_i w_i A_i`.

    The product of the means is not the weighted sum. The error `sum_i w_i B_i A_i - B A`, which
    equals `sum_i w_i (B_i - B)(A_i - A)`, is lost, and grows as clients drift apart. The method has
    no residual and reports the energy of this error.

    Source:
        arXiv 2305.05644; paper and code (FederatedGPT-Shepherd) agree: weights are fractions of
        examples.
    """

    title = "FedIT"
    paper = (
        "Zhang et al., Towards Building the FederatedGPT: Federated Instruction Tuning, ICASSP "
        "2024, arXiv 2305.05644"
    )
    depends_on = "factors"

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Average the factors. Findings: `dropped_energy`."""
        mean = updates.mean_factors()
        error = norm(updates.averaging_error(mean), updates.dtype)
        return ModuleAggregate(mean, findings={"dropped_energy": error**2})
