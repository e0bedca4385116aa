"""FLoRA: stack the factors; the base absorbs the whole sum, and clients start from a fresh adapter.

Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations, NeurIPS 2024, arXiv 2409.05976.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.matrix import norm
from fedmomentum.lora.adapter import fresh_adapter

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FLoRA(Method):
    r"""The stacked sum as the residual, a fresh adapter: `[w_1 B_1, ..., w_n B_n] [A_1; ...; A_n]`.

    The stack is `sum_i w_i B_i A_i`; its factors are `(out, R)` and `(R, in)`, with R the sum of
    the clients' ranks. The fresh A is uniform in +-1/sqrt(in), sampled from the seed of the call,
    so it need not be sent to clients that have the seed. Because B is zero, A has no gradient in
    the first step of a round.

    Source:
        arXiv 2409.05976, section 3. As there, the weights are on one side only (a public port has
        them on both), and the residual uses the clients' own scalings. A is resampled every round;
        other code reuses the first.
    """

    title = "FLoRA"
    paper = (
        "Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous "
        "Low-Rank Adaptations, NeurIPS 2024, arXiv 2409.05976"
    )
    depends_on = "product"
    residual_rank = "q = n r"
    exact = True
    unequal_ranks = True
    fresh = True

    def sent_factors(self, server_round: int) -> str:
        """Return no factor: only the residual is sent."""
        return ""

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Stack the factors. Findings: the energies; the adapter keeps none of it."""
        adapter = fresh_adapter(
            updates.shape,
            context.rank,
            context.generator(),
            dtype=updates.dtype,
            device=updates.device,
        )
        # The adapter holds no part of the sum: all of it is the residual.
        total = updates.sum()
        findings = {"energy": norm(total) ** 2, "kept_energy": 0.0}
        return ModuleAggregate(adapter, total, findings=findings)
