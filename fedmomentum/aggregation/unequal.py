"""Clients of unequal rank: one global adapter, and what each client holds of it. torch only.

Client i derives from the global adapter `B A` its own adapter `B_i A_i` of rank `r_i`, and the tail
`T_i = B A - B_i A_i`, which it keeps beside its base. It trains to `B_i' A_i'`. Its effective product is then
`B_i' A_i' + T_i`, and

    sum_i w_i (B_i' A_i' + T_i) = B A + sum_i w_i (B_i' A_i' - B_i A_i).

So all clients share one effective model, and a component that only some clients can train counts in full.
"""

from __future__ import annotations

import torch

from fedmomentum.lowrank import LowRank, numerical_rank


def first_components(adapter: LowRank, rank: int) -> tuple[LowRank, LowRank]:
    """The first `rank` columns of B and rows of A, and the others: slices, so the bits are the same everywhere.

    The best of its rank where the components are singular directions in descending order.

    Raises:
        ValueError: a rank outside 1..adapter.rank.
    """
    if not 1 <= rank <= adapter.rank:
        raise ValueError(f"a client's rank must be from 1 to {adapter.rank}, the global adapter's; got {rank}")
    own = LowRank(adapter.B[:, :rank], adapter.A[:rank])
    return own, LowRank(adapter.B[:, rank:], adapter.A[rank:])


def in_order(adapter: LowRank) -> LowRank:
    """The same matrix with singular directions as components, `B = U S^1/2`, `A = S^1/2 V^T`.

    For an adapter whose components are not in order. Components that hold nothing keep a unit row of A, so that
    they can train.
    """
    U, S, Vh = adapter.svd()
    held = numerical_rank(S, adapter.shape, S.dtype)
    root = S.sqrt()
    B = torch.cat([U[:, :held] * root[:held], torch.zeros_like(U[:, held:])], dim=1)
    A = torch.cat([root[:held, None] * Vh[:held], Vh[held:]])
    return LowRank(B.to(adapter.dtype), A.to(adapter.dtype))


def with_tail(trained: LowRank, tail: LowRank) -> LowRank:
    """`B_i' A_i' + T_i`, stacked: the client's effective product, which methods are given as its update."""
    B = torch.cat([trained.B, tail.B.to(trained.dtype)], dim=1)
    return LowRank(B, torch.cat([trained.A, tail.A.to(trained.dtype)], dim=0))
