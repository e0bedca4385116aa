"""FedEx-LoRA: average the factors; the base absorbs the averaging error.

Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large
Language Models, ACL 2025, arXiv 2410.09432.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.matrix import norm

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FedExLoRA(Method):
    r"""FedIT with its error as the residual: `sum_i w_i B_i A_i - B A`.

    The adapter is `B = sum_i w_i B_i`, `A = sum_i w_i A_i`. The residual equals
    `sum_i w_i (B_i - B)(A_i - A)`. Its rank is at most `(n - 1) rank`, and it is zero if all
    clients agree.

    Source:
        arXiv 2410.09432, which weights clients uniformly; here `w_i` is in all three terms. The
        published code transposes the residual, which is right for GPT-2's Conv1D but wrong for
        linear layers; ours has the shape of the module.
    """

    title = "FedEx-LoRA"
    paper = (
        "Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of "
        "Large Language Models, ACL 2025, arXiv 2410.09432"
    )
    depends_on = "product"
    residual_rank = "q <= (n-1) r"
    exact = True

    def max_residual_rank(self, rank: int, num_updates: int) -> int:
        """Return the rank of the factors' deviations from their means, which sum to zero."""
        return (num_updates - 1) * rank

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Average the factors and keep the error as the residual. Findings: the energies."""
        mean = updates.mean_factors()
        residual = updates.averaging_error(mean)
        findings = {"energy": norm(updates.sum()) ** 2, "kept_energy": mean.norm() ** 2}
        return ModuleAggregate(mean, residual, findings=findings)
