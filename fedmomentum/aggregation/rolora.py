"""RoLoRA: B and A are trained and averaged in turn.

Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS 2025,
arXiv 2502.01755.
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
class RoLoRA(Method):
    r"""Odd rounds: `B = sum_i w_i B_i`, A frozen and shared. Even rounds: `A = sum_i w_i A_i`, B frozen and shared.

    Exact in each round: `sum_i w_i B_i A = B A`. B `(out, rank)` goes first: it starts at zero, where A has no
    gradient.

    Learning rate: its own; the paper searches 5e-4 to 1e-1.

    Raises (when called):
        ValueError: clients of another rank, or whose frozen factors differ in a bit.

    Source:
        arXiv 2502.01755. The paper's mean is uniform; here weights are shares of examples, as for all. A public
        port counts rounds from 0 and trains A first, which learns nothing; we start with B.
    """

    title = "RoLoRA"
    paper = (
        "Chen et al., Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA, NeurIPS 2025, "
        "arXiv 2502.01755"
    )
    exact = True

    def trains(self, server_round: int) -> str:
        """B in odd rounds, A in even ones; rounds count from 1."""
        return "B" if server_round % 2 else "A"

    def sends(self, server_round: int) -> str:
        """The factor that was just averaged."""
        return self.trains(server_round)

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
        """Average the trained factor of one module; see `Method`."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        trained = self.trains(server_round)
        check_shared(self.title, updates, "A" if trained == "B" else "B")
        dtype, mean = adapter_dtype(updates), mean_factors(updates, weights)
        B, A = (mean.B, updates[0].A) if trained == "B" else (updates[0].B, mean.A)
        return Aggregate(LowRank(B.to(dtype), A.to(dtype)))
