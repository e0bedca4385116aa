"""FedMomentum: the exact sum; its leading directions keep training, the base absorbs the rest.

Yan et al., FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning,
arXiv 2603.08014.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.aggregation.splits import (
    aligned_split,
    balanced_split,
    pad_rank,
    procrustes_split,
    singular_split,
)
from fedmomentum.linalg.low_rank import (
    CORE_DTYPE,
    LowRank,
    difference,
    energy_rank,
    from_svd,
    numerical_rank,
    weighted_sum,
    zeros,
)
from fedmomentum.linalg.matrix import Matrix, add, norm
from fedmomentum.linalg.spectral import randomized_svd
from fedmomentum.linalg.truncated_svd.deflation import TruncatedSVD
from fedmomentum.linalg.truncated_svd.dense import dense_truncated_svd
from fedmomentum.linalg.truncated_svd.dispatch import truncated_svd

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


SPLITS = ("balanced", "procrustes", "singular", "aligned")


class Decomposition(NamedTuple):
    """`sum = U S V^T + svd.residual + tail`.

    Attributes:
        svd: The leading directions, and the residual beyond them, up to the energy fraction.
        tail: What lies beyond the energy fraction; of rank 0 if `energy` is 1.
        total: The sum itself if `svd` is only a sketch of it, to compute the residual from.
    """

    svd: TruncatedSVD
    tail: Matrix
    total: LowRank | None = None


@dataclass(frozen=True)
class FedMomentum(Method):
    r"""The exact sum `U S V^T` split in two: `U_r S_r V_r^T` is the adapter, the rest the residual.

    `sum_i w_i B_i A_i = U S V^T`, and r is the rank of the adapter.

    Args:
        split: How the singular values are divided between B and A, a free choice of gauge
            (`B A = (B G^-1)(G A)`): `balanced` is as published, `B = U_r S_r^1/2`,
            `A = S_r^1/2 V_r^T`; `procrustes` rotates these toward the clients' mean factors, so
            that optimizer moments need no rotation; `singular` has `B = U_r S_r`, `A = V_r^T`;
            `aligned` keeps the clients' mean A if possible.
        energy: Fraction of the squared singular values applied in this round, in (0, 1]. The
            leading `rank` directions are always applied; whatever lies beyond the fraction is
            carried into the next sum.
        svd: `exact` works on the factors; `randomized` is the published sketch of the dense sum, of
            width `sum_i rank_i`, for comparison. With either, the residual is the sum minus the
            adapter.
        residual: `merged` into the base; `carried` into the next round's sum instead; `dropped`, an
            ablation that is not exact.
        merge_every: Merge only every this many rounds. Until then, residuals accumulate outside of
            the sums, so nothing is lost.

    Raises:
        ValueError: If a setting is unknown or out of range, or two settings conflict.

    Source:
        arXiv 2603.08014, aggregation step; the factored SVD itself is from FLoRIST, arXiv
        2506.09199. The published code drops what lies beyond the energy fraction and omits the
        scaling of the residual; we do neither.
    """

    split: str = "balanced"
    energy: float = 1.0
    svd: str = "exact"
    residual: str = "merged"
    merge_every: int = 1
    title = "FedMomentum"
    paper = (
        "Yan et al., FedMomentum: Preserving LoRA Training Momentum in Federated Fine-Tuning, "
        "2026, arXiv 2603.08014"
    )
    depends_on = "product"
    residual_rank = "q <= (n-1) r"
    lighter_residual = (
        'an energy below 1 in [method.settings] sends less of it, and residual = "carried" none; '
        "the rest is carried into the next sum"
    )
    unequal_ranks = True
    best_rank = True
    keeps_tail = True
    shares_moments = True

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.split not in SPLITS:
            raise ValueError(f"split must be {', '.join(SPLITS)}; got {self.split!r}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy is a fraction and must be in (0, 1]; got {self.energy!r}")
        if self.svd not in ("exact", "randomized"):
            raise ValueError(f"svd must be exact or randomized; got {self.svd!r}")
        if self.residual not in ("merged", "carried", "dropped"):
            raise ValueError(f"residual must be merged, carried or dropped; got {self.residual!r}")
        if not isinstance(self.merge_every, int) or self.merge_every < 1:
            raise ValueError(
                f"merge_every is a number of rounds, at least 1; got {self.merge_every!r}"
            )
        if self.merge_every > 1 and self.residual != "merged":
            raise ValueError(
                f"merge_every says when a residual is merged, but residual is {self.residual}; "
                "leave merge_every at 1"
            )
        if self.energy < 1 and (self.merge_every > 1 or self.residual != "merged"):
            raise ValueError(
                "energy below 1 says what is merged every round; leave energy at 1, or residual at "
                "merged and merge_every at 1"
            )

    @property
    def exact(self) -> bool:
        """Whether the residual is kept."""
        return self.residual != "dropped"

    def max_residual_rank(self, rank: int, num_updates: int) -> int:
        """Return the rank of what is merged: of one round, or of `merge_every` rounds together."""
        if self.residual != "merged":
            return 0
        return self.merge_every * (num_updates - 1) * rank

    def client_adapter(self, adapter: LowRank, rank: int) -> tuple[LowRank, LowRank]:
        """Split off the best approximation of the adapter at that rank.

        These are its first components, except for `procrustes` and `aligned`, whose components are
        not singular directions.
        """
        if self.split in ("procrustes", "aligned"):
            adapter = adapter.canonical()
        return adapter.split_rank(rank)

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Decompose the sum, split its leading directions, and route the residual.

        Findings: the energies, and `fallback` for the `aligned` split.
        """
        generator = context.generator()
        if self.svd == "exact":
            svd, tail, total = self._decompose(updates, context, generator)
        else:
            svd, tail, total = self._decompose_sketch(updates, context, generator)
        findings = {"kept_energy": float(svd.S.square().sum())}
        # Otherwise, computing the energy of the whole sum would cost an extra pass.
        if (
            svd.known_residual_energy is not None
            or self.residual == "dropped"
            or self.merge_every > 1
        ):
            findings["energy"] = svd.energy

        # Divide the singular values between B and A; spare rows of A stay trainable.
        adapter = self._split(svd, updates, context, generator, findings).to(updates.dtype)

        residual = svd.residual
        if total is not None:
            # A sketch may miss directions, so the residual is the sum minus what was applied.
            assert isinstance(tail, LowRank)
            applied = weighted_sum([adapter, tail], [1.0, 1.0])
            residual = difference(total, applied).recompress()
        return self._route(adapter, residual, tail, context, findings)

    def _decompose(
        self, updates: ClientUpdates, context: AggregationContext, generator: torch.Generator
    ) -> Decomposition:
        """Decompose the sum of the updates and of what was carried over."""
        carried = self._carried_into_sum(context)
        if self.energy < 1:
            U, S, Vh, remainder = dense_truncated_svd(
                updates.sum(carried),
                context.rank,
                generator,
                energy=self.energy,
                near=context.reference,
            )
            return self._truncate(U, S, Vh, remainder, context.rank)
        svd = truncated_svd(
            updates,
            updates.weights,
            context.rank,
            extra=carried,
            dtype=updates.dtype,
            reference=context.reference,
            generator=generator,
        )
        return Decomposition(svd, zeros(updates.shape, device=updates.device))

    def _decompose_sketch(
        self, updates: ClientUpdates, context: AggregationContext, generator: torch.Generator
    ) -> Decomposition:
        """Decompose the sum as published, with the factors of all clients in memory."""
        # Whatever was carried over enters the sum with weight 1.
        parts = list(updates)
        weights = updates.weights.tolist()
        for matrix in self._carried_into_sum(context):
            if not isinstance(matrix, LowRank):
                raise ValueError("svd 'randomized' takes what was carried as factors; got a matrix")
            parts.append(matrix)
            weights.append(1.0)
        total = weighted_sum(parts, weights)
        U, S, Vh = randomized_svd(total, total.rank, generator)
        svd, tail, _ = self._truncate(U, S, Vh, None, context.rank)
        return Decomposition(svd, tail, total)

    def _carried_into_sum(self, context: AggregationContext) -> list[Matrix]:
        """Return what was carried over, unless it is only waiting to be merged."""
        if context.carried is None or self.merge_every > 1:
            return []
        return [context.carried]

    def _truncate(
        self, U: Tensor, S: Tensor, Vh: Tensor, remainder: Tensor | None, rank: int
    ) -> Decomposition:
        """Split an SVD into leading directions, residual, and tail beyond the energy fraction.

        Args:
            U: `(out, m)`.
            S: `(m,)`, descending.
            Vh: `(m, in)`.
            remainder: The sum minus `U S Vh`; None if that is zero.
            rank: Maximum number of leading directions.
        """
        shape = (len(U), Vh.shape[1])
        remainder_energy = norm(remainder) ** 2 if remainder is not None else 0.0
        # Singular values beyond this index are round-off of the float64 core itself.
        end = numerical_rank(S, shape, CORE_DTYPE)
        keep = min(rank, numerical_rank(S, shape))
        cut = end
        if self.energy < 1:
            # Convert the fraction of the whole energy to a fraction of the energy within S.
            energy = float(S.square().sum())
            fraction = self.energy * (energy + remainder_energy) / energy if energy else 1.0
            cut = max(keep, energy_rank(S, fraction))
        residual = from_svd(U[:, keep:cut], S[keep:cut], Vh[keep:cut], CORE_DTYPE)
        tail: Matrix = from_svd(U[:, cut:end], S[cut:end], Vh[cut:end], CORE_DTYPE)
        if remainder is not None:
            tail = add(remainder, tail)
        # Including the tail: the energy of the sum without its leading directions.
        beyond = float(S[keep:].square().sum()) + remainder_energy
        svd = TruncatedSVD(U[:, :keep], S[:keep], Vh[:keep], residual, "svd", beyond)
        return Decomposition(svd, tail)

    def _split(
        self,
        svd: TruncatedSVD,
        updates: ClientUpdates,
        context: AggregationContext,
        generator: torch.Generator,
        findings: dict[str, float],
    ) -> LowRank:
        """Return the adapter of the leading directions, in the chosen split."""
        rank = context.rank
        reference = context.reference
        if self.split == "procrustes":
            return procrustes_split(
                svd.U,
                svd.S,
                svd.Vh,
                updates.padded_mean(rank),
                reference=reference,
                generator=generator,
            )
        if self.split == "aligned":
            B, A, is_aligned = aligned_split(svd.U, svd.S, svd.Vh, mean_A=updates.mean_A(rank))
            findings["fallback"] = float(not is_aligned)
        elif self.split == "balanced":
            B, A = balanced_split(svd.U, svd.S, svd.Vh)
        else:
            B, A = singular_split(svd.U, svd.S, svd.Vh)
        return pad_rank(B, A, svd.Vh, rank=rank, reference=reference, generator=generator)

    def _route(
        self,
        adapter: LowRank,
        residual: Matrix,
        tail: Matrix,
        context: AggregationContext,
        findings: dict[str, float],
    ) -> ModuleAggregate:
        """Merge, carry or drop the residual, or hold it back until the next merge."""
        if self.residual == "dropped":
            findings["dropped_energy"] = norm(residual) ** 2
            return ModuleAggregate(adapter, findings=findings)
        if self.residual == "merged" and self.merge_every == 1:
            return ModuleAggregate(adapter, residual, tail, findings)
        nothing = zeros(adapter.shape, device=adapter.device)
        if self.residual == "carried":
            return ModuleAggregate(adapter, nothing, residual, findings)
        # Add to what is held back already; merge all of it when `merge_every` divides the round.
        if context.carried is not None:
            residual = add(residual, context.carried)
        if isinstance(residual, LowRank):
            residual = residual.recompress()
        if context.server_round % self.merge_every:
            return ModuleAggregate(adapter, nothing, residual, findings)
        return ModuleAggregate(adapter, residual, None, findings)
