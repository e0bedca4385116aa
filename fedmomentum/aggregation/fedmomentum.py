"""FedMomentum: the exact sum; its leading directions train on, the rest goes to the base.

Yan et al., FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning, arXiv 2603.08014.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.gauge import aligned_split, balanced_split, mean_rows, singular_split, with_spares
from fedmomentum.aggregation.unequal import first_components, in_order
from fedmomentum.deflation import Leading
from fedmomentum.leading import leading
from fedmomentum.lowrank import (
    CORE_DTYPE,
    LowRank,
    difference,
    energy_rank,
    from_svd,
    numerical_rank,
    weighted_sum,
    zeros,
)
from fedmomentum.lowrank import randomised_svd as sketched_svd
from fedmomentum.sums import Matrix, exact_sum, norm, plus, rank_of, strongest


@dataclass(frozen=True)
class FedMomentum(Method):
    r"""`sum_i w_i B_i A_i = U S V^T`; adapter `U_r S_r V_r^T`, residual the rest.

    Args:
        split: how the singular values are shared between B and A, a free choice of gauge
            (`B A = (B G^-1)(G A)`): `balanced` is the paper's `B = U_r S_r^1/2`, `A = S_r^1/2 V_r^T`;
            `singular` has `B = U_r S_r`, `A = V_r^T`; `aligned` keeps the clients' mean A where it can.
        energy: share of the squared singular values applied this round, in (0, 1]. The leading `rank`
            directions are always applied; what is left beyond the share is carried into the next sum.
        svd: `exact` works on the factors; `randomised` is the published sketch of the dense sum, of width
            `sum of the ranks`, for comparison. The residual is the sum minus the adapter with either.
        residual: `merged` into the base; `carried` into the next round's sum instead; `dropped`, an ablation
            that is not exact.
        merge_every: merge in every so many rounds only. What waits stays out of the sums, and is not lost.

    Raises:
        ValueError: a setting that is unknown or out of range, or two that exclude each other.

    Source:
        arXiv 2603.08014, aggregation step; the factored SVD as such is FLoRIST's, arXiv 2506.09199. Published
        code drops what is beyond the energy share and forgets the scaling of the residual; we do neither.
    """

    split: str = "balanced"
    energy: float = 1.0
    svd: str = "exact"
    residual: str = "merged"
    merge_every: int = 1
    title = "FedMomentum"
    paper = (
        "Yan et al., FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning, 2026, arXiv 2603.08014"
    )
    residual_rank = "q <= (n-1) r"
    unequal_ranks = True
    best_rank = True
    keeps_tail = True

    def __post_init__(self) -> None:
        """Check the settings when they are made, not in the middle of a round."""
        if self.split not in ("balanced", "singular", "aligned"):
            raise ValueError(f"split must be balanced, singular or aligned; got {self.split!r}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy is a share and must be in (0, 1]; got {self.energy!r}")
        if self.svd not in ("exact", "randomised"):
            raise ValueError(f"svd must be exact or randomised; got {self.svd!r}")
        if self.residual not in ("merged", "carried", "dropped"):
            raise ValueError(f"residual must be merged, carried or dropped; got {self.residual!r}")
        if not isinstance(self.merge_every, int) or self.merge_every < 1:
            raise ValueError(f"merge_every is a number of rounds, at least 1; got {self.merge_every!r}")
        if self.merge_every > 1 and self.residual != "merged":
            raise ValueError(f"merge_every says when a residual is merged, and it is {self.residual}; leave it at 1")
        if self.energy < 1 and (self.merge_every > 1 or self.residual != "merged"):
            raise ValueError("energy below 1 says what is merged every round; leave it at 1, or the residual at merged")

    @property
    def exact(self) -> bool:
        """Unless the residual is dropped."""
        return self.residual != "dropped"

    def localise(self, adapter: LowRank, rank: int) -> tuple[LowRank, LowRank]:
        """The best of that rank; slices for splits whose components are singular directions."""
        return first_components(in_order(adapter) if self.split == "aligned" else adapter, rank)

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
        """Aggregate one module; see `Method`. Findings: energies, and `fallback` for `aligned`."""
        check_updates(updates, weights, rank)
        generator = generator or torch.Generator().manual_seed(0)
        dtype = adapter_dtype(updates)
        tail: Matrix
        entering = [carried] if carried is not None and self.merge_every == 1 else []
        if self.svd == "randomised":  # for comparison, and with the factors of all clients at once
            parts = [*updates, *(matrix for matrix in entering if isinstance(matrix, LowRank))]
            total = weighted_sum(parts, weights.tolist() + [1.0] * len(entering))
            found, tail = self._cut(*sketched_svd(total, total.rank, generator), None, rank)
        elif self.energy == 1:
            found = leading(
                updates, weights, rank, also=entering, dtype=dtype, reference=reference, generator=generator
            )  # fmt: skip
            tail = zeros(updates[0].shape, device=updates[0].device)
        else:
            every = exact_sum(updates, weights, entering)
            found, tail = self._cut(*strongest(every, rank, generator, energy=self.energy, near=reference), rank)
        lead, rest = (found.U, found.S, found.Vh), found.rest
        findings = {"kept_energy": float(found.S.square().sum())}
        if found.known is not None or self.residual == "dropped" or self.merge_every > 1:
            findings["energy"] = found.energy  # elsewhere it is what adapter, residual and carried hold together

        if self.split == "aligned":
            B, A, aligned = aligned_split(*lead, mean_A=mean_rows(updates, weights, rank))
            findings["fallback"] = float(not aligned)
        else:
            B, A = balanced_split(*lead) if self.split == "balanced" else singular_split(*lead)
        adapter = with_spares(B, A, found.Vh, rank=rank, reference=reference, generator=generator).to(dtype)
        if self.svd == "randomised":  # a sketch may miss directions: what the adapter does not hold is measured
            held = plus(adapter, tail)
            rest = difference(total, held).recompress() if isinstance(held, LowRank) else rest
        if self.residual == "dropped":
            return Aggregate(adapter, findings={**findings, "dropped_energy": norm(rest) ** 2})
        if self.residual == "carried":
            tail, rest = rest, zeros(adapter.shape, device=adapter.device)
        elif self.merge_every > 1:
            rest = rest if carried is None else plus(rest, carried)
            rest = rest.recompress() if isinstance(rest, LowRank) else rest
            if server_round % self.merge_every:
                tail, rest = rest, tail
        return Aggregate(adapter, rest.to(dtype), tail.to(dtype) if rank_of(tail) else None, findings)

    def _cut(self, U: Tensor, S: Tensor, Vh: Tensor, beyond: Tensor | None, rank: int) -> tuple[Leading, Matrix]:
        """The leading directions, the rest up to the energy share, and the tail: what lies beyond that."""
        shape, found = (len(U), Vh.shape[1]), float(S.square().sum())
        missed = norm(beyond) ** 2 if beyond is not None else 0.0
        held = numerical_rank(S, shape, CORE_DTYPE)  # below it is round-off of the float64 core itself
        keep = min(rank, numerical_rank(S, shape))
        share = self.energy * (found + missed) / found if found else 1.0  # of what was looked for
        end = max(keep, energy_rank(S, share)) if self.energy < 1 else held
        rest, tail = (from_svd(U[:, i:j], S[i:j], Vh[i:j], CORE_DTYPE) for i, j in ((keep, end), (end, held)))
        left = float(S[keep:].square().sum()) + missed
        cut = Leading(U[:, :keep], S[:keep], Vh[:keep], rest, "svd", left)
        return cut, tail if beyond is None else plus(beyond, tail)
