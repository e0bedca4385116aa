"""Pure measures of adapters and weights. torch only: tensors in, numbers out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmomentum.adapter import Adapter
from fedmomentum.lowrank import CORE_DTYPE, LowRank, gram, principal_angles, weighted_sum

NUM_PROBES = 8
"""Probes a module. Over 60 modules their mean square is within 7 % of the Frobenius norm it stands for."""


def probe_vectors(module: str, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian probe vectors of one module: U `(out, NUM_PROBES)`, X `(in, NUM_PROBES)`, float64.

    The same on every machine that is given the same seed: drawn on the CPU, from the module's name.
    """
    digest = hashlib.sha256(f"{seed}/probe/{module}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
    U = torch.randn(shape[0], NUM_PROBES, generator=generator, dtype=torch.float64, device="cpu")
    X = torch.randn(shape[1], NUM_PROBES, generator=generator, dtype=torch.float64, device="cpu")
    return U, X


def probe(matrix: Tensor | LowRank, U: Tensor, X: Tensor) -> Tensor:
    """`diag(U^T M X)`: `(NUM_PROBES,)` numbers linear in M whose mean square is `||M||_F^2`."""
    if isinstance(matrix, LowRank):
        return (U * (matrix.B.to(X) @ (matrix.A.to(X) @ X))).sum(0)
    return (U * (matrix.to(X) @ X)).sum(0)


def relative_rms(error: Mapping[str, Tensor], size: Mapping[str, Tensor]) -> float:
    """Root mean square of all probes of `error` over that of `size`: a relative Frobenius norm over modules."""
    top = sum(float(values.square().sum()) for values in error.values())
    bottom = sum(float(values.square().sum()) for values in size.values())
    return math.sqrt(top / bottom) if bottom > 0 else (0.0 if top == 0 else math.inf)


def applied_share(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """`<got, wanted> / <wanted, wanted>` over all modules' probes: the share of a change that arrived.

    1 where all of it is there; a change that rounding swallowed gives less. NaN-free: 1 where nothing was wanted.
    """
    top = sum(float((got[m] * wanted[m]).sum()) for m in wanted)
    bottom = sum(float(wanted[m].square().sum()) for m in wanted)
    return top / bottom if bottom > 0 else 1.0


# ── a round, by its factors ──────────────────────────────────────────────────────────────────────────────────────

Change = Mapping[str, LowRank]
"""Module to a matrix in effective-weight units, `(out, in)`, factored. A module that is missing counts as zero."""

_ROUND_OFF = torch.finfo(torch.float32).eps ** 2
"""A change whose square is below this share of what it is a change of is the round-off of float32 factors: none."""


def change(before: Adapter, after: Adapter, merged: Change) -> dict[str, LowRank]:
    """`s' B' A' - s B A + merged` per module, stacked: what a round changes of the effective weights, in float64.

    Args:
        before: the adapter that the round started from.
        after: the adapter that came out.
        merged: what the base absorbed.

    Returns:
        Module to a matrix of rank `r' + r + rank(merged)`.
    """
    changes = {}
    for module in after.modules:
        parts, signs = [after.effective(module), before.effective(module)], [1.0, -1.0]
        if module in merged:
            parts.append(merged[module])
            signs.append(1.0)
        changes[module] = weighted_sum(parts, signs)
    return changes


def inner_products(left: Sequence[Change], right: Sequence[Change] | None = None) -> Tensor:
    """Frobenius inner products over all modules: `(len(left), len(right))`, float64, on the matrices' device.

    A module costs two products of the stacked factors, `O((d + k) R R')` with R and R' the sums of ranks: `<B A, B' A'>
    = sum((B^T B') * (A A'^T))`, summed within each pair's block.

    Args:
        left: n mappings.
        right: m mappings; those of `left` where left out, at five eighths of the cost.
    """
    others = left if right is None else right
    device = next((matrix.device for one in left for matrix in one.values()), torch.device("cpu"))
    result = torch.zeros(len(left), len(others), dtype=CORE_DTYPE, device=device)
    for module in sorted({module for one in left for module in one}):
        B, A, rows = _stacked(left, module)
        C, D, columns = (B, A, rows) if right is None else _stacked(right, module)
        if B is None or A is None or C is None or D is None:
            continue
        products = gram(B.mT) * gram(A) if right is None else (B.mT @ C) * (A @ D.mT)
        blocks = result.new_zeros(len(left), C.shape[1]).index_add(0, rows, products)
        result = result.index_add(1, columns, blocks)
    return result


def _stacked(matrices: Sequence[Change], module: str) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """All factors of one module side by side: B `(out, R)`, A `(R, in)`, and whose each column of B is `(R,)`."""
    held = [(i, one[module]) for i, one in enumerate(matrices) if module in one]
    numbers = [i for i, matrix in held for _ in range(matrix.rank)]
    owners = torch.tensor(numbers, dtype=torch.long, device=held[0][1].device if held else "cpu")
    if not numbers:
        return None, None, owners
    B = torch.cat([matrix.B.to(CORE_DTYPE) for _, matrix in held], dim=1)
    A = torch.cat([matrix.A.to(CORE_DTYPE) for _, matrix in held], dim=0)
    return B, A, owners


def factor_norms(adapter: Adapter) -> dict[str, float]:
    """`{"A": sqrt(sum over modules ||A||_F^2), "B": ...}` of the factors as they are, without the scaling."""
    squares = {
        "A": [float(matrix.A.to(CORE_DTYPE).square().sum()) for matrix in adapter.modules.values()],
        "B": [float(matrix.B.to(CORE_DTYPE).square().sum()) for matrix in adapter.modules.values()],
    }
    return {factor: math.sqrt(sum(values)) for factor, values in squares.items()}


def subspace_angle(before: Adapter, after: Adapter) -> dict[str, float | None]:
    """Mean principal angle in degrees between the row spaces (`A`) and column spaces (`B`) of two adapters' products.

    The spaces are those of the directions that are not zero (`principal_angles`); the mean is over the angles of a
    module, then over the modules. None where one of the adapters is zero in all modules.
    """
    means: dict[str, float | None] = {}
    for factor, side in (("A", "in"), ("B", "out")):
        angles = [principal_angles(before.modules[m], after.modules[m], side=side) for m in after.modules]
        degrees = [math.degrees(float(angle.mean())) for angle in angles if len(angle)]
        means[factor] = sum(degrees) / len(degrees) if degrees else None
    return means


def round_diagnostics(
    start: Adapter,
    clients: Sequence[Adapter],
    weights: Sequence[float],
    after: Adapter,
    merged: Change,
    last_update: Change | None,
) -> dict[str, Any]:
    """How a round moved the model; docs/metrics.md has the formulas. What is not defined is None.

    With P_i = s_i B_i A_i of client i, P_0 of the start and G the global update, everything but the angles is made of
    the inner products of these, so the cost is that of a Gram matrix of all factors a module and side (and of its
    products with the last update's), `O((d + k) R^2)`, and no decomposition of more than an adapter's rank.

    Args:
        start: the adapter that the clients started from.
        clients: what they sent.
        weights: one positive number a client, sum 1.
        after: the next adapter, as clients will get it.
        merged: what the base absorbed in this round.
        last_update: the global update of the round before (`change`); None where there was none.
    """
    products = [{module: one.effective(module) for module in one.modules} for one in (start, *clients, after)]
    everything = inner_products([*products, merged])
    K = everything[:-2, :-2]  # row and column 0 are the start's
    w = torch.tensor([0.0, *weights], dtype=CORE_DTYPE, device=K.device)
    u = torch.zeros_like(everything[0])  # the update as a combination: after - start + merged
    u[0], u[-2:] = -1, 1
    with_update = (everything @ u)[:-2]
    own = K.diag() - 2 * K[0] + K[0, 0]  # ||P_i - P_0||^2
    mean = float(w @ K @ w - 2 * w @ K[0] + K[0, 0])  # ||sum_i w_i P_i - P_0||^2
    apart = (K.diag() - 2 * K @ w + w @ K @ w).clamp(min=0).sqrt()  # ||P_i - sum_j w_j P_j||
    crossed = None if last_update is None else float(u @ inner_products([*products, merged], [last_update])[:, 0])
    square = _or_none(float(u @ everything @ u), float(K[0, 0] + everything[-2, -2]))
    cosines = [
        _cosine(float(with_update[i] - with_update[0]), _or_none(float(own[i]), float(K[i, i] + K[0, 0])), square)
        for i in range(1, len(w))
    ]
    defined = [cosine for cosine in cosines if cosine is not None]
    before = float(inner_products([last_update])) if last_update is not None else None
    drifts = None
    if _or_none(mean, float(w @ K @ w + K[0, 0])):
        drifts = float(apart[1:].mean()) / math.sqrt(mean)
    return {
        "update_norm": math.sqrt(square or 0.0),
        "update_cosine": _cosine(crossed, square, before) if crossed is not None else None,
        "client_cosine": {
            "min": min(defined, default=None),
            "mean": sum(defined) / len(defined) if defined else None,
            "max": max(defined, default=None),
        },
        "client_drift": drifts,
        "subspace_angle": subspace_angle(start, after),
        "factor_norms": {"before": _mean_norms(clients, weights), "after": factor_norms(after)},
    }


def _or_none(square: float, size: float) -> float | None:
    """A squared norm, None where it is round-off beside the squared size of what was subtracted."""
    return square if square > _ROUND_OFF * size else None


def _cosine(product: float, one: float | None, other: float | None) -> float | None:
    """`<x, y> / (||x|| ||y||)` of squared norms, within [-1, 1]; None where one of them is zero."""
    if not one or not other:
        return None
    return max(-1.0, min(1.0, product / math.sqrt(one) / math.sqrt(other)))


def _mean_norms(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, float]:
    norms = [factor_norms(adapter) for adapter in adapters]
    return {factor: sum(w * one[factor] for w, one in zip(weights, norms, strict=True)) for factor in ("A", "B")}
