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
from fedmomentum.aggregation.base import adapter_dtype
from fedmomentum.lowrank import CORE_DTYPE, LowRank, principal_angles, zeros
from fedmomentum.moves import Moves
from fedmomentum.sums import Each, Matrix, exact_sum, inner, inner_with_each, times

NUM_PROBES = 8
"""Probes a module. Over 60 modules their mean square is within 7 % of the Frobenius norm it stands for."""

BLOCK = 2**19
"""Numbers of a matrix that are cast to float64 at a time: 4 MB, which stays in a processor's cache."""

PART = 64
"""Rows below which a product is not divided among threads."""


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
        some, u = matrix[start : start + rows], U[start : start + rows]
        cast = wide[: len(some)].copy_(some)
        # a part a thread: a core then multiplies what it has cast, which may be in no other core's cache
        parts = max(1, min(torch.get_num_threads(), len(some) // PART))
        whole = len(some) // parts * parts
        u_parts, cast_parts = (rows_of[:whole].unflatten(0, (parts, -1)) for rows_of in (u, cast))
        left += torch.bmm(u_parts.mT, cast_parts).sum(0)
        left.addmm_(u[whole:].mT, cast[whole:])
    return (left.mT * X).sum(0)


def stack_probes(probes: Mapping[str, Tensor]) -> Tensor:
    """`(num_modules, NUM_PROBES)`, modules in sorted order."""
    return torch.stack([probes[module] for module in sorted(probes)])


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

TOGETHER = 2**20
"""Numbers of factors of equal shape that are multiplied at once: 8 MB in float64."""
Change = Mapping[str, Matrix]
"""Module to a matrix in effective-weight units, `(out, in)`. A module that is missing counts as zero."""

ROUND_OFF = 10.0
"""Two sums of the same that differ by so many steps of their dtype differ by round-off."""
Parts = list[tuple[float, Matrix]]
"""A sum as its terms, each with a sign."""
_ROUND_OFF = torch.finfo(torch.float32).eps ** 2
"""A change whose square is below this share of what it is a change of is the round-off of float32 factors: none."""


class Update(Mapping[str, Matrix]):
    """`s' B' A' - s B A + merged` per module: what a round changes of the effective weights.

    Module to a matrix, by `exact_sum`, in float64; made when it is looked up, so that one module's is in memory at a
    time.

    Args:
        before: the adapter that the round started from.
        after: the adapter that came out.
        merged: what the base absorbed.
        norm: its norm over all modules, where it is known.
    """

    def __init__(self, before: Adapter, after: Adapter, merged: Change, norm: float | None = None) -> None:
        self._before, self._after, self._merged, self._norm = before, after, merged, norm

    def __getitem__(self, module: str) -> Matrix:
        matrices = [part for _, part in self.parts(module)]
        return exact_sum(matrices[:2], [1.0, -1.0], matrices[2:])  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._after.modules)

    def __len__(self) -> int:
        return len(self._after.modules)

    def parts(self, module: str) -> Parts:
        """What one module's change is the sum of, each with its sign: none of it is formed."""
        own = (_contiguous(adapter.effective(module)) for adapter in (self._after, self._before))
        parts: Parts = list(zip((1.0, -1.0), own, strict=True))
        if module not in self._merged:
            return parts
        merged = self._merged[module]
        if isinstance(merged, Tensor):
            return [*parts, (1.0, merged.contiguous())]
        # the last bits of small products depend on where in memory the numbers lie, too: payloads are cut anywhere
        B, A = (factor.clone(memory_format=torch.contiguous_format) for factor in (merged.B, merged.A))
        return [*parts, (1.0, LowRank(B, A))]

    def square(self) -> float:
        """`||.||_F^2` over all modules."""
        if self._norm is not None:
            return self._norm**2
        return sum(_inner(parts, parts) for parts in map(self.parts, self))


def _inner(left: Parts, right: Parts) -> float:
    """The inner product of two sums, part by part."""
    return sum(s * t * inner(a, b, _narrower(a, b)) for s, a in left for t, b in right)


def _narrower(left: Matrix, right: Matrix) -> torch.dtype:
    """Float32 where one of the two is: nothing cancels within a part, and a dense one is not copied."""
    return torch.float32 if torch.float32 in (left.dtype, right.dtype) else CORE_DTYPE


def factor_norms(adapter: Adapter) -> dict[str, float]:
    """`{"A": sqrt(sum over modules ||A||_F^2), "B": ...}` of the factors as they are, without the scaling."""
    squares = {
        "A": [float(matrix.A.to(CORE_DTYPE).square().sum()) for matrix in adapter.modules.values()],
        "B": [float(matrix.B.to(CORE_DTYPE).square().sum()) for matrix in adapter.modules.values()],
    }
    return {factor: math.sqrt(sum(values)) for factor, values in squares.items()}


def distance(one: Adapter, other: Adapter) -> float:
    """`sqrt(sum over modules ||s B A - t B' A'||_F^2)` of two adapters of the same modules, in float64.

    Of `[s B, -t B'] [A; A']`, modules of one shape together where they are small.
    """
    alike, total = dict[tuple[tuple[int, int], int, int], list[str]](), 0.0
    for module, matrix in one.modules.items():
        alike.setdefault((matrix.shape, matrix.rank, other.modules[module].rank), []).append(module)
    for (shape, *ranks), modules in alike.items():
        step = max(1, TOGETHER // (sum(shape) * max(sum(ranks), 1)))
        for start in range(0, len(modules), step):
            B_s, A_s = list[Tensor](), list[Tensor]()
            for adapter, sign in ((one, 1.0), (other, -1.0)):
                some = [adapter.modules[module] for module in modules[start : start + step]]
                s = torch.tensor([sign * adapter.scalings[m] for m in modules[start : start + step]], dtype=CORE_DTYPE)
                B_s += [torch.stack([m.B for m in some]).to(CORE_DTYPE) * s.to(some[0].device)[:, None, None]]
                A_s += [torch.stack([m.A for m in some]).to(CORE_DTYPE)]
            B, A = torch.cat(B_s, dim=2), torch.cat(A_s, dim=1)
            total += float(((B.mT @ B) * (A @ A.mT)).sum((1, 2)).clamp(min=0).sum())
    return math.sqrt(total)


def subspace_angle(before: Adapter, after: Adapter) -> dict[str, float | None]:
    """Mean principal angle in degrees between the row spaces (`A`) and column spaces (`B`) of two adapters' products.

    The spaces are those of the directions that are not zero (`principal_angles`); the mean is over the angles of a
    module, then over the modules. None where one of the adapters is zero in all modules.
    """
    degrees: dict[str, list[float]] = {"A": [], "B": []}
    for module, matrix in after.modules.items():
        for factor, angles in zip("AB", principal_angles(before.modules[module], matrix), strict=True):
            degrees[factor] += [math.degrees(float(angles.mean()))] if len(angles) else []
    return {factor: sum(means) / len(means) if means else None for factor, means in degrees.items()}


def round_diagnostics(
    start: Adapter,
    clients: Sequence[Adapter],
    weights: Sequence[float],
    after: Adapter,
    merged: Change,
    last_update: Update | None,
) -> dict[str, Any]:
    """How a round moved the model; docs/metrics.md has the formulas. What is not defined is None.

    With D_i = s_i B_i A_i - s B A client i's own update, D their weighted mean and G the global update, everything but
    the angles is made of the inner products `<D_i, D_j>`, `<D_i, G>` and `<G, G_-1>`. For an exact method G is D; where
    probes find it so, it is not measured anew. The cost is that of the sum, `O((d + k) R^2)` where it is factored and
    `O(d k R)` beyond. Modules are taken one after the other.

    Args:
        start: the adapter that the clients started from.
        clients: what they sent.
        weights: one positive number a client, sum 1.
        after: the next adapter, as clients will get it.
        merged: what the base absorbed in this round.
        last_update: the global update of the round before; None where there was none.
    """
    w, update = torch.tensor(weights, dtype=CORE_DTYPE, device="cpu"), Update(start, after, merged)
    moved, with_mean, with_update, A, B = torch.zeros(5, len(clients), dtype=CORE_DTYPE, device="cpu")
    totals = dict.fromkeys(("PP", "DD", "GG", "GL", "live"), 0.0)
    for module in sorted(after.modules):
        shape, dtype = after.modules[module].shape, adapter_dtype([after.modules[module]])
        G = D = update.parts(module)
        live, P = (part for _, part in G[:2])
        assert isinstance(live, LowRank) and isinstance(P, LowRank)  # after and start
        sent = Each(partial(_effective, module=module, shape=shape), clients)
        for i, client in enumerate(clients):
            if module in client.modules:
                factors = client.modules[module]
                A[i] += factors.A.square().sum(dtype=CORE_DTYPE)
                B[i] += factors.B.square().sum(dtype=CORE_DTYPE)
        rank = max([P.rank, *(client.modules[module].rank for client in clients if module in client.modules)])
        x = torch.randn(shape[1], generator=torch.Generator().manual_seed(0), dtype=CORE_DTYPE, device="cpu")
        x = x.to(P.device)
        before = times(P, x)
        if (len(clients) + 1) * rank * sum(shape) < shape[0] * shape[1]:
            moves = Moves.of(P, sent, rank, dtype)
            is_mean = _is_mean(G, moves.mean_times(w, x), before, x, dtype)
            products = moves.inner_products()
            own, by_mean, DD = products.diagonal(), products @ w, float(w @ products @ w)
            if is_mean and last_update is not None:
                G = [(1.0, moves.mean(w))]
            del moves
        else:
            mean = sum((w_i * times(matrix, x) for w_i, matrix in zip(w.tolist(), sent, strict=True)), -before)
            is_mean = _is_mean(G, mean, before, x, dtype)
            if not is_mean:
                D = [(1.0, exact_sum([*sent, P], [*w.tolist(), -1.0]))]
            own = torch.tensor([matrix.inner(matrix) for matrix in sent], dtype=CORE_DTYPE, device="cpu")
            own += inner(P, P) - 2 * inner_with_each(sent, P)
            by_mean, DD = _beyond(sent, P, D), _inner(D, D)
        moved, with_mean = moved + own, with_mean + by_mean
        with_update += by_mean if is_mean else _beyond(sent, P, G)
        _add(totals, PP=inner(P, P), live=inner(live, live), DD=DD, GG=DD if is_mean else _inner(G, G))
        if last_update is not None and module in last_update:
            _add(totals, GL=_inner(G, last_update.parts(module)))
        del G, D
    square, common = _or_none(totals["GG"], totals["PP"] + totals["live"]), _or_none(totals["DD"], totals["PP"])
    apart = (moved - 2 * with_mean + totals["DD"]).clamp(min=0).sqrt()  # ||D_i - D||
    cosines = [
        _cosine(product, _or_none(one, totals["PP"]), square)
        for product, one in zip(with_update.tolist(), moved.tolist(), strict=True)
    ]
    defined = [cosine for cosine in cosines if cosine is not None]
    return {
        "update_norm": math.sqrt(square or 0.0),
        "update_cosine": _cosine(totals["GL"], square, last_update.square() if last_update is not None else None),
        "client_cosine": {
            "min": min(defined, default=None),
            "mean": sum(defined) / len(defined) if defined else None,
            "max": max(defined, default=None),
        },
        "client_drift": float(apart.mean()) / math.sqrt(common) if common else None,
        "subspace_angle": subspace_angle(start, after),
        "factor_norms": {
            "before": {"A": float(w @ A.sqrt()), "B": float(w @ B.sqrt())},
            "after": factor_norms(after),
        },
    }


def _beyond(sent: Sequence[LowRank], P: LowRank, parts: Parts) -> Tensor:
    """`(n,)`: `<P_i - P, sum of the parts>`."""
    found = torch.zeros(len(sent), dtype=CORE_DTYPE, device="cpu")
    for sign, part in parts:
        found += sign * (inner_with_each(sent, part, _narrower(P, part)) - _inner([(1.0, P)], [(1.0, part)]))
    return found


def _is_mean(G: Parts, mean: Tensor, before: Tensor, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `G x = mean`, sum_i w_i P_i x - P x, but for round-off beside `before`, P x; so G is, for a random x."""
    error = mean.to(CORE_DTYPE)
    size = (error + before).norm() + before.norm()
    for sign, part in G:
        error = error - sign * times(part, x)
    return bool(error.norm() <= ROUND_OFF * torch.finfo(dtype).eps * size)


def _effective(adapter: Adapter, module: str, shape: tuple[int, int]) -> LowRank:
    if module not in adapter.modules:
        some = next(iter(adapter.modules.values()))
        return zeros(shape, dtype=CORE_DTYPE, device=some.device)
    return _contiguous(adapter.effective(module))


def _contiguous(matrix: LowRank) -> LowRank:
    """The last bits of products depend on strides."""
    return LowRank(matrix.B.contiguous(), matrix.A.contiguous())


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
