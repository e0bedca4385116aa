"""`ClientDeltas`: what clients added to the adapter they were sent, free of cancellation.

Let B, A be the factors that were sent, and b_i = B_i - B, a_i = A_i - A a client's changes. Its own
update is

    D_i = B_i A_i - B A = b_i A_i + B a_i,

a sum of products of a small and a regular factor. So inner products of the D_i are as accurate as
the factors themselves, even in float32, while those of the B_i A_i lose accuracy when the part that
the clients share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank, gram

if TYPE_CHECKING:
    from fedmomentum.lora.adapter import Adapter


@dataclass(frozen=True, eq=False)
class ClientDeltas:
    """The updates D_i of n clients in one module, in the dtype of their factors.

    Attributes:
        B: `(out, n + 1, rank)`: B, then b_1, ..., b_n.
        A: `(n + 1, rank, in)`: A, then a_1, ..., a_n.
    """

    B: Tensor
    A: Tensor

    @classmethod
    def of(
        cls, start: LowRank, clients: Sequence[LowRank], rank: int, dtype: torch.dtype
    ) -> ClientDeltas:
        """Return the clients' updates in `dtype`.

        Args:
            start: What the clients started from.
            clients: What they sent.
            rank: The largest rank; smaller factors are padded with zeros.
            dtype: The dtype of the result.
        """
        B = torch.empty(start.shape[0], len(clients) + 1, rank, dtype=dtype, device=start.device)
        A = torch.empty(len(clients) + 1, rank, start.shape[1], dtype=dtype, device=start.device)
        B_0, A_0 = _padded(start, rank)
        B[:, 0] = B_0
        A[0] = A_0
        for i, client in enumerate(clients, start=1):
            B_i, A_i = _padded(client, rank)
            B[:, i] = B_i - B_0
            A[i] = A_i - A_0
        return cls(B, A)

    def inner_products(self) -> Tensor:
        """Return `(n, n)`: `<D_i, D_j>` in float64, from two Gram matrices: `O((d + k) R^2)`.

        <D_i, D_j> = <b_i^T b_j, A_i A_j^T> + <b_i^T B, A_i a_j^T> + <b_j^T B, A_j a_i^T> + <B^T B,
        a_i a_j^T>.
        """
        count, rank, in_size = self.A.shape
        # Gram matrices of all B's and all A's, with one block per pair of clients.
        K_B, K_A = (  # (n + 1, n + 1, rank, rank)
            gram(rows).view(count, rank, count, rank).transpose(1, 2)
            for rows in (self.B.view(len(self.B), -1).mT, self.A.view(-1, in_size))
        )
        end_move = K_A[:1, 1:] + K_A[1:, 1:]  # A_i a_j^T
        end_end = K_A[:1, :1] + K_A[1:, :1] + end_move
        crossed = (K_B[1:, :1] * end_move).sum((2, 3), dtype=CORE_DTYPE)
        products = (K_B[1:, 1:] * end_end).sum((2, 3), dtype=CORE_DTYPE) + crossed + crossed.mT
        return (products + (K_B[:1, :1] * K_A[1:, 1:]).sum((2, 3), dtype=CORE_DTYPE)).cpu()

    def mean(self, weights: Tensor) -> LowRank:
        """Return `sum_i w_i D_i = [w_1 b_1, ..., w_n b_n, B] [A_1; ...; A_n; sum_i w_i a_i]`.

        Args:
            weights: `(n,)`.
        """
        w = weights.to(self.B)
        B = torch.cat([self.B[:, 1:] * w[:, None], self.B[:, :1]], dim=1)
        A = torch.cat([self.A[1:] + self.A[:1], (w @ self.A[1:].flatten(1)).view_as(self.A[:1])])
        return LowRank(B.flatten(1), A.flatten(0, 1))

    def mean_times(self, weights: Tensor, x: Tensor) -> Tensor:
        """Return `sum_i w_i D_i x`, `(out,)`, for x `(in,)`."""
        w = weights.to(self.A)
        A_x = self.A @ x.to(self.A)  # A x, a_1 x, ..., a_n x
        ends = torch.cat([(w @ A_x[1:])[None], w[:, None] * (A_x[1:] + A_x[:1])])
        return self.B.flatten(1) @ ends.flatten()


def _padded(matrix: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors padded with zeros to a larger rank."""
    missing = rank - matrix.rank
    if not missing:
        return matrix.B, matrix.A
    return pad(matrix.B, (0, missing)), pad(matrix.A, (0, 0, 0, missing))


# ── a round, by its factors ───────────────────────────────────────────────────────────────────────

BATCH_ELEMENTS = 2**20
"""Number of elements in a batch of equally shaped factors: 8 MB in float64."""


def distance(one: Adapter, other: Adapter) -> float:
    """Return `sqrt(sum over modules ||s B A - t B' A'||_F^2)` of two adapters, in float64.

    It is computed from `[s B, -t B'] [A; A']`; small modules of equal shape are batched.
    """
    # Group the modules by shape and by both ranks.
    groups: dict[tuple[tuple[int, int], int, int], list[str]] = {}
    for module, matrix in one.modules.items():
        group = (matrix.shape, matrix.rank, other.modules[module].rank)
        groups.setdefault(group, []).append(module)
    total = 0.0
    for (shape, *ranks), modules in groups.items():
        step = max(1, BATCH_ELEMENTS // (sum(shape) * max(sum(ranks), 1)))
        for start in range(0, len(modules), step):
            B_s: list[Tensor] = []
            A_s: list[Tensor] = []
            for adapter, sign in ((one, 1.0), (other, -1.0)):
                some = [adapter.modules[module] for module in modules[start : start + step]]
                s = torch.tensor(
                    [sign * adapter.scalings[m] for m in modules[start : start + step]],
                    dtype=CORE_DTYPE,
                )
                B_s += [
                    torch.stack([m.B for m in some]).to(CORE_DTYPE)
                    * s.to(some[0].device)[:, None, None]
                ]
                A_s += [torch.stack([m.A for m in some]).to(CORE_DTYPE)]
            B, A = torch.cat(B_s, dim=2), torch.cat(A_s, dim=1)
            total += float(((B.mT @ B) * (A @ A.mT)).sum((1, 2)).clamp(min=0).sum())
    return math.sqrt(total)
