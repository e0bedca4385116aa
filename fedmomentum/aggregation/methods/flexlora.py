"""FlexLoRA: the SVD of the exact sum, truncated at each client's rank.

Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources, NeurIPS 2024, arXiv 2402.11505.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.aggregation.splits import pad_rank, singular_split
from fedmomentum.linalg.truncated_svd.dispatch import truncated_svd

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FlexLoRA(Method):
    r"""The truncated SVD of the exact sum: `B = U_r S_r` `(out, rank)`, `A = V_r^T` `(rank, in)`.

    Here `sum_i w_i B_i A_i = U S V^T`. A client of rank `r_i` takes the first `r_i` components,
    with S and the scalings in B. A client loses what lies beyond its rank: with mixed ranks, energy
    concentrates, round by round, in the components that the smallest rank keeps.

    Source:
        arXiv 2402.11505 and its code (FederatedScope, branch FlexLoRA), where `lora_alpha` is the
        same for all ranks, so scalings differ. Its dense SVD yields the same numbers. A public port
        takes `B = U S^1/2` and `A = V^T`, and so loses `S^1/2`; here all of S is in B.
    """

    title = "FlexLoRA"
    paper = (
        "Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and "
        "Client Resources, NeurIPS 2024, arXiv 2402.11505"
    )
    depends_on = "product"
    unequal_ranks = True
    best_rank = True

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Truncate the sum at the rank. Findings: the energies."""
        generator = context.generator()
        svd = truncated_svd(
            updates,
            updates.weights,
            context.rank,
            dtype=updates.dtype,
            reference=context.reference,
            generator=generator,
        )
        B, A = singular_split(svd.U, svd.S, svd.Vh)
        adapter = pad_rank(
            B, A, svd.Vh, rank=context.rank, reference=context.reference, generator=generator
        )
        findings = {
            "energy": svd.energy,
            "kept_energy": float(svd.S.square().sum()),
            "dropped_energy": svd.residual_energy,
        }
        return ModuleAggregate(adapter, findings=findings)
