"""FedMomentum: the exact sum; its leading directions train on, the rest goes to the base.

Yan et al., FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning, arXiv 2603.08014.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, adapter_dtype, check_updates
from fedmomentum.aggregation.gauge import aligned_split, balanced_split, singular_split, spare_rows
from fedmomentum.lowrank import (
    CORE_DTYPE,
    LowRank,
    difference,
    energy_rank,
    from_svd,
    numerical_rank,
    randomised_svd,
    weighted_sum,
)


@dataclass(frozen=True)
class FedMomentum:
    r"""`sum_i w_i B_i A_i = U S V^T`; adapter `U_r S_r V_r^T`, residual the rest.

    Args:
        split: how the singular values are shared between B and A, a free choice of gauge
            (`B A = (B G^-1)(G A)`): `balanced` is the paper's `B = U_r S_r^1/2`, `A = S_r^1/2 V_r^T`;
            `singular` has `B = U_r S_r`, `A = V_r^T`; `aligned` keeps the clients' mean A where it can.
        energy: share of the squared singular values applied this round, in (0, 1]. The leading `rank`
            directions are always applied; what is left beyond the share is carried into the next sum.
        svd: `exact` works on the factors; `randomised` is the published sketch of the dense sum, of width
            `sum of the ranks`, for comparison. The residual is the sum minus the adapter with either.

    Raises:
        ValueError: an unknown split or svd, or an energy outside (0, 1].

    Source:
        arXiv 2603.08014, aggregation step; the factored SVD as such is FLoRIST's, arXiv 2506.09199.
    """

    split: str = "balanced"
    energy: float = 1.0
    svd: str = "exact"
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings when they are made, not in the middle of a round."""
        if self.split not in ("balanced", "singular", "aligned"):
            raise ValueError(f"split must be balanced, singular or aligned; got {self.split!r}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy is a share and must be in (0, 1]; got {self.energy!r}")
        if self.svd not in ("exact", "randomised"):
            raise ValueError(f"svd must be exact or randomised; got {self.svd!r}")

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
        """Aggregate one module; see `Method`. Findings: `retained_energy`, and `fallback` for `aligned`."""
        del server_round
        check_updates(updates, weights, rank)
        generator = generator or torch.Generator().manual_seed(0)
        dtype = adapter_dtype(updates)
        parts, shares = list(updates), weights.tolist()
        total = weighted_sum(parts + ([carried] if carried else []), shares + ([1.0] if carried else []))

        if self.svd == "exact":
            U, S, Vh = total.svd()
        else:
            U, S, Vh = randomised_svd(total, total.rank, generator)
        held = numerical_rank(S, total.shape, CORE_DTYPE)  # below it is round-off of the float64 core itself
        U, S, Vh = U[:, :held], S[:held], Vh[:held]
        keep = min(rank, numerical_rank(S, total.shape))
        lead = U[:, :keep], S[:keep], Vh[:keep]
        findings = {"energy": float(S.square().sum()), "kept_energy": float(lead[1].square().sum())}

        if self.split == "balanced":
            B, A = balanced_split(*lead)
        elif self.split == "singular":
            B, A = singular_split(*lead)
        else:
            B, A, aligned = aligned_split(*lead, mean_A=_mean_A(updates, weights, rank))
            findings["fallback"] = float(not aligned)
        if keep < rank:  # a direction that is zero in both factors would never train again
            A = torch.cat([A, spare_rows(lead[2], rank - keep, reference, generator)])
            B = torch.cat([B, B.new_zeros(B.shape[0], rank - keep)], dim=1)
        adapter = LowRank(B.to(dtype), A.to(dtype))

        end = max(keep, energy_rank(S, self.energy)) if self.energy < 1 else len(S)
        if self.svd == "exact":
            residual = from_svd(U[:, keep:end], S[keep:end], Vh[keep:end], dtype)
        else:  # a sketch may miss directions: what the adapter does not hold is measured, not assumed
            rest = LowRank(U[:, end:] * S[end:], Vh[end:])
            residual = difference(difference(total, adapter), rest).recompress().to(dtype)
        tail = from_svd(U[:, end:], S[end:], Vh[end:], dtype)
        return Aggregate(
            adapter=adapter,
            residual=residual,
            carried=tail if tail.rank else None,
            findings=findings,
        )


def _mean_A(updates: Sequence[LowRank], weights: Tensor, rank: int) -> Tensor:
    """`sum_i w_i A_i` `(rank, in)`; rows that a smaller client lacks count as zero, rows beyond are left out."""
    mean = torch.zeros(rank, updates[0].shape[1], dtype=torch.float64, device=updates[0].device)
    for w_i, update in zip(weights.tolist(), updates, strict=True):
        rows = min(rank, update.rank)
        mean[:rows] += w_i * update.A[:rows].to(torch.float64)
    return mean
