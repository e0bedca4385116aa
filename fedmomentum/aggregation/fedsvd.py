"""FedSVD: B is trained and averaged; the SVD of B A then gives a new A with orthonormal rows.

Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, NeurIPS 2025,
arXiv 2505.12805.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import check_equal_ranks, check_shared, mean_factors
from fedmomentum.lowrank import CORE_DTYPE, LowRank, numerical_rank
from fedmomentum.sums import Matrix


@dataclass(frozen=True)
class FedSVD(Method):
    r"""`(sum_i w_i B_i) A = U S V^T`; the new `B = U S` `(out, rank)`, `A = V^T` `(rank, in)`: `A A^T = I`.

    The product is unchanged and is the exact sum, since A is frozen within a round and the same for all. It has
    at most rank `rank`, so nothing is cut. Where it has less, the spare rows of A span what the last A spanned.

    Learning rate: the paper trains with SGD at 0.5; A's rows have unit length, unlike LoRA's.

    Raises (when called):
        ValueError: clients of another rank, or whose A differ in a bit.

    Source:
        arXiv 2505.12805; its code decomposes every round by default, and so do we, in float64.
    """

    title = "FedSVD"
    paper = (
        "Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, NeurIPS 2025, "
        "arXiv 2505.12805"
    )
    exact = True
    best_rank = True

    def trains(self, server_round: int) -> str:
        """B, always."""
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
        """Average B of one module and rotate; see `Method`."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        check_shared(self.title, updates, "A")
        product = LowRank(mean_factors(updates, weights).B, updates[0].A.to(CORE_DTYPE))
        U, S, Vh = product.svd()
        S[numerical_rank(S, product.shape, CORE_DTYPE) :] = 0  # round-off of the core; V is orthonormal all the same
        return Aggregate(LowRank(U * S, Vh).to(adapter_dtype(updates)))
