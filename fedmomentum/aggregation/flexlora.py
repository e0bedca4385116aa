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
from fedmomentum.lowrank import LowRank, numerical_rank
from fedmomentum.sums import Matrix, exact_sum, norm, strongest


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
        generator = generator or torch.Generator().manual_seed(0)
        U, S, Vh, beyond = strongest(exact_sum(updates, weights), rank, generator, near=reference)
        keep = min(rank, numerical_rank(S, updates[0].shape))
        B, A = singular_split(U[:, :keep], S[:keep], Vh[:keep])
        adapter = with_spares(B, A, Vh[:keep], rank=rank, reference=reference, generator=generator)
        energies, missed = S.square(), norm(beyond) ** 2 if beyond is not None else 0.0
        findings = {
            "energy": float(energies.sum()) + missed,
            "kept_energy": float(energies[:keep].sum()),
            "dropped_energy": float(energies[keep:].sum()) + missed,
        }
        return Aggregate(adapter.to(adapter_dtype(updates)), findings=findings)
