"""Combine three toy adapters: what averaging the factors loses, and where the exact sum goes.

Run: python examples/aggregate_by_hand.py
"""

import torch

from fedmomentum import AggregationContext, ClientUpdates, FedIT, FedMomentum, LowRank
from fedmomentum.linalg.low_rank import weighted_sum
from fedmomentum.linalg.spectral import relative_error

OUT = 64
IN = 48
RANK = 4


def drifted(A: torch.Tensor, generator: torch.Generator) -> LowRank:
    """Return a client's adapter of one module: all start from the same A and B = 0, then drift."""
    step = torch.randn(RANK, IN, generator=generator, dtype=torch.float64) * 0.1
    B = torch.randn(OUT, RANK, generator=generator, dtype=torch.float64) * 0.1
    return LowRank(B, A + step)


def main() -> None:
    """Aggregate once by each method and print what became of the sum."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(RANK, IN, generator=generator, dtype=torch.float64) * 0.1
    updates = [drifted(A, generator) for _ in range(3)]
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    exact = weighted_sum(updates, weights)
    S = exact.svd()[1]
    shares = S.square() / S.square().sum()
    print(
        f"{len(updates)} clients, a {OUT} x {IN} module, rank {RANK}; their sum has rank {len(S)}"
    )
    print("energy of its directions:", " ".join(f"{share:.1%}" for share in shares.tolist()))

    for method in (FedIT(), FedMomentum()):
        result = method.aggregate(ClientUpdates(updates, weights), AggregationContext(rank=RANK))
        applied = result.adapter
        residual = "none"
        if isinstance(result.residual, LowRank):  # a matrix only where factors would be larger
            applied = weighted_sum([result.adapter, result.residual], [1.0, 1.0])
            residual = f"rank {result.residual.rank}"
        print(f"\n{method!r}")
        print(f"  adapter: rank {result.adapter.rank}, residual: {residual}")
        print(f"  error of the adapter alone:   {relative_error(result.adapter, exact):.1e}")
        print(f"  error of what the model gets: {relative_error(applied, exact):.1e}")


if __name__ == "__main__":
    main()
