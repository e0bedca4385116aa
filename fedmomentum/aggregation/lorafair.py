"""LoRA-FAIR: average the factors, then correct B for what the average got wrong.

Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, ICCV 2025,
arXiv 2411.14961.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmomentum.aggregation.base import Aggregate, Method, adapter_dtype, check_updates
from fedmomentum.aggregation.factors import check_equal_ranks, mean_factors
from fedmomentum.lowrank import LowRank
from fedmomentum.sums import Matrix, exact_sum, plus
from fedmomentum.sums import norm as norm_of


@dataclass(frozen=True)
class LoRAFAIR(Method):
    r"""`A = sum_i w_i A_i`, `B = sum_i w_i B_i + D`, with D `(out, rank)` making `B A` like the exact sum `Delta`.

    Args:
        objective: `cosine` minimises `1 - cos(Delta, (B + D) A) + strength ||D||_F`, the paper's; `ridge`
            minimises `||Delta - (B + D) A||_F^2 + strength ||D||_F^2`, ours: `D = E A^T (A A^T + strength I)^-1`
            with `E = Delta - B A`. The cosine is blind to the size of the product, the ridge is not.
        strength: lambda, above 0: at 0 the cosine leaves the size of the product open.

    Raises:
        ValueError: an unknown objective, a strength that is not positive; when called, clients of another rank.

    Source:
        arXiv 2411.14961, which has no code and takes SGD steps of unstated number; we take the minimiser itself.
    """

    objective: str = "cosine"
    strength: float = 0.01
    title = "LoRA-FAIR"
    paper = (
        "Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, "
        "ICCV 2025, arXiv 2411.14961"
    )

    def __post_init__(self) -> None:
        """Check the settings when they are made."""
        if self.objective not in ("cosine", "ridge"):
            raise ValueError(f"objective must be cosine or ridge; got {self.objective!r}")
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength must be above 0 and finite; got {self.strength!r}")

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
        """Average and correct one module; see `Method`. Findings: `cosine` with the sum, `dropped_energy`."""
        check_updates(updates, weights, rank)
        check_equal_ranks(self.title, updates, rank)
        mean, total = mean_factors(updates, weights), exact_sum(updates, weights)
        norm = norm_of(total)
        # Delta A^T, (out, rank)
        G = total.B @ (total.A @ mean.A.mT) if isinstance(total, LowRank) else total @ mean.A.mT
        solve = cosine_minimiser if self.objective == "cosine" else ridge_minimiser
        adapter = LowRank(solve(G, mean, norm, self.strength), mean.A)
        size = norm * adapter.norm()
        findings = {
            "cosine": float((G * adapter.B).sum()) / size if size else 1.0,
            "dropped_energy": norm_of(plus(total, adapter.scaled(-1))) ** 2,
        }
        return Aggregate(adapter.to(adapter_dtype(updates)), findings=findings)


def ridge_minimiser(G: Tensor, mean: LowRank, norm: float, strength: float) -> Tensor:
    """`B + E A^T (A A^T + strength I)^-1` `(out, rank)`, with `E A^T = G - B A A^T`; `norm` plays no part."""
    M = mean.A @ mean.A.mT
    right = M + strength * torch.eye(len(M), dtype=M.dtype, device=M.device)
    return mean.B + torch.linalg.solve(right, G - mean.B @ M, left=False)


def cosine_minimiser(G: Tensor, mean: LowRank, norm: float, strength: float) -> Tensor:
    r"""The C `(out, rank)` that minimises `1 - <Delta, C A> / (||Delta|| ||C A||) + strength ||C - B||_F`.

    With `M = A A^T` and `G = Delta A^T`, `<Delta, C A> = <G, C>` and `||C A||^2 = <C M, C>`. Where the gradient
    at B is within the strength, C is B. Else the gradient is zero where, for two numbers sigma and rho,

        C = (sigma B + G / rho)(sigma I + M)^-1,  rho ||C A||^2 = <G, C>,
        sigma rho ||C - B|| = strength ||Delta|| ||C A||.

    The second is quadratic in rho with one positive root; the third is solved for sigma by bisection.

    Args:
        G: `(out, rank)`.
        mean: the mean factors B and A.
        norm: `||Delta||_F`.
        strength: lambda.
    """
    m, Q = torch.linalg.eigh(mean.A @ mean.A.mT)
    m, B, G = m.clamp(min=0), mean.B @ Q, G @ Q  # here M is diag(m), and columns stand apart
    size = (m * B * B).sum()  # ||B A||^2
    if norm == 0 or size <= 0:
        return mean.B
    if (B * m * (B * G).sum() / size - G).norm() <= strength * norm * size.sqrt():
        return mean.B

    def at(sigma: float) -> tuple[Tensor, bool]:
        z = sigma / (sigma + m) ** 2
        a, b, c = sigma * (z * m * B * B).sum(), (z * (sigma - m) * B * G).sum() / 2, (z * G * G).sum()
        root = (b * b + a * c).sqrt()  # a rho^2 - 2 b rho - c = 0
        rho = (b + root) / a if b > 0 else c / (root - b)
        C = (sigma * B + G / rho) / (sigma + m)
        above = sigma * rho * (C - B).norm() > strength * norm * (m * C * C).sum().sqrt()
        return C, bool(above)

    low, high = math.log(float(m[-1])) - 35, math.log(float(m[-1])) + 35
    for _ in range(64):  # halves the logarithm of sigma to its last bit
        middle = (low + high) / 2
        low, high = (low, middle) if at(math.exp(middle))[1] else (middle, high)
    return at(math.exp(high))[0] @ Q.mT
