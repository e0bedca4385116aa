"""FFA-LoRA: A is frozen and the same for all; B is averaged.

Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import check_equal_ranks, check_shared, mean_factors
from fedmomentum.lowrank import LowRank
from fedmomentum.sums import Matrix


@dataclass(frozen=True)
class FFALoRA(Method):
    r"""`B = sum_i w_i B_i` with one frozen `A`: then `sum_i w_i B_i A = B A`, and nothing is left over.

    B `(out, rank)` starts at zero; A `(rank, in)` is LoRA's random start, drawn from a seed that all have.

    Learning rate: its own, usually larger than FedIT's; the scaling only rescales it.

    Raises (when called):
        ValueError: clients of another rank, or whose A differ in a bit.

    Source:
        arXiv 2403.12313. Code by others freezes A before the adapter is attached, so that it is trained and
        thrown away; here a client with an A of its own is refused.
    """

    title = "FFA-LoRA"
    paper = "Sun et al., Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024, arXiv 2403.12313"
    exact = True

    def trains(self, server_round: int) -> str:
        """B, always."""
        return "B"

    def sends(self, server_round: int) -> str:
        """The mean B; A stays what it was."""
        return "B"

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
        """Average B of one module; see `Method`."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        check_shared(self.title, updates, "A")
        dtype = adapter_dtype(updates)
        return Aggregate(LowRank(mean_factors(updates, weights).B.to(dtype), updates[0].A.to(dtype)))
