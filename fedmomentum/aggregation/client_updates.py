"""The clients' factors of one module, and the sums that methods are built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, result_dtype, zeros
from fedmomentum.linalg.matrix import LazySequence, Matrix
from fedmomentum.linalg.weighted_sum import exact_sum


class _Layout(NamedTuple):
    """What is cached of an update: everything but its factors."""

    shape: tuple[int, int]
    rank: int
    dtype: torch.dtype


class ClientUpdates(LazySequence):
    """One `LowRank` per client, loaded on lookup and never cached, with the weights.

    The updates are in effective-weight units divided by the scaling of the combined adapter, so
    methods need not handle scalings. A lookup may read from disk: iterate without keeping any, so
    that memory does not grow with the number of clients.

    Args:
        updates: The clients' factors, each `(out, rank_i)` and `(rank_i, in)`.
        weights: `(num_clients,)`, positive, summing to 1.
    """

    weights: Tensor

    def __init__(self, updates: Sequence[LowRank], weights: Tensor) -> None:
        super().__init__(lambda update: update, updates)
        self.weights = weights

    def map(self, function: Callable[[LowRank], LowRank]) -> ClientUpdates:
        """Return the updates with `function` applied to each on lookup."""
        return ClientUpdates(LazySequence(function, self), self.weights)

    @cached_property
    def _layouts(self) -> list[_Layout]:
        return [_Layout(update.shape, update.rank, update.dtype) for update in self]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """`(out, in)` of each client's product."""
        return [layout.shape for layout in self._layouts]

    @property
    def ranks(self) -> list[int]:
        """Each client's rank."""
        return [layout.rank for layout in self._layouts]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the module."""
        return self._layouts[0].shape

    @cached_property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of results: `result_dtype` of the updates."""
        return result_dtype(*(layout.dtype for layout in self._layouts))

    def sum(self, extra: Sequence[Matrix] = ()) -> Matrix:
        """Return `sum_i w_i B_i A_i` plus the matrices in `extra`, exactly; see `exact_sum`."""
        return exact_sum(self, self.weights, extra)

    def mean_factors(self) -> LowRank:
        """Return `B = sum_i w_i B_i`, `A = sum_i w_i A_i` in float64, for clients of one rank."""
        first = self[0]
        B = torch.zeros_like(first.B, dtype=CORE_DTYPE)
        A = torch.zeros_like(first.A, dtype=CORE_DTYPE)
        for w_i, update in zip(self.weights.tolist(), self, strict=True):
            B.add_(update.B, alpha=w_i)
            A.add_(update.A, alpha=w_i)
        return LowRank(B, A)

    def mean_A(self, rank: int) -> Tensor:
        """Return `sum_i w_i A_i` `(rank, in)` in float64, whatever the clients' ranks.

        Rows that a client of smaller rank lacks count as zero; rows beyond `rank` are dropped.
        """
        mean = torch.zeros(rank, self.shape[1], dtype=CORE_DTYPE, device=self.device)
        for w_i, update in zip(self.weights.tolist(), self, strict=True):
            num_rows = min(rank, update.rank)
            mean[:num_rows] += w_i * update.A[:num_rows].to(CORE_DTYPE)
        return mean

    def padded_mean(self, rank: int) -> LowRank:
        """Return `sum_i w_i B_i` and `mean_A(rank)`; missing columns of B count as zero too."""
        out_size, in_size = self.shape
        B = torch.zeros(out_size, rank, dtype=CORE_DTYPE, device=self.device)
        A = torch.zeros(rank, in_size, dtype=CORE_DTYPE, device=self.device)
        for w_i, update in zip(self.weights.tolist(), self, strict=True):
            kept = min(rank, update.rank)
            B[:, :kept] += w_i * update.B[:, :kept].to(CORE_DTYPE)
            A[:kept] += w_i * update.A[:kept].to(CORE_DTYPE)
        return LowRank(B, A)

    def averaging_error(self, mean: LowRank) -> Matrix:
        """Return `sum_i w_i B_i A_i - B A`, the error of averaging the factors, in float64.

        Computed as `sum_{i<n} w_i (B_i - B)(A_i - A_n)`. This equals the usual
        `sum_i w_i (B_i - B)(A_i - A)` because `sum_i w_i (B_i - B) = 0`, and has one term fewer:
        rank `(n - 1) r`. The rank is 0 if all clients have the same B or the same A.

        Args:
            mean: `mean_factors()`, the factors B and A.
        """
        first = self[0]
        same_B = all(torch.equal(update.B, first.B) for update in self)
        if same_B or all(torch.equal(update.A, first.A) for update in self):
            return zeros(mean.shape, dtype=CORE_DTYPE, device=mean.device)
        # The last client's deviation from itself is zero, which leaves n - 1 terms.
        last_A = self[-1].A.to(CORE_DTYPE)
        deviations = LazySequence(lambda u: LowRank(u.B - mean.B, u.A - last_A), self[:-1])
        return exact_sum(deviations, self.weights[:-1])
