"""FedEx-LoRA: average the factors; what that gets wrong goes to the base.

Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language Models,
ACL 2025, arXiv 2410.09432.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import averaging_error, check_equal_ranks, mean_factors
from fedmomentum.lowrank import LowRank
from fedmomentum.sums import Matrix, exact_sum, norm


@dataclass(frozen=True)
class FedExLoRA(Method):
    r"""`B = sum_i w_i B_i`, `A = sum_i w_i A_i`; residual `sum_i w_i B_i A_i - B A = sum_i w_i (B_i - B)(A_i - A)`.

    The residual has rank at most `(n - 1) rank` and is zero where clients agree.

    Raises (when called):
        ValueError: the clients' ranks differ from `rank`; factors of different sizes have no average.

    Source:
        arXiv 2410.09432. Its weights are uniform; here `w_i` stands in all three terms. Its code transposes the
        residual, which is right for GPT-2's Conv1D and wrong for linear layers; ours has the module's shape.
    """

    title = "FedEx-LoRA"
    paper = (
        "Singhal et al., FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language "
        "Models, ACL 2025, arXiv 2410.09432"
    )
    residual_rank = "q <= (n-1) r"
    exact = True

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
        """Average one module and keep the books; see `Method`. Findings: energies."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        dtype, mean = adapter_dtype(updates), mean_factors(updates, weights)
        residual = averaging_error(updates, weights, mean)
        findings = {"energy": norm(exact_sum(updates, weights)) ** 2, "kept_energy": mean.norm() ** 2}
        return Aggregate(mean.to(dtype), residual.to(dtype), findings=findings)
