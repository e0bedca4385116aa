"""Pure measures of adapters and weights. torch only: tensors in, numbers out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedmomentum.adapter import Adapter
from fedmomentum.lowrank import CORE_DTYPE, LowRank, principal_angles, zeros
from fedmomentum.sums import Each, Matrix, exact_sum, inner, inner_with_each

NUM_PROBES = 8
"""Probes a module. Over 60 modules their mean square is within 7 % of the Frobenius norm it stands for."""

BLOCK = 2**17
"""Numbers of a matrix that are cast to float64 at a time: 1 MB, which stays in a processor's cache."""


def probe_vectors(module: str, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian probe vectors of one module: U `(out, NUM_PROBES)`, X `(in, NUM_PROBES)`, float64.

    The same on every machine that is given the same seed: drawn on the CPU, from the module's name.
    """
    digest = hashlib.sha256(f"{seed}/probe/{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    U = torch.randn(shape[0], NUM_PROBES, generator=generator, dtype=torch.float64)
    X = torch.randn(shape[1], NUM_PROBES, generator=generator, dtype=torch.float64)
    return U, X


def probe(matrix: Tensor | LowRank, U: Tensor, X: Tensor, scratch: Tensor | None = None) -> Tensor:
    """`diag(U^T M X)`: `(NUM_PROBES,)` numbers linear in M whose mean square is `||M||_F^2`.

    A dense M of any dtype, on any device, is read once, some rows at a time. Whoever probes many gives `scratch`,
    `BLOCK` numbers in float64 to cast them in: fresh memory for every block can take three times as long.
    """
    if isinstance(matrix, LowRank):
        return (U * (matrix.B.to(X) @ (matrix.A.to(X) @ X))).sum(0)
    left, rows = X.new_zeros(X.shape[1], X.shape[0]), max(1, BLOCK // matrix.shape[1])  # left is U^T M
    if scratch is None or scratch.numel() < rows * matrix.shape[1]:
        scratch = X.new_empty(rows * matrix.shape[1])
    wide = scratch[: rows * matrix.shape[1]].view(rows, -1)
    for start in range(0, matrix.shape[0], rows):
        some = matrix[start : start + rows]
        left.addmm_(U[start : start + rows].mT, wide[: len(some)].copy_(some))
    return (left.mT * X).sum(0)


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

Change = Mapping[str, Matrix]
"""Module to a matrix in effective-weight units, `(out, in)`. A module that is missing counts as zero."""

_ROUND_OFF = torch.finfo(torch.float32).eps ** 2
"""A change whose square is below this share of what it is a change of is the round-off of float32 factors: none."""


def change(before: Adapter, after: Adapter, merged: Change) -> Change:
    """`s' B' A' - s B A + merged` per module: what a round changes of the effective weights, in float64.

    Args:
        before: the adapter that the round started from.
        after: the adapter that came out.
        merged: what the base absorbed.

    Returns:
        Module to a matrix, by `exact_sum`; made when it is looked up, so that one module's is in memory at a time.
    """
    return _Change(before, after, merged)


class _Change(Mapping[str, Matrix]):
    def __init__(self, before: Adapter, after: Adapter, merged: Change) -> None:
        self._before, self._after, self._merged = before, after, merged

    def __getitem__(self, module: str) -> Matrix:
        parts = [self._after.effective(module), self._before.effective(module)]
        return exact_sum(parts, [1.0, -1.0], [self._merged[module]] if module in self._merged else [])

    def __iter__(self) -> Iterator[str]:
        return iter(self._after.modules)

    def __len__(self) -> int:
        return len(self._after.modules)


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

    With P_i = s_i B_i A_i of client i, P_0 of the start, S = sum_i w_i P_i and G the global update, everything but
    the angles is made of inner products of these, `<P_i, P_i>`, `<P_i, P_0>`, `<P_i, S>` and `<P_i, G>`: the cost is
    that of the sum, `O((d + k) R^2)` where it is factored and `O(d k R)` beyond. Modules are taken one after the other,
    and so are the clients' factors.

    Args:
        start: the adapter that the clients started from.
        clients: what they sent.
        weights: one positive number a client, sum 1.
        after: the next adapter, as clients will get it.
        merged: what the base absorbed in this round.
        last_update: the global update of the round before (`change`); None where there was none.
    """
    w, update = torch.tensor(weights, dtype=CORE_DTYPE, device="cpu"), change(start, after, merged)
    own, with_start, with_mean, with_update, A, B = torch.zeros(6, len(clients), dtype=CORE_DTYPE, device="cpu")
    totals = dict.fromkeys(("PP", "GG", "GP", "GL", "LL", "live"), 0.0)
    for module in sorted(after.modules):
        shape = after.modules[module].shape
        P, live = _effective(start, module, shape), _effective(after, module, shape)
        sent = Each(partial(_effective, module=module, shape=shape), clients)
        for i, (client, matrix) in enumerate(zip(clients, sent, strict=True)):
            own[i] += matrix.inner(matrix)
            with_start[i] += matrix.inner(P)
            A[i] += matrix.A.square().sum()
            B[i] += matrix.B.square().sum() / client.scalings.get(module, 1.0) ** 2  # the scaling is on B
        with_mean += inner_with_each(sent, exact_sum(sent, w))  # one dense sum at a time is in memory
        _add(totals, PP=inner(P, P), live=inner(live, live))
        G = update[module]
        with_update += inner_with_each(sent, G)
        _add(totals, GG=inner(G, G), GP=inner(G, P))
        if last_update is not None and module in last_update:
            L = last_update[module]
            _add(totals, GL=inner(G, L), LL=inner(L, L))
            del L
        del G
    moved = own - 2 * with_start + totals["PP"]  # ||P_i - P_0||^2
    size = float(w @ with_mean)  # ||S||^2
    mean = size - 2 * float(w @ with_start) + totals["PP"]  # ||S - P_0||^2
    apart = (own - 2 * with_mean + size).clamp(min=0).sqrt()  # ||P_i - S||
    square = _or_none(totals["GG"], totals["PP"] + totals["live"])
    cosines = [
        _cosine(float(with_update[i]) - totals["GP"], _or_none(float(moved[i]), float(own[i]) + totals["PP"]), square)
        for i in range(len(clients))
    ]
    defined = [cosine for cosine in cosines if cosine is not None]
    drifts = float(apart.mean()) / math.sqrt(mean) if _or_none(mean, size + totals["PP"]) else None
    return {
        "update_norm": math.sqrt(square or 0.0),
        "update_cosine": _cosine(totals["GL"], square, totals["LL"]),
        "client_cosine": {
            "min": min(defined, default=None),
            "mean": sum(defined) / len(defined) if defined else None,
            "max": max(defined, default=None),
        },
        "client_drift": drifts,
        "subspace_angle": subspace_angle(start, after),
        "factor_norms": {
            "before": {"A": float(w @ A.sqrt()), "B": float(w @ B.sqrt())},
            "after": factor_norms(after),
        },
    }


def _effective(adapter: Adapter, module: str, shape: tuple[int, int]) -> LowRank:
    if module not in adapter.modules:
        some = next(iter(adapter.modules.values()))
        return zeros(shape, device=some.device)
    matrix = adapter.effective(module)
    return LowRank(matrix.B.contiguous(), matrix.A.contiguous())  # the last bits of products depend on strides


def _add(totals: dict[str, float], **more: float) -> None:
    for name, value in more.items():
        totals[name] += value


def _or_none(square: float, size: float) -> float | None:
    """A squared norm, None where it is round-off beside the squared size of what was subtracted."""
    return square if square > _ROUND_OFF * size else None


def _cosine(product: float, one: float | None, other: float | None) -> float | None:
    """`<x, y> / (||x|| ||y||)` of squared norms, within [-1, 1]; None where one of them is zero."""
    if not one or not other:
        return None
    return max(-1.0, min(1.0, product / math.sqrt(one) / math.sqrt(other)))
