"""How a round moved the model, measured using only the factors. Depends only on torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.formats.round_record import CosineRange, Diagnostics, FactorNorms, PerFactor
from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, result_dtype, zeros
from fedmomentum.linalg.matrix import LazySequence, Matrix, inner, inner_products, matvec
from fedmomentum.linalg.spectral import principal_angles
from fedmomentum.linalg.weighted_sum import exact_sum
from fedmomentum.server.client_deltas import ClientDeltas

if TYPE_CHECKING:
    from fedmomentum.lora.adapter import Adapter


Change = Mapping[str, Matrix]
"""Module to `(out, in)` matrix in units of effective weights; a missing module counts as zero."""

ROUNDOFF_TOL = 10.0
"""Two sums that differ by at most this many epsilons of their dtype differ only by round-off."""
Parts = list[tuple[float, Matrix]]
"""The terms of a sum, each with its sign."""
_ZERO_FRACTION = torch.finfo(torch.float32).eps ** 2
"""A squared change below this fraction of the square of what it changes is float32 round-off."""


class GlobalUpdate(Mapping[str, Matrix]):
    """`s' B' A' - s B A + merged` per module: a round's change of the effective weights.

    A mapping from module to a float64 matrix, computed by `exact_sum` on access so that only one
    module's is in memory at a time.

    Args:
        before: The adapter that the round started from.
        after: The adapter that resulted.
        merged: What the base absorbed.
        norm: The norm of the change over all modules, if known.
    """

    def __init__(
        self, before: Adapter, after: Adapter, merged: Change, norm: float | None = None
    ) -> None:
        self._before, self._after, self._merged, self._norm = before, after, merged, norm

    def __getitem__(self, module: str) -> Matrix:
        matrices = [part for _, part in self.parts(module)]
        return exact_sum(matrices[:2], [1.0, -1.0], matrices[2:])  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._after.modules)

    def __len__(self) -> int:
        return len(self._after.modules)

    def parts(self, module: str) -> Parts:
        """Return the terms of one module's change with their signs, without summing them."""
        own = (_contiguous(adapter.effective(module)) for adapter in (self._after, self._before))
        parts: Parts = list(zip((1.0, -1.0), own, strict=True))
        if module not in self._merged:
            return parts
        merged = self._merged[module]
        if isinstance(merged, Tensor):
            return [*parts, (1.0, merged.contiguous())]
        # The last bits of small products also depend on memory alignment, which is arbitrary for
        # tensors cut out of a payload.
        B, A = (
            factor.clone(memory_format=torch.contiguous_format) for factor in (merged.B, merged.A)
        )
        return [*parts, (1.0, LowRank(B, A))]

    def square(self) -> float:
        """`||.||_F^2` over all modules."""
        if self._norm is not None:
            return self._norm**2
        return sum(_inner(parts, parts) for parts in map(self.parts, self))


def _inner(left: Parts, right: Parts) -> float:
    """Return the inner product of two sums, term by term."""
    return sum(s * t * inner(a, b, _narrower(a, b)) for s, a in left for t, b in right)


def _narrower(left: Matrix, right: Matrix) -> torch.dtype:
    """Return float32 if either is: no cancellation occurs within a term, so none is upcast."""
    return torch.float32 if torch.float32 in (left.dtype, right.dtype) else CORE_DTYPE


def factor_norms(adapter: Adapter) -> PerFactor:
    """Return `sqrt(sum over modules ||A||_F^2)`, and the same for B, without the scaling."""
    squares = {
        "A": [float(matrix.A.to(CORE_DTYPE).square().sum()) for matrix in adapter.modules.values()],
        "B": [float(matrix.B.to(CORE_DTYPE).square().sum()) for matrix in adapter.modules.values()],
    }
    return PerFactor(A=math.sqrt(sum(squares["A"])), B=math.sqrt(sum(squares["B"])))


def subspace_angle(before: Adapter, after: Adapter) -> PerFactor:
    """Return the mean principal angles in degrees between two adapters' products.

    `A` is the angle between their row spaces, `B` between their column spaces.

    Only nonzero directions span the spaces (`principal_angles`). The angles are averaged within
    each module, then over the modules. None if one of the adapters is zero in all modules.
    """
    degrees: dict[str, list[float]] = {"A": [], "B": []}
    for module, matrix in after.modules.items():
        for factor, angles in zip(
            "AB", principal_angles(before.modules[module], matrix), strict=True
        ):
            degrees[factor] += [math.degrees(float(angles.mean()))] if len(angles) else []
    means = {factor: sum(d) / len(d) if d else None for factor, d in degrees.items()}
    return PerFactor(A=means["A"], B=means["B"])


def round_diagnostics(
    start: Adapter,
    clients: Sequence[Adapter],
    weights: Sequence[float],
    after: Adapter,
    merged: Change,
    last_update: GlobalUpdate | None,
) -> Diagnostics:
    """Measure how a round moved the model; docs/metrics.md has the formulas.

    Let D_i = s_i B_i A_i - s B A be client i's own update, D their weighted mean and G the global
    update. Everything but the angles follows from the inner products `<D_i, D_j>`, `<D_i, G>` and
    `<G, G_-1>`. The cost is that of the sum: `O((d + k) R^2)` if it is factored, else `O(d k R)`.
    Modules are processed one by one.

    Args:
        start: The adapter that the clients started from.
        clients: What they sent.
        weights: One positive number per client, summing to 1.
        after: The next adapter, as clients will receive it.
        merged: What the base absorbed in this round.
        last_update: The global update of the previous round; None if there was none.

    Returns:
        The diagnostics; undefined ones are None.
    """
    geometry = RoundGeometry(start, clients, weights, after, merged, last_update)
    for module in sorted(after.modules):
        geometry.add(module)
    return geometry.result()


class RoundGeometry:
    """Inner products of one round's updates, summed over the modules.

    The letters are those of the formulas: D_i is a client's update, D their weighted mean, G the
    global update, L that of the previous round, P the product that the clients started from.

    Args: See `round_diagnostics`.
    """

    def __init__(
        self,
        start: Adapter,
        clients: Sequence[Adapter],
        weights: Sequence[float],
        after: Adapter,
        merged: Change,
        last_update: GlobalUpdate | None,
    ) -> None:
        self._start = start
        self._clients = clients
        self._after = after
        self._update = GlobalUpdate(start, after, merged)
        self._last_update = last_update
        self._w = torch.tensor(weights, dtype=CORE_DTYPE, device="cpu")

        # One number per client: <D_i, D_i>, <D_i, D>, <D_i, G>, ||A_i||^2 and ||B_i||^2.
        sums = torch.zeros(5, len(clients), dtype=CORE_DTYPE, device="cpu")
        self._own, self._with_mean, self._with_update, self._A, self._B = sums
        self._PP = 0.0
        self._live = 0.0
        self._DD = 0.0
        self._GG = 0.0
        self._GL = 0.0

    def add(self, module: str) -> None:
        """Add one module's inner products."""
        matrix = self._after.modules[module]
        dtype = result_dtype(matrix.dtype)
        G = self._update.parts(module)
        live = G[0][1]
        P = G[1][1]
        assert isinstance(live, LowRank) and isinstance(P, LowRank)  # after and start
        sent = LazySequence(partial(_effective, module=module, shape=matrix.shape), self._clients)
        self._add_factor_norms(module)

        # Test with a random vector whether G is the mean of the D_i.
        x = torch.randn(
            matrix.shape[1],
            generator=torch.Generator().manual_seed(0),
            dtype=CORE_DTYPE,
            device="cpu",
        )
        x = x.to(P.device)
        start_x = matvec(P, x)
        rank = self._largest_rank(P, module)
        num_factored = (len(self._clients) + 1) * rank * sum(matrix.shape)
        if num_factored < matrix.shape[0] * matrix.shape[1]:
            G, GG, with_update = self._add_factored(G, P, sent, rank, dtype, x, start_x)
        else:
            GG, with_update = self._add_dense(G, P, sent, dtype, x, start_x)
        self._with_update = self._with_update + with_update
        self._GG += GG
        self._PP += inner(P, P)
        self._live += inner(live, live)
        if self._last_update is not None and module in self._last_update:
            self._GL += _inner(G, self._last_update.parts(module))

    def _add_factor_norms(self, module: str) -> None:
        for i, client in enumerate(self._clients):
            if module in client.modules:
                factors = client.modules[module]
                self._A[i] += factors.A.square().sum(dtype=CORE_DTYPE)
                self._B[i] += factors.B.square().sum(dtype=CORE_DTYPE)

    def _largest_rank(self, P: LowRank, module: str) -> int:
        ranks = [
            client.modules[module].rank for client in self._clients if module in client.modules
        ]
        return max([P.rank, *ranks])

    def _add_factored(
        self,
        G: Parts,
        P: LowRank,
        sent: Sequence[LowRank],
        rank: int,
        dtype: torch.dtype,
        x: Tensor,
        start_x: Tensor,
    ) -> tuple[Parts, float, Tensor]:
        """Add a module whose factors together are smaller than its matrix.

        Returns:
            G, with fewer terms if it is the mean; `<G, G>`; and `(n,)`: `<D_i, G>`.
        """
        deltas = ClientDeltas.of(P, sent, rank, dtype)
        is_mean = _is_mean(G, deltas.mean_times(self._w, x), start_x, x, dtype)
        products = deltas.inner_products()
        with_mean = products @ self._w
        DD = float(self._w @ products @ self._w)
        if is_mean and self._last_update is not None:
            G = [(1.0, deltas.mean(self._w))]
        del deltas  # free memory before what follows
        self._own = self._own + products.diagonal()
        self._with_mean = self._with_mean + with_mean
        self._DD += DD
        if is_mean:
            return G, DD, with_mean
        return G, _inner(G, G), _inner_with_deltas(sent, P, G)

    def _add_dense(
        self,
        G: Parts,
        P: LowRank,
        sent: Sequence[LowRank],
        dtype: torch.dtype,
        x: Tensor,
        start_x: Tensor,
    ) -> tuple[float, Tensor]:
        """Add a module whose matrix is smaller than the clients' factors together.

        Returns:
            `<G, G>`, and `(n,)`: `<D_i, G>`.
        """
        weighted = zip(self._w.tolist(), sent, strict=True)
        mean_x = sum((w_i * matvec(matrix, x) for w_i, matrix in weighted), -start_x)
        is_mean = _is_mean(G, mean_x, start_x, x, dtype)
        D = G
        if not is_mean:
            D = [(1.0, exact_sum([*sent, P], [*self._w.tolist(), -1.0]))]
        squares = [matrix.inner(matrix) for matrix in sent]
        own = torch.tensor(squares, dtype=CORE_DTYPE, device="cpu")
        own += inner(P, P) - 2 * inner_products(sent, P)
        with_mean = _inner_with_deltas(sent, P, D)
        DD = _inner(D, D)
        self._own = self._own + own
        self._with_mean = self._with_mean + with_mean
        self._DD += DD
        if is_mean:
            return DD, with_mean
        return _inner(G, G), _inner_with_deltas(sent, P, G)

    def result(self) -> Diagnostics:
        """Return the diagnostics over all modules."""
        # A difference at round-off level counts as zero: its cosine would be noise.
        GG = _or_none(self._GG, self._PP + self._live)
        DD = _or_none(self._DD, self._PP)
        deviations = (self._own - 2 * self._with_mean + self._DD).clamp(min=0).sqrt()
        cosines = []
        for product, square in zip(self._with_update.tolist(), self._own.tolist(), strict=True):
            cosine = _cosine(product, _or_none(square, self._PP), GG)
            if cosine is not None:
                cosines.append(cosine)
        last_square = None if self._last_update is None else self._last_update.square()
        return Diagnostics(
            update_norm=math.sqrt(GG or 0.0),
            update_cosine=_cosine(self._GL, GG, last_square),
            client_cosine=CosineRange(
                min=min(cosines, default=None),
                mean=sum(cosines) / len(cosines) if cosines else None,
                max=max(cosines, default=None),
            ),
            client_drift=float(deviations.mean()) / math.sqrt(DD) if DD else None,
            subspace_angle=subspace_angle(self._start, self._after),
            factor_norms=FactorNorms(
                before=PerFactor(
                    A=float(self._w @ self._A.sqrt()), B=float(self._w @ self._B.sqrt())
                ),
                after=factor_norms(self._after),
            ),
        )


def _inner_with_deltas(sent: Sequence[LowRank], P: LowRank, parts: Parts) -> Tensor:
    """Return `(n,)`: `<P_i - P, sum of the parts>`."""
    found = torch.zeros(len(sent), dtype=CORE_DTYPE, device="cpu")
    for sign, part in parts:
        found += sign * (
            inner_products(sent, part, _narrower(P, part)) - _inner([(1.0, P)], [(1.0, part)])
        )
    return found


def _is_mean(G: Parts, mean: Tensor, before: Tensor, x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether `G x = mean = sum_i w_i P_i x - P x`, up to round-off of `before = P x`.

    For a random x, this implies that G is the mean.
    """
    error = mean.to(CORE_DTYPE)
    size = (error + before).norm() + before.norm()
    for sign, part in G:
        error = error - sign * matvec(part, x)
    return bool(error.norm() <= ROUNDOFF_TOL * torch.finfo(dtype).eps * size)


def _effective(adapter: Adapter, module: str, shape: tuple[int, int]) -> LowRank:
    if module not in adapter.modules:
        some = next(iter(adapter.modules.values()))
        return zeros(shape, dtype=CORE_DTYPE, device=some.device)
    return _contiguous(adapter.effective(module))


def _contiguous(matrix: LowRank) -> LowRank:
    """Return a contiguous copy: the last bits of products depend on strides."""
    return LowRank(matrix.B.contiguous(), matrix.A.contiguous())


def _or_none(square: float, size: float) -> float | None:
    """Return a squared norm; None if it is mere round-off of terms of squared size `size`."""
    return square if square > _ZERO_FRACTION * size else None


def _cosine(product: float, one: float | None, other: float | None) -> float | None:
    """Return `<x, y> / (||x|| ||y||)` from squared norms, in [-1, 1]; None if one norm is zero."""
    if not one or not other:
        return None
    return max(-1.0, min(1.0, product / math.sqrt(one) / math.sqrt(other)))
