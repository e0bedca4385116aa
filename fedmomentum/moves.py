"""What clients added to the adapter that they were sent, so written that nothing cancels.

With B, A the factors sent and b_i = B_i - B, a_i = A_i - A those that a client moved by, its own update is

    D_i = B_i A_i - B A = b_i A_i + B a_i,

a sum of products of what is small with what is not. So inner products of the D_i are as exact as the factors' own
numbers, in float32 too, while those of the B_i A_i lose what the clients have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedmomentum.lowrank import CORE_DTYPE, LowRank, gram


@dataclass(frozen=True, eq=False)
class Moves:
    """The updates D_i of n clients in one module, in the dtype of their factors.

    Attributes:
        B: `(out, n + 1, rank)`: B, then b_1, ..., b_n.
        A: `(n + 1, rank, in)`: A, then a_1, ..., a_n.
    """

    B: Tensor
    A: Tensor

    @classmethod
    def of(cls, start: LowRank, clients: Sequence[LowRank], rank: int, dtype: torch.dtype) -> Moves:
        """The moves of clients, in `dtype`; factors of ranks below `rank`, the largest, are filled up with zeros."""
        B = torch.empty(start.shape[0], len(clients) + 1, rank, dtype=dtype, device=start.device)
        A = torch.empty(len(clients) + 1, rank, start.shape[1], dtype=dtype, device=start.device)
        B_0, A_0 = _filled(start, rank)
        B[:, 0], A[0] = B_0, A_0
        for i, client in enumerate(clients, start=1):
            B_i, A_i = _filled(client, rank)
            B[:, i], A[i] = B_i - B_0, A_i - A_0
        return cls(B, A)

    def inner_products(self) -> Tensor:
        """`(n, n)`: `<D_i, D_j>`, float64, of two Gram matrices of the stack: `O((d + k) R^2)`.

        <D_i, D_j> = <b_i^T b_j, A_i A_j^T> + <b_i^T B, A_i a_j^T> + <b_j^T B, A_j a_i^T> + <B^T B, a_i a_j^T>.
        """
        count, rank, in_size = self.A.shape
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
        """`sum_i w_i D_i = [w_1 b_1, ..., w_n b_n, B] [A_1; ...; A_n; sum_i w_i a_i]`; weights `(n,)`."""
        w = weights.to(self.B)
        B = torch.cat([self.B[:, 1:] * w[:, None], self.B[:, :1]], dim=1)
        A = torch.cat([self.A[1:] + self.A[:1], (w @ self.A[1:].flatten(1)).view_as(self.A[:1])])
        return LowRank(B.flatten(1), A.flatten(0, 1))

    def mean_times(self, weights: Tensor, x: Tensor) -> Tensor:
        """`sum_i w_i D_i x`, `(out,)`, for x `(in,)`."""
        w, moved = weights.to(self.A), self.A @ x.to(self.A)  # A x, a_1 x, ..., a_n x
        ends = torch.cat([(w @ moved[1:])[None], w[:, None] * (moved[1:] + moved[:1])])
        return self.B.flatten(1) @ ends.flatten()


def _filled(matrix: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - matrix.rank
    return (pad(matrix.B, (0, missing)), pad(matrix.A, (0, 0, 0, missing))) if missing else (matrix.B, matrix.A)
