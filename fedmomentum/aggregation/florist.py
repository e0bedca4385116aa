"""FLoRIST: the stacked sum, cut at a share of its energy, goes to the base; clients start afresh.

Ramesh, Dass, FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models, MLSys 2026, arXiv 2506.09199.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import fresh_adapter
from fedmomentum.lowrank import CORE_DTYPE, LowRank, energy_rank, from_svd, numerical_rank
from fedmomentum.sums import Matrix, exact_sum, norm, strongest


@dataclass(frozen=True)
class FLoRIST(Method):
    r"""Residual `U_p S_p V_p^T`, `p` the least rank with `sum_{i<=p} S_i^2 >= energy sum S_i^2`; adapter fresh.

    The sum is FLoRA's, so that `energy = 1` is FLoRA at the least rank. Residual `B = U_p S_p` `(out, p)`,
    `A = V_p^T` `(p, in)`, as in the paper; `p` differs from module to module. What is beyond is lost.

    Args:
        energy: the paper's threshold tau, in (0, 1]. It is tuned there for each task (0.87 to 0.99).

    Raises:
        ValueError: an energy outside (0, 1].

    Source:
        arXiv 2506.09199, algorithm 1. The paper never mentions the scaling; here it counts, as everywhere. Two
        QR and one core SVD stand for the paper's two SVD and one: the same numbers.
    """

    energy: float = 0.99
    title = "FLoRIST"
    paper = (
        "Ramesh, Dass, FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of "
        "Large Language Models, MLSys 2026, arXiv 2506.09199"
    )
    residual_rank = "q <= n r"
    unequal_ranks = True
    fresh = True

    def __post_init__(self) -> None:
        """Check the setting when it is made."""
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy is a share and must be in (0, 1]; got {self.energy!r}")

    @property
    def exact(self) -> bool:
        """Where nothing is cut."""
        return self.energy == 1

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
        """Cut one module's sum; see `Method`. Findings: energies, `dropped_energy`; the adapter keeps nothing."""
        check_updates(updates, weights, rank)
        dtype, shape, device = adapter_dtype(updates), updates[0].shape, updates[0].device
        adapter = fresh_adapter(shape, rank, generator, dtype=dtype, device=device)
        generator = generator or torch.Generator().manual_seed(0)
        U, S, Vh, beyond = strongest(exact_sum(updates, weights), rank, generator, energy=self.energy)
        energies, missed = S.square(), norm(beyond) ** 2 if beyond is not None else 0.0
        energy = float(energies.sum()) + missed
        share = self.energy * energy / (energy - missed) if energy else 1.0  # of what was looked for
        p = energy_rank(S, share) if self.energy < 1 else numerical_rank(S, shape, CORE_DTYPE)
        residual = from_svd(U[:, :p], S[:p], Vh[:p], dtype)
        findings = {"energy": energy, "kept_energy": 0.0, "dropped_energy": float(energies[p:].sum()) + missed}
        return Aggregate(adapter, residual, findings=findings)
