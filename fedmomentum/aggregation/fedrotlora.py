"""FedRot-LoRA: turn each client's factors towards the last mean, then average them.

Zhang et al., FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA, ICML 2026, arXiv 2602.23638.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import averaging_error, check_equal_ranks, mean_factors
from fedmomentum.lowrank import CORE_DTYPE, LowRank
from fedmomentum.sums import Each, Matrix, norm


@dataclass(frozen=True)
class FedRotLoRA(Method):
    r"""`B = sum_i w_i B_i R_i`, `A = sum_i w_i R_i^T A_i`, with `R_i` the rotation nearest to the reference.

    `R_i = argmin ||R^T A_i - A_ref||_F` in even rounds, `argmin ||B_i R - B_ref||_F` in odd ones, the reference
    being what clients were sent. `B_i R_i R_i^T A_i = B_i A_i`: the products stay, their average's error shrinks,
    to `sum_i w_i (B_i R_i - B)(R_i^T A_i - A)`. Without a reference, or with its B zero, it is FedIT.

    Args:
        rotation: `soft` takes the rotation nearest to `(1 - strength) I + strength R_i`, of determinant 1; `hard`
            takes `R_i` among all orthogonal matrices, reflections included, whatever the strength.
        strength: lambda of the soft rotation, in [0, 1]; 0 is FedIT.

    Raises:
        ValueError: an unknown rotation, a strength outside [0, 1]; when called, clients of another rank.

    Source:
        arXiv 2602.23638: soft, best at 0.4 to 0.6. Its code's default (1.5) is the hard one. There clients turn
        their factors and rounds count from 0; the server has all it takes, and turns them for the same result.
    """

    rotation: str = "soft"
    strength: float = 0.5
    title = "FedRot-LoRA"
    paper = (
        "Zhang et al., FedRot-LoRA: Mitigating Rotational Misalignment in Federated LoRA, ICML 2026, arXiv 2602.23638"
    )

    def __post_init__(self) -> None:
        """Check the settings when they are made."""
        if self.rotation not in ("soft", "hard"):
            raise ValueError(f"rotation must be soft or hard; got {self.rotation!r}")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be in [0, 1]; got {self.strength!r}")

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
        """Turn and average one module; see `Method`. Findings: `dropped_energy`."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        turned = Each(lambda update: update.to(CORE_DTYPE), updates)
        if reference is not None and bool(reference.B.any()):
            towards = reference.to(CORE_DTYPE)
            turned = Each(lambda update: self.turn(update.to(CORE_DTYPE), towards, server_round), updates)
        mean = mean_factors(turned, weights)
        lost = norm(averaging_error(turned, weights, mean), adapter_dtype(updates)) ** 2
        return Aggregate(mean.to(adapter_dtype(updates)), findings={"dropped_energy": lost})

    def turn(self, update: LowRank, reference: LowRank, server_round: int) -> LowRank:
        """`B_i R`, `R^T A_i`: the same product, nearer to the reference in A (even rounds) or in B (odd ones)."""
        soft = self.rotation == "soft"
        match = update.A @ reference.A.mT if server_round % 2 == 0 else update.B.mT @ reference.B
        R = _nearest(match, proper=soft)  # (rank, rank)
        if soft:
            R = _nearest((1 - self.strength) * torch.eye(len(R), dtype=R.dtype, device=R.device) + self.strength * R)
        return LowRank(update.B @ R, R.mT @ update.A)


def _nearest(M: Tensor, *, proper: bool = True) -> Tensor:
    """The orthogonal matrix nearest to M: `U V^T`, or `U diag(1, ..., det(U V^T)) V^T` for a proper rotation."""
    U, _, Vh = torch.linalg.svd(M)
    if proper and torch.linalg.det(U @ Vh) < 0:
        U = torch.cat([U[:, :-1], -U[:, -1:]], dim=1)
    return U @ Vh
