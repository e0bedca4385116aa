"""FedRot-LoRA: rotate each client's factors toward the last mean, then average them.

Zhang et al., FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA, ICML 2026,
arXiv 2602.23638.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank
from fedmomentum.linalg.matrix import norm

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FedRotLoRA(Method):
    r"""FedIT after rotations R_i: `B = sum_i w_i B_i R_i`, `A = sum_i w_i R_i^T A_i`.

    R_i `(rank, rank)` is `argmin ||R^T A_i - A_ref||_F` in even rounds and
    `argmin ||B_i R - B_ref||_F` in odd ones, where the reference is the adapter that the clients
    were sent. The products do not change, `B_i R_i R_i^T A_i = B_i A_i`, but the averaging error
    shrinks to `sum_i w_i (B_i R_i - B)(R_i^T A_i - A)`. Without a reference, or if its B is zero,
    the method reduces to FedIT.

    Args:
        rotation: `soft` takes the rotation, of determinant 1, nearest to
            `(1 - strength) I + strength R_i`; `hard` takes the best `R_i` among all orthogonal
            matrices, including reflections, and ignores the strength.
        strength: Lambda of the soft rotation, in [0, 1]; 0 is FedIT.

    Raises:
        ValueError: If `rotation` is unknown or `strength` is outside [0, 1].

    Source:
        arXiv 2602.23638: soft, best at 0.4 to 0.6. The default of its code (1.5) is the hard
        rotation. There, clients rotate their factors and rounds count from 0; here, the server
        rotates them, since it has everything it needs, with the same result.
    """

    rotation: str = "soft"
    strength: float = 0.5
    title = "FedRot-LoRA"
    paper = (
        "Zhang et al., FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA, ICML "
        "2026, arXiv 2602.23638"
    )

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.rotation not in ("soft", "hard"):
            raise ValueError(f"rotation must be soft or hard; got {self.rotation!r}")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be in [0, 1]; got {self.strength!r}")

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Rotate and average the factors. Findings: `dropped_energy`."""
        # Before the first training step B is zero, so there is nothing to rotate toward.
        rotated = updates.map(lambda update: update.to(CORE_DTYPE))
        if context.reference is not None and bool(context.reference.B.any()):
            reference = context.reference.to(CORE_DTYPE)
            rotated = rotated.map(
                lambda update: self.rotate(update, reference, context.server_round)
            )
        mean = rotated.mean_factors()
        error = norm(rotated.averaging_error(mean), updates.dtype)
        return ModuleAggregate(mean, findings={"dropped_energy": error**2})

    def rotate(self, update: LowRank, reference: LowRank, server_round: int) -> LowRank:
        """Return `B_i R`, `R^T A_i`: the same product, with A or B closer to the reference's."""
        # R is nearest to the cross-Gram matrix of the factors to match (orthogonal Procrustes).
        if server_round % 2 == 0:
            match = update.A @ reference.A.mT  # (rank, rank)
        else:
            match = update.B.mT @ reference.B
        if self.rotation == "hard":
            R = nearest_orthogonal(match)
        else:
            # Go part of the way: the rotation nearest to a weighted mean of I and R.
            R = nearest_rotation(match)
            identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
            R = nearest_rotation((1 - self.strength) * identity + self.strength * R)
        return LowRank(update.B @ R, R.mT @ update.A)


def nearest_orthogonal(M: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to M: `U V^T` of the SVD (the Procrustes problem)."""
    U, _, Vh = torch.linalg.svd(M)
    nearest: Tensor = U @ Vh
    return nearest


def nearest_rotation(M: Tensor) -> Tensor:
    """Return the rotation nearest to M: `U diag(1, ..., 1, det(U V^T)) V^T` (Kabsch)."""
    U, _, Vh = torch.linalg.svd(M)
    if torch.linalg.det(U @ Vh) < 0:
        U = torch.cat([U[:, :-1], -U[:, -1:]], dim=1)
    nearest: Tensor = U @ Vh
    return nearest
