"""FedSA-LoRA: A is shared and averaged; every client keeps a B of its own.

Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025, arXiv 2410.01463.
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
class FedSALoRA(Method):
    r"""`A = sum_i w_i A_i` `(rank, in)`; client i goes on with `B_i A`, and `B_i` `(out, rank)` never leaves it.

    There is no global product: evaluate each client with its own `B_i`. The aggregate's B is the mean of the B
    that the call was given: where they are at hand (offline) the global model that others report, in a run, where
    the server has none of them, the B that all started from.

    Learning rate: the paper trains with SGD, 2e-2 on GLUE and 5e-3 on GSM8K.

    Raises (when called):
        ValueError: the clients' ranks differ from `rank`; factors of different sizes have no average.

    Source:
        arXiv 2410.01463 and its code (Pengxin-Guo/FedSA-LoRA), which keeps classification heads local too. A
        public port lets B flow from one client to the next; here it is the client's own.
    """

    title = "FedSA-LoRA"
    paper = (
        "Guo et al., Selective Aggregation for Low-Rank Adaptation in Federated Learning, ICLR 2025, arXiv 2410.01463"
    )
    shares = "A"

    def sends(self, server_round: int) -> str:
        """The mean A."""
        return "A"

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
        """Average A of one module; see `Method`. Findings: `dropped_energy`, of the product of means."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        mean = mean_factors(updates, weights)
        lost = norm(averaging_error(updates, weights, mean), adapter_dtype(updates)) ** 2
        return Aggregate(mean.to(adapter_dtype(updates)), findings={"dropped_energy": lost})
