"""Builders and tolerances shared by all tests of the algebra."""

from __future__ import annotations

import torch

from fedmomentum.aggregation.client_updates import ClientUpdates
from fedmomentum.aggregation.method import AggregationContext, ModuleAggregate
from fedmomentum.linalg.low_rank import LowRank

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_matrix(
    out_size, in_size, rank, *, seed=0, dtype=torch.float64, condition=1.0
) -> LowRank:
    """Random factors, each of the condition number asked for (spread over its columns, then mixed)."""
    g = generator(seed)
    B = torch.linalg.qr(torch.randn(out_size, rank, generator=g, dtype=torch.float64)).Q
    A = torch.linalg.qr(torch.randn(in_size, rank, generator=g, dtype=torch.float64)).Q.mT
    if rank:
        spread = torch.logspace(
            0, -torch.log10(torch.tensor(condition)).item(), rank, dtype=torch.float64
        )
        mix = [
            torch.linalg.qr(torch.randn(rank, rank, generator=g, dtype=torch.float64)).Q
            for _ in range(2)
        ]
        B, A = B * spread @ mix[0], mix[1] @ (spread[:, None] * A)
    return LowRank(B.to(dtype), A.to(dtype))


def clients(
    shape=(40, 30), ranks=(4, 4, 4), *, seed=0, dtype=torch.float64, condition=1.0
) -> list[LowRank]:
    return [
        random_matrix(*shape, r, seed=seed * 100 + i, dtype=dtype, condition=condition)
        for i, r in enumerate(ranks)
    ]


def some_weights(n: int, seed: int = 0) -> torch.Tensor:
    w = torch.rand(n, generator=generator(seed), dtype=torch.float64) + 0.1
    return w / w.sum()


def dense_sum(updates, weights) -> torch.Tensor:
    """The exact sum, computed directly in float64."""
    return sum(
        float(w) * u.B.double() @ u.A.double() for u, w in zip(updates, weights, strict=True)
    )


def valid_updates(method, updates, reference=None, server_round=1) -> list[LowRank]:
    """The updates as that method's clients could send them: what is not trained is the reference's factor."""
    trained = method.trained_factors(server_round)
    start = reference or updates[0]
    return [
        LowRank(u.B if "B" in trained else start.B, u.A if "A" in trained else start.A)
        for u in updates
    ]


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(
        torch.linalg.matrix_norm(got.detach().double() - wanted) / torch.linalg.matrix_norm(wanted)
    )


def aggregate(method, updates, weights, *, rank, **context) -> ModuleAggregate:
    """One module aggregated by a method, in a context of these fields."""
    context = AggregationContext(rank=rank, **context)
    return method.aggregate(ClientUpdates(updates, weights), context)
