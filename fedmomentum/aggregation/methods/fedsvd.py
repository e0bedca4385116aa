"""FedSVD: B is trained and averaged; the SVD of B A then gives a new A with orthonormal rows.

Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, NeurIPS
2025, arXiv 2505.12805.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, numerical_rank

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FedSVD(Method):
    r"""The mean of B, orthogonalized: `(sum_i w_i B_i) A = U S V^T`, then `B = U S`, `A = V^T`.

    B is `(out, rank)`, A `(rank, in)` with `A A^T = I`. The product does not change and is the
    exact sum, since A is frozen within a round and the same for all clients. Its rank is at most
    `rank`, so nothing is truncated. If it is lower, the spare rows of A lie in the row space of the
    previous A.

    Learning rate: the paper trains with SGD at 0.5; the rows of A have unit length, unlike LoRA's.

    Source:
        arXiv 2505.12805; its code runs the SVD in every round by default; so do we, in float64.
    """

    title = "FedSVD"
    paper = (
        "Lee et al., FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA, "
        "NeurIPS 2025, arXiv 2505.12805"
    )
    depends_on = "factors"
    exact = True
    best_rank = True

    def trained_factors(self, server_round: int) -> str:
        """Return B, in every round."""
        return "B"

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Average B and orthonormalize the rows of A."""
        A = updates[0].A.to(CORE_DTYPE)
        product = LowRank(updates.mean_factors().B, A)
        U, S, Vh = product.svd()
        # Beyond the numerical rank S is round-off, while all rows of Vh are orthonormal.
        S[numerical_rank(S, product.shape, CORE_DTYPE) :] = 0
        return ModuleAggregate(LowRank(U * S, Vh))
