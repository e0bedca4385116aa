"""One module's aggregation, exact and factored, against the published randomised SVD and a dense SVD.

    python benchmarks/aggregation_speed.py [--size 4096] [--clients 10] [--rank 16] [--repeats 5] [--dense]

Medians of alternating runs, so that a machine that slows down slows both sides. `--dense` adds the dense SVD (10 s
and more a run at 4096).
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from fedmomentum import FedIT, FedMomentum, LowRank
from fedmomentum.lowrank import difference, weighted_sum


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dense", action="store_true")
    chosen = parser.parse_args()
    n, d, r = chosen.clients, chosen.size, chosen.rank
    generator = torch.Generator().manual_seed(0)
    updates = [
        LowRank(torch.randn(d, r, generator=generator) / d**0.5, torch.randn(r, d, generator=generator) / d**0.5)
        for _ in range(n)
    ]
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    methods = {
        "FedMomentum, exact on the factors": lambda: FedMomentum()(updates, weights, rank=r),
        "FedMomentum, published randomised SVD": lambda: FedMomentum(svd="randomised")(updates, weights, rank=r),
        "FedIT (inexact)": lambda: FedIT()(updates, weights, rank=r),
    }
    if chosen.dense:
        methods["dense SVD of the sum"] = lambda: torch.linalg.svd(weighted_sum(updates, weights).dense().float())
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(chosen.repeats + 1):
        for name, method in methods.items():
            started = time.perf_counter()
            method()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    total = weighted_sum(updates, weights)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    title = f"{d} x {d}, {n} clients of rank {r}, {torch.get_num_threads()} threads, median of {chosen.repeats}"
    table = Table("method", "seconds", "times the first", "error of adapter + residual", title=title)
    for name, method in methods.items():
        error = ""
        if "SVD of the sum" not in name:
            result = method()
            kept = difference(total, result.adapter)
            rest = difference(kept, result.residual) if result.residual is not None else kept
            error = f"{rest.norm() / total.norm():.1e}"
        table.add_row(name, f"{medians[name]:.4f}", f"{medians[name] / first:.1f}", error)
    Console().print(table)


if __name__ == "__main__":
    main()
