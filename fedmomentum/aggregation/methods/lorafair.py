"""LoRA-FAIR: average the factors, then correct B for the averaging error.

Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement,
ICCV 2025, arXiv 2411.14961.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import add, norm

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates


# The root in log(sigma) lies within this distance of the log of the largest eigenvalue of A A^T:
# e^35 is about 1 / eps of float64, so farther away sigma or M vanishes in sigma I + M.
LOG_SIGMA_RADIUS = 35
# Halvings of an interval of length 70 until its ends differ only in the last bit.
BISECTION_STEPS = 64


@dataclass(frozen=True)
class LoRAFAIR(Method):
    r"""FedIT with a correction D to B: `A = sum_i w_i A_i`, `B = sum_i w_i B_i + D`.

    D `(out, rank)` brings `B A` near the exact sum `Delta = sum_i w_i B_i A_i`.

    Args:
        objective: `cosine`, from the paper, minimizes `1 - cos(Delta, (B + D) A) +
            strength ||D||_F`; `ridge`, ours, minimizes `||Delta - (B + D) A||_F^2 +
            strength ||D||_F^2`, with the solution `D = E A^T (A A^T + strength I)^-1` where
            `E = Delta - B A`. The cosine is insensitive to the norm of the product, the ridge not.
        strength: Lambda, above 0: at 0 the cosine does not determine the norm of the product.

    Raises:
        ValueError: If `objective` is unknown or `strength` is not positive and finite.

    Source:
        arXiv 2411.14961, which has no code and takes an unstated number of SGD steps; we compute
        the minimizer itself.
    """

    objective: str = "cosine"
    strength: float = 0.01
    title = "LoRA-FAIR"
    paper = (
        "Bian et al., LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization "
        "Refinement, ICCV 2025, arXiv 2411.14961"
    )
    depends_on = "product"

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.objective not in ("cosine", "ridge"):
            raise ValueError(f"objective must be cosine or ridge; got {self.objective!r}")
        if not 0 < self.strength < math.inf:
            raise ValueError(f"strength must be above 0 and finite; got {self.strength!r}")

    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Average the factors and correct B. Findings: `cosine` with the sum, `dropped_energy`."""
        mean = updates.mean_factors()
        delta = updates.sum()
        delta_norm = norm(delta)
        if isinstance(delta, LowRank):
            G = delta.B @ (delta.A @ mean.A.mT)  # Delta A^T, (out, rank)
        else:
            G = delta @ mean.A.mT
        if self.objective == "cosine":
            B = cosine_minimizer(G, mean, delta_norm, self.strength)
        else:
            B = ridge_minimizer(G, mean, self.strength)
        adapter = LowRank(B, mean.A)

        # <Delta, B A> = <G, B>
        size = delta_norm * adapter.norm()
        cosine = float((G * B).sum()) / size if size else 1.0
        dropped = norm(add(delta, adapter.scaled(-1))) ** 2
        return ModuleAggregate(adapter, findings={"cosine": cosine, "dropped_energy": dropped})


def ridge_minimizer(G: Tensor, mean: LowRank, strength: float) -> Tensor:
    """Return `B + E A^T (A A^T + strength I)^-1` `(out, rank)`, where `E A^T = G - B A A^T`.

    Args:
        G: `(out, rank)`, `Delta A^T`.
        mean: The mean factors B and A.
        strength: Lambda.
    """
    M = mean.A @ mean.A.mT
    regularized = M + strength * torch.eye(len(M), dtype=M.dtype, device=M.device)
    correction: Tensor = torch.linalg.solve(regularized, G - mean.B @ M, left=False)
    return mean.B + correction


def cosine_minimizer(G: Tensor, mean: LowRank, delta_norm: float, strength: float) -> Tensor:
    r"""Return the C that minimizes `1 - <Delta, C A> / (||Delta|| ||C A||) + strength ||C - B||_F`.

    With `M = A A^T` and `G = Delta A^T`, `<Delta, C A> = <G, C>` and `||C A||^2 = <C M, C>`. If the
    norm of the cosine's gradient at B is at most `strength`, then C = B. Otherwise the objective is
    stationary if, for two scalars sigma and rho,

        C = (sigma B + G / rho)(sigma I + M)^-1,  rho ||C A||^2 = <G, C>,
        sigma rho ||C - B|| = strength ||Delta|| ||C A||.

    The second equation is quadratic in rho with one positive root; the third is solved for sigma by
    bisection. If the mean factors point away from Delta, the objective may have no minimizer: it
    falls as C goes to zero in the direction of `L = G M^-1`, which has the best cosine. Then
    C = L, the C with the least `||Delta - C A||`.

    Args:
        G: `(out, rank)`.
        mean: The mean factors B and A.
        delta_norm: `||Delta||_F`.
        strength: Lambda.

    Returns:
        C `(out, rank)`.
    """
    # In the eigenbasis of M, M is diag(m) and the columns of B, G and C are independent.
    m, Q = torch.linalg.eigh(mean.A @ mean.A.mT)
    m = m.clamp(min=0)
    B = mean.B @ Q
    G = G @ Q
    BA_square = (m * B * B).sum()
    if delta_norm == 0 or BA_square <= 0:
        return mean.B
    gradient = B * m * (B * G).sum() / BA_square - G
    if gradient.norm() <= strength * delta_norm * BA_square.sqrt():
        return mean.B

    def stationary(sigma: float) -> tuple[Tensor, Tensor]:
        rho = _positive_root(sigma, m, B, G)
        return (sigma * B + G / rho) / (sigma + m), rho

    # The left side of the third equation exceeds the right one for large sigma: bisect.
    low = math.log(float(m[-1])) - LOG_SIGMA_RADIUS
    high = math.log(float(m[-1])) + LOG_SIGMA_RADIUS
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        sigma = math.exp(middle)
        C, rho = stationary(sigma)
        CA_norm = (m * C * C).sum().sqrt()
        if sigma * rho * (C - B).norm() > strength * delta_norm * CA_norm:
            high = middle
        else:
            low = middle
    C, _ = stationary(math.exp(high))

    # Compare its objective with the limit for t L as t goes to zero.
    def one_minus_cosine(C: Tensor) -> float:
        return 1 - float((G * C).sum() / (m * C * C).sum().sqrt()) / delta_norm

    L = torch.where(m > m[-1] * torch.finfo(m.dtype).eps, G / m, torch.zeros_like(G))
    limit = one_minus_cosine(L) + strength * float(B.norm())
    if one_minus_cosine(C) + strength * float((C - B).norm()) > limit:
        C = L
    minimizer: Tensor = C @ Q.mT
    return minimizer


def _positive_root(sigma: float, m: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """Return the positive root rho of `a rho^2 - 2 b rho - c = 0`.

    That is `rho ||C A||^2 = <G, C>`, with C substituted, times rho.
    """
    z = sigma / (sigma + m) ** 2
    a = sigma * (z * m * B * B).sum()
    b = (z * (sigma - m) * B * G).sum() / 2
    c = (z * G * G).sum()
    root = (b * b + a * c).sqrt()
    # Of the two forms of the root, choose the one that does not subtract close numbers.
    return (b + root) / a if b > 0 else c / (root - b)
