"""FLoRA: stack the factors; the whole sum goes to the base, and clients start afresh.

Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations,
NeurIPS 2024, arXiv 2409.05976.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import fresh_adapter
from fedmomentum.lowrank import LowRank
from fedmomentum.sums import Matrix, exact_sum, norm


@dataclass(frozen=True)
class FLoRA(Method):
    r"""Residual `[w_1 B_1, ..., w_n B_n] [A_1; ...; A_n] = sum_i w_i B_i A_i`; adapter A fresh, B zero.

    Residual `(out, R)`, `(R, in)` with `R = sum_i rank_i`. The fresh A is uniform in +-1/sqrt(in), drawn from
    `generator`: whoever has its seed need not be sent it. With B zero, A has no gradient in a round's first step.

    Source:
        arXiv 2409.05976. As there, weights stand on one side only (a public port puts them on both) and the
        residual counts with the clients' own scalings. A is drawn anew each round; other code reuses the first.
    """

    title = "FLoRA"
    paper = (
        "Wang et al., FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, "
        "NeurIPS 2024, arXiv 2409.05976"
    )
    residual_rank = "q = n r"
    exact = True
    unequal_ranks = True
    fresh = True

    def sends(self, server_round: int) -> str:
        """Nothing but the residual."""
        return ""

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
        """Stack one module; see `Method`. Findings: energies; the adapter keeps nothing."""
        check_updates(updates, weights, rank)
        dtype, total = adapter_dtype(updates), exact_sum(updates, weights)
        adapter = fresh_adapter(updates[0].shape, rank, generator, dtype=dtype, device=total.device)
        return Aggregate(adapter, total.to(dtype), findings={"energy": norm(total) ** 2, "kept_energy": 0.0})
