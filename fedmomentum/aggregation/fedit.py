"""FedIT: average the two factors.

Zhang et al., Towards Building the FederatedGPT: Federated Instruction Tuning, ICASSP 2024, arXiv 2305.05644.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, adapter_dtype, check_updates
from fedmomentum.lowrank import CORE_DTYPE, LowRank


@dataclass(frozen=True)
class FedIT:
    r"""`B = sum_i w_i B_i`, `A = sum_i w_i A_i`: FedAvg on the factors, the baseline.

    Not the weighted sum: `sum_i w_i B_i A_i - B A = sum_i w_i (B_i - B)(A_i - A)`, which is the price of
    clients that drift apart. There is no residual: what is lost is lost.

    Raises (when called):
        ValueError: the clients' ranks differ from `rank`; factors of different sizes have no average.
    """

    exact: ClassVar[bool] = False

    def __call__(
        self,
        updates: Sequence[LowRank],
        weights: Tensor,
        *,
        rank: int,
        reference: LowRank | None = None,
        carried: LowRank | None = None,
        server_round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Aggregate:
        """Average the factors of one module; see `Method`."""
        del reference, carried, server_round, generator
        check_updates(updates, weights, rank)
        ranks = [update.rank for update in updates]
        if set(ranks) != {rank}:
            raise ValueError(
                f"FedIT averages factors and needs every client at rank {rank}; got ranks {ranks}. "
                "Use fedmomentum, which takes clients of any rank"
            )
        w = weights.to(CORE_DTYPE)
        B = sum(w_i * update.B.to(CORE_DTYPE) for w_i, update in zip(w, updates, strict=True))
        A = sum(w_i * update.A.to(CORE_DTYPE) for w_i, update in zip(w, updates, strict=True))
        assert isinstance(B, Tensor) and isinstance(A, Tensor)
        dtype = adapter_dtype(updates)
        return Aggregate(adapter=LowRank(B.to(dtype), A.to(dtype)))
