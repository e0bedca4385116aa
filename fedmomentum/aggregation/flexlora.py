"""FlexLoRA: the SVD of the exact sum, cut at each client's rank.

Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources,
NeurIPS 2024, arXiv 2402.11505.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.gauge import singular_split, with_spares
from fedmomentum.leading import leading
from fedmomentum.lowrank import LowRank
from fedmomentum.sums import Matrix


@dataclass(frozen=True)
class FlexLoRA(Method):
    r"""`sum_i w_i B_i A_i = U S V^T`; adapter `B = U_r S_r` `(out, rank)`, `A = V_r^T` `(rank, in)`.

    A client of rank `r_i` takes the first `r_i` components, with all of `S` and of the scalings on B. What is
    beyond a rank is lost: with mixed ranks the energy sinks, round by round, into the smallest.

    Source:
        arXiv 2402.11505 and its code (FederatedScope, branch FlexLoRA): `lora_alpha` is one for all ranks there,
        so scalings differ. Its dense SVD gives the same numbers. A public port leaves `S^1/2` out of A; we do not.
    """

    title = "FlexLoRA"
    paper = (
        "Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources, "
        "NeurIPS 2024, arXiv 2402.11505"
    )
    unequal_ranks = True
    best_rank = True

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
        """Cut one module's sum at `rank`; see `Method`. Findings: energies, `dropped_energy`."""
        check_updates(updates, weights, rank)
        dtype = adapter_dtype(updates)
        found = leading(updates, weights, rank, dtype=dtype, reference=reference, generator=generator)
        B, A = singular_split(found.U, found.S, found.Vh)
        adapter = with_spares(B, A, found.Vh, rank=rank, reference=reference, generator=generator)
        kept = float(found.S.square().sum())
        findings = {"energy": found.energy, "kept_energy": kept, "dropped_energy": found.left}
        return Aggregate(adapter.to(dtype), findings=findings)
