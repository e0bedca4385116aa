"""FRLoRA: start from the base's leading directions, and merge what each round added to them.

Yan et al., Federated Residual Low-Rank Adaption of Large Language Models, ICLR 2025 (OpenReview e0rQRMUhs7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import averaging_error, check_equal_ranks, mean_factors
from fedmomentum.aggregation.gauge import balanced_split
from fedmomentum.lowrank import CORE_DTYPE, LowRank, difference
from fedmomentum.sums import Matrix, norm


@dataclass(frozen=True)
class FRLoRA(Method):
    r"""`W0 = U S V^T`, `B0 = U_r (S_r / s)^1/2`, `A0 = (S_r / s)^1/2 V_r^T`; residual `B A - B0 A0`.

    B and A are the factors' means. Once, the base becomes `W0 - s B0 A0`, so that the model is as it was. Every
    round starts from `B0, A0` again, and after T rounds the model is `W0 + sum_t s (B^t A^t - B0 A0)`.
    Not exact: a product of means, as FedIT's. Residual `[B, -B0]` `(out, 2 rank)`, `[A; A0]` `(2 rank, in)`.

    Raises (when called):
        ValueError: clients of another rank; no reference, or one of another rank: it is `B0, A0`.

    Source:
        The paper and its code (IAMJackYan/FRLoRA), whose weights are uniform by accident; ours are shares of
        examples. That code's default trainer freezes A; the paper, and we, train both.
    """

    title = "FRLoRA"
    paper = (
        "Yan et al., Federated Residual Low-Rank Adaption of Large Language Models, ICLR 2025, OpenReview e0rQRMUhs7"
    )
    residual_rank = "q = r"
    reads_base = True

    def sends(self, server_round: int) -> str:
        """No factor: clients hold `B0, A0`."""
        return ""

    def downlink_numbers(self, out_size: int, in_size: int, rank: int, residual_rank: int, server_round: int) -> int:
        """The means: the residual without its last `rank` components, which are `-B0, A0`."""
        return super().downlink_numbers(out_size, in_size, rank, residual_rank - rank, server_round)

    def initialise(self, weight: Tensor | None, fresh: LowRank) -> tuple[LowRank, LowRank | None]:
        """`B0, A0` from `weight = W0 / s` `(out, in)`, and `-B0 A0` for the base; in the dtype of `fresh`."""
        if weight is None:
            raise ValueError("FRLoRA starts from the base weight's SVD and was not given the weight")
        U, S, Vh = torch.linalg.svd(weight.to(CORE_DTYPE), full_matrices=False)
        B, A = balanced_split(U[:, : fresh.rank], S[: fresh.rank], Vh[: fresh.rank])
        start = LowRank(B, A).to(fresh.dtype)
        return start, start.scaled(-1)

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
        """Average one module and take off its start; see `Method`. Findings: `dropped_energy`."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        if reference is None or reference.rank != rank:
            raise ValueError(
                f"FRLoRA merges what clients added to the adapter they started from, of rank {rank}; got {reference!r} "
                "for it. That start is made of the base's own weights, so this method works within a run only"
            )
        dtype, mean = adapter_dtype(updates), mean_factors(updates, weights)
        lost = norm(averaging_error(updates, weights, mean), adapter_dtype(updates)) ** 2
        residual = difference(mean, reference)
        return Aggregate(reference.to(dtype), residual.to(dtype), findings={"dropped_energy": lost})
