"""One module's aggregation against the published randomized SVD, dense SVDs and FedIT.

    python benchmarks/aggregation_speed.py [--clients 10] [--ranks 16 64] [--repeats 7] [--no-dense]
        [--sweeps] [--busy] [--json FILE]

Sides take turns within one process, and medians are compared. "published" is the dense sum as the
method's public code makes it, `total = total + w_i * (B_i @ A_i)` client by client, and its
randomized SVD, in float32, without forming a residual; "stacked" is the same with the sum made in
one product of stacked factors, as our own option does. Inputs: `apart`, factors without anything in
common, for which float32 is accurate enough; `common start`, clients that moved a tenth from one
adapter, as in a round; `every client twice`, a sum of half its rank. The floor is the time that
reading the factors, writing the result and the path's products would take at this machine's own
rates. `--sweeps`
adds the cost against clients, rank and width, which `benchmarks/plots.py` draws from the JSON file.
`--no-dense` leaves out the dense SVD and PEFT's (12 s a run each). `--busy` is for a machine that
has other work: one thread, and its CPU time instead of the time that passes.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import (
    Clock,
    Limits,
    Target,
    alternate,
    environment,
    machine_limits,
    medians,
    print_targets,
    write_json,
)
from rich.console import Console
from rich.table import Table
from torch import nn

from fedmomentum import Adapter, AggregationContext, ClientUpdates, FedIT, FedMomentum, LowRank
from fedmomentum.aggregation.aggregate import AggregationResult, RoundContext, aggregate_updates
from fedmomentum.linalg.low_rank import difference, weighted_sum
from fedmomentum.linalg.spectral import randomized_svd
from fedmomentum.linalg.truncated_svd.dispatch import truncated_svd
from fedmomentum.linalg.truncated_svd.subspace_iteration import SKETCH_COLUMNS
from fedmomentum.server.diagnostics import round_diagnostics
from fedmomentum.utils.process import tune_malloc

SHAPES = {  # (out, in) of Linear layers
    "LLaMA-2-7B attention": (4096, 4096),
    "LLaMA-3-8B k, v": (1024, 4096),
    "LLaMA-3-8B up, gate": (14336, 4096),
    "LLaMA-3-8B down": (4096, 14336),
}
RANKS = (16, 64)
INPUTS = ("apart", "common start", "every client twice")
# How many times faster is wanted: where float32 Gram matrices will do, on any input, than dense.
CHEAP = 40
ANY = 20
DENSE = 300


def clients(kind: str, shape: tuple[int, int], rank: int, n: int, seed: int = 0) -> list[LowRank]:
    """Draw the updates of n clients; `kind` is one of `INPUTS`."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> LowRank:
        B = torch.randn(shape[0], rank, generator=generator)
        A = torch.randn(rank, shape[1], generator=generator)
        return LowRank(B / shape[0] ** 0.5, A / shape[1] ** 0.5)

    if kind == "every client twice":
        half = [draw() for _ in range(-(-n // 2))]
        return (half + half)[:n]
    if kind == "apart":
        return [draw() for _ in range(n)]
    start = draw()
    return [
        LowRank(start.B + 0.1 * one.B, start.A + 0.1 * one.A) for one in (draw() for _ in range(n))
    ]


def even(n: int) -> torch.Tensor:
    """Return n equal weights."""
    return torch.full((n,), 1 / n, dtype=torch.float64)


def published(updates: Sequence[LowRank]) -> None:
    """Aggregate as the method's public code does: a dense sum client by client, and its SVD."""
    weight = 1 / len(updates)
    total = weight * (updates[0].B @ updates[0].A)
    for update in updates[1:]:
        total = total + weight * (update.B @ update.A)
    randomized_svd(total, sum(update.rank for update in updates), torch.Generator().manual_seed(0))


def stacked(updates: Sequence[LowRank]) -> None:
    """Aggregate by the same SVD, the sum made in one product of stacked factors."""
    total = weighted_sum(updates, even(len(updates)), dtype=torch.float32)
    randomized_svd(total, total.rank, torch.Generator().manual_seed(0))


def ours(updates: Sequence[LowRank], rank: int) -> None:
    """Aggregate by FedMomentum."""
    FedMomentum().aggregate(
        ClientUpdates(updates, even(len(updates))), AggregationContext(rank=rank)
    )


def floor(limits: Limits, shape: tuple[int, int], rank: int, n: int, path: str) -> float:
    """Return seconds: factors read, result written; the products of the path, and of the rest."""
    sides = sum(shape)
    R = n * rank
    gram = sides * R**2 / 1e9
    rest = 2 * sides * rank * (R - rank) / 1e9
    bases = 2 * sides * rank * R / 1e9
    sweep = 4 * sides * (rank + SKETCH_COLUMNS) * R / 1e9
    traffic = 2 * 4 * sides * R / 1e9
    if path == "iterated":
        return limits.seconds(gigabytes=traffic, float32=sweep + bases + rest)
    if path == "gram32":
        return limits.seconds(gigabytes=traffic, float32=gram + bases + rest)
    return limits.seconds(gigabytes=traffic, float32=rest, float64=gram + bases)


def sides_of(updates: dict[str, list[LowRank]], rank: int) -> dict[str, Callable[[], object]]:
    """Return ours on every input, and the others on the first."""
    first = next(iter(updates.values()))
    sides: dict[str, Callable[[], object]] = {
        kind: partial(ours, some, rank) for kind, some in updates.items()
    }
    sides["published"] = partial(published, first)
    sides["stacked"] = partial(stacked, first)
    sides["FedIT"] = lambda: FedIT().aggregate(
        ClientUpdates(first, even(len(first))), AggregationContext(rank=rank)
    )
    return sides


def speed(
    n: int, ranks: Sequence[int], repeats: int, limits: Limits, clock: Clock, console: Console
) -> tuple[list[dict[str, Any]], list[Target]]:
    """Time one module of each shape and rank on every side."""
    table = Table(
        "module",
        "rank",
        "input",
        "path",
        "ours",
        "floor",
        "of floor",
        "published",
        "ratio",
        "wanted",
        "met",
        "stacked",
        "ratio",
        "FedIT",
        title=f"One module, {n} clients, {torch.get_num_threads()} threads; milliseconds, medians",
        title_justify="left",
    )
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    for rank in ranks:
        for name, shape in SHAPES.items():
            updates = {kind: clients(kind, shape, rank, n) for kind in INPUTS}
            turns = repeats if rank <= 16 else max(2, repeats // 3)
            runs = alternate(sides_of(updates, rank), turns, clock=clock)
            got = medians(runs)
            for kind in INPUTS:
                path = truncated_svd(updates[kind], even(n), rank, dtype=torch.float32).path
                least = floor(limits, shape, rank, n, path)
                ratio = got["published"] / got[kind]
                wanted = CHEAP if path == "gram32" else ANY
                target = Target.at_least(
                    f"{shape[0]} x {shape[1]}, rank {rank}, {kind}: times", wanted, ratio
                )
                targets.append(target)
                rows.append(
                    {
                        "module": name,
                        "shape": shape,
                        "clients": n,
                        "rank": rank,
                        "input": kind,
                        "path": path,
                        "ours": got[kind],
                        "published": got["published"],
                        "stacked": got["stacked"],
                        "FedIT": got["FedIT"],
                        "floor": least,
                        "ratio": ratio,
                        "runs": runs[kind],
                    }
                )
                met = "[green]yes[/]" if target.met else "[red]no[/]"
                table.add_row(
                    f"{name} {shape[0]}x{shape[1]}",
                    str(rank),
                    kind,
                    path,
                    f"{got[kind] * 1e3:.1f}",
                    f"{least * 1e3:.1f}",
                    f"{got[kind] / least:.1f}",
                    f"{got['published'] * 1e3:.0f}",
                    f"{ratio:.1f}",
                    str(wanted),
                    met,
                    f"{got['stacked'] * 1e3:.0f}",
                    f"{got['stacked'] / got[kind]:.1f}",
                    f"{got['FedIT'] * 1e3:.1f}",
                )
    console.print(table)
    return rows, targets


def peft_svd(updates: Sequence[LowRank], rank: int, clock: Clock) -> float:
    """Time PEFT's own merge of these adapters, by the SVD of the dense sum."""
    from peft import LoraConfig, get_peft_model

    out_size, in_size = updates[0].shape
    model: Any = nn.ModuleDict({"layer": nn.Linear(in_size, out_size, bias=False)})
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    peft_model: Any = get_peft_model(model, config, adapter_name="0")
    for i in range(1, len(updates)):
        peft_model.add_adapter(str(i), config)
    layer = peft_model.base_model.model["layer"]
    with torch.no_grad():
        for i, update in enumerate(updates):
            layer.lora_B[str(i)].weight.copy_(update.B)
            layer.lora_A[str(i)].weight.copy_(update.A)
    names = [str(i) for i in range(len(updates))]
    weights = [1 / len(updates)] * len(updates)
    merge = partial(peft_model.add_weighted_adapter, names, weights, "merged")
    return once(partial(merge, combination_type="svd", svd_rank=rank), clock)


def once(side: Callable[[], Any], clock: Clock) -> float:
    """Time one run, without a warmup."""
    return alternate({"": side}, 1, warmups=0, clock=clock)[""][0]


def dense(
    n: int, rows: Sequence[dict[str, Any]], clock: Clock, console: Console
) -> tuple[dict[str, Any], list[Target]]:
    """Time the dense SVD of the sum and PEFT's, once each, at the first shape and rank."""
    shape = next(iter(SHAPES.values()))
    rank = rows[0]["rank"]
    updates = clients("apart", shape, rank, n)
    delta = weighted_sum(updates, even(n), dtype=torch.float32).dense()
    svd = once(partial(torch.linalg.svd, delta, full_matrices=False), clock)
    merge = peft_svd(updates, rank, clock)
    ms = rows[0]["ours"]
    targets = [
        Target.at_least(
            f"{shape[0]} x {shape[1]}, rank {rank}, apart: times the dense SVD", DENSE, svd / ms
        ),
        Target.at_least(
            f"{shape[0]} x {shape[1]}, rank {rank}, apart: times PEFT's SVD merge",
            DENSE,
            merge / ms,
        ),
    ]
    console.print(
        f"{shape[0]} x {shape[1]}, once each: dense SVD of the sum {svd:.1f} s, PEFT's "
        f"{merge:.1f} s\n"
    )
    return {"shape": shape, "rank": rank, "dense SVD": svd, "PEFT": merge}, targets


def graded_updates(
    n: int, shape: tuple[int, int], rank: int, condition: float, seed: int
) -> list[LowRank]:
    """Draw updates whose singular values fall from 1 to 1 / `condition`."""
    generator = torch.Generator().manual_seed(seed)
    updates = []
    for _ in range(n):
        bases = [
            torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape
        ]
        turns = [
            torch.linalg.qr(torch.randn(rank, rank, generator=generator).double()).Q
            for _ in range(2)
        ]
        graded = torch.logspace(
            0, -torch.tensor(condition).log10().item(), rank, dtype=torch.float64
        )
        Q = [torch.linalg.qr(basis).Q for basis in bases]
        update = LowRank(Q[0] * graded @ turns[0], turns[1] @ (graded[:, None] * Q[1].mT))
        updates.append(update.to(torch.float32))
    return updates


def accuracy(n: int, console: Console) -> tuple[list[dict[str, Any]], list[Target]]:
    """Compare with float64, at factor conditions 1 to 1e6."""
    shape = (1024, 1536)
    rank = RANKS[0]
    table = Table(
        "condition",
        "path",
        "error of adapter + residual",
        "adapter over the best",
        title="Accuracy",
        title_justify="left",
    )
    rows: list[dict[str, Any]] = []
    for condition in [10.0**i for i in range(7)]:
        updates = graded_updates(n, shape, rank, condition, seed=1)
        total = weighted_sum(updates, even(n))
        S = total.svd()[1]
        result = FedMomentum().aggregate(
            ClientUpdates(updates, even(n)), AggregationContext(rank=rank)
        )
        assert isinstance(result.residual, LowRank)  # of rank (n - 1) r, far below the sides
        left = difference(total, result.adapter)
        error = difference(left, result.residual).norm() / total.norm()
        over = left.norm() / float(S[rank:].square().sum().sqrt()) - 1
        path = truncated_svd(updates, even(n), rank, dtype=torch.float32).path
        rows.append({"condition": condition, "path": path, "error": error, "over the best": over})
        table.add_row(f"{condition:.0e}", path, f"{error:.1e}", f"{over:.1e}")
    console.print(table)
    return rows, [
        Target.at_most(
            "error of adapter + residual, any condition", 1e-6, max(row["error"] for row in rows)
        ),
        Target.at_most(
            "adapter over the best of its rank, any condition",
            1e-4,
            max(r["over the best"] for r in rows),
        ),
    ]


def diagnostics(n: int, repeats: int, clock: Clock, console: Console) -> dict[str, float]:
    """Compare the time of `round_diagnostics` with that of the aggregation, of one module."""
    shape = next(iter(SHAPES.values()))
    rank = RANKS[0]
    start, *sent = [
        Adapter({"m": one}, {"m": 1.0}) for one in clients("common start", shape, rank, n + 1)
    ]
    weights = [1 / n] * n

    def aggregate() -> AggregationResult:
        return aggregate_updates(
            sent,
            weights,
            FedMomentum(),
            RoundContext(ranks={"m": rank}, scalings={"m": 1.0}, reference=start),
        )

    result = aggregate()
    sides: dict[str, Callable[[], Any]] = {
        "combine": aggregate,
        "round_diagnostics": partial(
            round_diagnostics, start, sent, weights, result.adapter, result.residual, None
        ),
    }
    got = medians(alternate(sides, repeats, clock=clock))
    share = got["round_diagnostics"] / got["combine"]
    console.print(
        f"One module, common start: round_diagnostics takes {share:.0%} of the time of combine\n"
    )
    return {**got, "share": share}


def sweeps(repeats: int, clock: Clock) -> dict[str, list[dict[str, float]]]:
    """Time ours and the published one by number of clients, rank and width.

    The other two are 10 clients, rank 16, width 4096.
    """
    axes = {
        "clients": [2, 5, 10, 20, 40],
        "rank": [4, 8, 16, 32, 64],
        "width": [512, 1024, 2048, 4096, 8192],
    }
    usual = {"clients": 10, "rank": 16, "width": 4096}
    points: dict[str, list[dict[str, float]]] = {}
    for axis, values in axes.items():
        points[axis] = []
        for value in values:
            at = {**usual, axis: value}
            shape = (at["width"], at["width"])
            updates = {kind: clients(kind, shape, at["rank"], at["clients"]) for kind in INPUTS[:2]}
            runs = alternate(sides_of(updates, at["rank"]), min(3, repeats), clock=clock)
            points[axis].append({axis: value, **medians(runs)})
    return points


def main() -> None:
    """Measure, and print the tables and targets."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--sweeps", action="store_true")
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--json")
    chosen = parser.parse_args()
    if chosen.busy:
        torch.set_num_threads(1)
    clock: Clock = time.thread_time if chosen.busy else time.perf_counter
    tune_malloc()  # as the commands do
    console = Console()
    limits = machine_limits(clock=clock)
    console.print(
        f"This machine: copy {limits.copy:.0f} and triad {limits.triad:.0f} GB/s, matrix products "
        f"{limits.float32:.0f} (float32) and {limits.float64:.0f} (float64) GFLOP/s\n"
    )
    rows, targets = speed(chosen.clients, chosen.ranks, chosen.repeats, limits, clock, console)
    measured: dict[str, Any] = {
        "environment": environment("peft", "numpy"),
        "clock": clock.__name__,
        "limits": limits,
        "speed": rows,
    }
    measured["accuracy"], more = accuracy(chosen.clients, console)
    targets += more
    measured["diagnostics"] = diagnostics(chosen.clients, chosen.repeats, clock, console)
    if not chosen.no_dense:
        measured["dense"], more = dense(chosen.clients, rows, clock, console)
        targets += more
    if chosen.sweeps:
        measured["sweeps"] = sweeps(chosen.repeats, clock)
    print_targets(targets, console=console)
    if chosen.json:
        write_json(chosen.json, targets=targets, **measured)


if __name__ == "__main__":
    main()
