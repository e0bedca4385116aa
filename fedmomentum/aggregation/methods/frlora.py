"""FRLoRA: start from the base weight's leading directions, and merge what each round adds to them.

Yan et al., Federated Residual Low-Rank Adaption of Large Language Models, ICLR 2025 (OpenReview
e0rQRMUhs7).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.aggregation.splits import balanced_split
from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, difference
from fedmomentum.linalg.matrix import norm

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


@dataclass(frozen=True)
class FRLoRA(Method):
    r"""FedIT from the leading part of the base weight, `B0 A0`; residual `B A - B0 A0`.

    `W0 = U S V^T`, `B0 = U_r (S_r / s)^1/2`, `A0 = (S_r / s)^1/2 V_r^T`. B and A are the means of
    the clients' factors, s the scaling. Before round 1, the base becomes `W0 - s B0 A0`, so that
    the model does not change. Every round starts from `B0, A0` again, and after T rounds the model
    is `W0 + sum_t s (B^t A^t - B0 A0)`. Not exact, because it is a product of means, like FedIT.
    The residual is `[B, -B0]` `(out, 2 rank)`, `[A; A0]` `(2 rank, in)`.

    Source:
        The paper and its code (IAMJackYan/FRLoRA), whose weights are uniform by accident; ours are
        fractions of examples. That code's default trainer freezes A; the paper and this
        implementation train both.
    """

    title = "FRLoRA"
    paper = (
        "Yan et al., Federated Residual Low-Rank Adaption of Large Language Models, ICLR 2025, "
        "OpenReview e0rQRMUhs7"
    )
    depends_on = "factors"
    residual_rank = "q = r"
    reads_base = True

    def max_residual_rank(self, rank: int, num_updates: int) -> int:
        """Return the rank of the means and the start, one beside the other."""
        return 2 * rank

    def sent_factors(self, server_round: int) -> str:
        """Return no factor: clients already have `B0, A0`."""
        return ""

    def num_downlink_parameters(
        self, out_size: int, in_size: int, rank: int, residual_rank: int, server_round: int
    ) -> int:
        """Count only the means: clients know the residual's last `rank` components, `-B0, A0`."""
        return super().num_downlink_parameters(
            out_size, in_size, rank, residual_rank - rank, server_round
        )

    def initialize(self, weight: Tensor | None, fresh: LowRank) -> tuple[LowRank, LowRank | None]:
        """Return `B0, A0` from `weight = W0 / s` `(out, in)`, and `-B0 A0` for the base.

        Raises:
            ValueError: If `weight` is None.
        """
        if weight is None:
            raise ValueError("FRLoRA starts from the SVD of the base weight; no weight was given")
        U, S, Vh = torch.linalg.svd(weight.to(CORE_DTYPE), full_matrices=False)
        B, A = balanced_split(U[:, : fresh.rank], S[: fresh.rank], Vh[: fresh.rank])
        start = LowRank(B, A).to(fresh.dtype)
        return start, start.scaled(-1)

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Average the factors and subtract their start. Findings: `dropped_energy`.

        Raises:
            ValueError: If `context.reference`, which is `B0, A0`, is None or has a different rank.
        """
        start = context.reference
        if start is None or start.rank != context.rank:
            raise ValueError(
                "FRLoRA merges what clients added to the adapter they started from, of rank "
                f"{context.rank}; got {start!r} for it. That adapter is made from the base "
                "weights, so this method works within a run only"
            )
        mean = updates.mean_factors()
        error = norm(updates.averaging_error(mean), updates.dtype)
        return ModuleAggregate(
            start, difference(mean, start), findings={"dropped_energy": error**2}
        )
