"""FLoRIST: the base absorbs the sum truncated at a fraction of its energy; clients start fresh.

Ramesh, Dass, FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning
of Large Language Models, MLSys 2026, arXiv 2506.09199.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.low_rank import CORE_DTYPE, energy_rank, from_svd, numerical_rank
from fedmomentum.linalg.matrix import norm
from fedmomentum.linalg.truncated_svd.dense import dense_truncated_svd
from fedmomentum.lora.adapter import fresh_adapter

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FLoRIST(Method):
    r"""FLoRA with its sum `U S V^T` truncated at an energy fraction: residual `U_p S_p V_p^T`.

    p is the smallest rank with `sum_{i<=p} S_i^2 >= energy sum_i S_i^2`, so `energy = 1` is FLoRA
    at minimal rank. The residual is `B = U_p S_p` `(out, p)`, `A = V_p^T` `(p, in)`, as in the
    paper; p differs between modules. What lies beyond p is lost.

    Args:
        energy: The paper's threshold tau, in (0, 1], tuned per task there (0.87 to 0.99).

    Raises:
        ValueError: If `energy` is outside (0, 1].

    Source:
        arXiv 2506.09199, algorithm 1. The paper never mentions the scaling; here it is applied, as
        for all methods. Two QR decompositions and one core SVD replace the paper's three SVDs, with
        the same numbers.
    """

    energy: float = 0.99
    title = "FLoRIST"
    paper = (
        "Ramesh, Dass, FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated "
        "Fine-Tuning of Large Language Models, MLSys 2026, arXiv 2506.09199"
    )
    depends_on = "product"
    residual_rank = "q <= n r"
    lighter_residual = "a lower energy in [method.settings] drops more of it"
    unequal_ranks = True
    fresh = True

    def __post_init__(self) -> None:
        """Validate the setting."""
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy is a fraction and must be in (0, 1]; got {self.energy!r}")

    @property
    def exact(self) -> bool:
        """Whether nothing is truncated."""
        return self.energy == 1

    def sent_factors(self, server_round: int) -> str:
        """Return no factor: only the residual is sent."""
        return ""

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Truncate the sum. Findings: the energies; the adapter keeps none of it."""
        generator = context.generator()
        adapter = fresh_adapter(
            updates.shape, context.rank, generator, dtype=updates.dtype, device=updates.device
        )
        U, S, Vh, remainder = dense_truncated_svd(
            updates.sum(), context.rank, generator, energy=self.energy
        )
        # A dense sum is decomposed only up to `energy`; `remainder` is the rest.
        energies = S.square()
        beyond = norm(remainder) ** 2 if remainder is not None else 0.0
        energy = float(energies.sum()) + beyond
        if self.energy < 1:
            # Convert the fraction of the whole energy to a fraction of the energy within S.
            fraction = self.energy * energy / (energy - beyond) if energy else 1.0
            p = energy_rank(S, fraction)
        else:
            p = numerical_rank(S, updates.shape, CORE_DTYPE)
        residual = from_svd(U[:, :p], S[:p], Vh[:p], updates.dtype)
        findings = {
            "energy": energy,
            "kept_energy": 0.0,
            "dropped_energy": float(energies[p:].sum()) + beyond,
        }
        return ModuleAggregate(adapter, residual, findings=findings)
