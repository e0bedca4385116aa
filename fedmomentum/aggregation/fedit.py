"""FedIT: average the two factors.

Zhang et al., Towards Building the FederatedGPT: Federated Instruction Tuning, ICASSP 2024, arXiv 2305.05644.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import averaging_error, check_equal_ranks, mean_factors
from fedmomentum.lowrank import LowRank
from fedmomentum.sums import Matrix, norm


@dataclass(frozen=True)
class FedIT(Method):
    r"""`B = sum_i w_i B_i`, `A = sum_i w_i A_i`: FedAvg on the factors, the baseline.

    Not the weighted sum: `sum_i w_i B_i A_i - B A = sum_i w_i (B_i - B)(A_i - A)`, which is the price of
    clients that drift apart. There is no residual: what is lost is lost, and its energy is told.

    Raises (when called):
        ValueError: the clients' ranks differ from `rank`; factors of different sizes have no average.

    Source:
        arXiv 2305.05644; paper and code (FederatedGPT-Shepherd) agree, weights are shares of examples.
    """

    title = "FedIT"
    paper = (
        "Zhang et al., Towards Building the FederatedGPT: Federated Instruction Tuning, ICASSP 2024, arXiv 2305.05644"
    )

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
        """Average the factors of one module; see `Method`. Findings: `dropped_energy`."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        mean = mean_factors(updates, weights)
        lost = norm(averaging_error(updates, weights, mean), adapter_dtype(updates)) ** 2
        return Aggregate(mean.to(adapter_dtype(updates)), findings={"dropped_energy": lost})
