"""The server of very many clients: memory and time of aggregating one layer of Llama-3-8B.

    python benchmarks/scale.py [--clients 10] [--rank 64] [--json FILE] [--folder .]
    make bench-scale        10 to 1,000 clients: some twenty minutes

Each number of clients runs in a process of its own, for its peak memory: updates are drawn from a
seed, spooled to disk as in a round, combined by FedMomentum, and measured as in a round
(`round_diagnostics`). A client takes 21 MB of disk at rank 64, so 1,000 clients 21 GB, which are
deleted afterwards. The times are those of the machine as it is: for the fit against the number of
clients, not for a comparison. With several numbers a figure is drawn next to the JSON.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from common import Target, environment, print_targets, write_json
from rich.console import Console
from rich.table import Table

from fedmomentum import FedMomentum, LowRank
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.linalg.matrix import norm
from fedmomentum.lora.adapter import Adapter
from fedmomentum.server.diagnostics import round_diagnostics
from fedmomentum.server.update_store import UpdateStore

LAYER = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
SCALING = 2.0
LIMIT = 2 * 2**30


def factors(seed: int, rank: int, start: Mapping[str, LowRank] | None = None) -> dict[str, LowRank]:
    """Draw an adapter; given a start, move both of its factors by a tenth, as a client does."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for module, (out_size, in_size) in LAYER.items():
        B = torch.randn(out_size, rank, generator=generator) / 100
        A = torch.randn(rank, in_size, generator=generator) / in_size**0.5
        if start is not None:
            B = start[module].B + 0.1 * B
            A = start[module].A + 0.1 * A
        drawn[module] = LowRank(B, A)
    return drawn


def peak_bytes() -> int:
    """Return the most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(clients: int, rank: int, folder: Path) -> dict[str, float | None]:
    """Run the round of so many clients in this process, and measure its parts."""
    scalings = dict.fromkeys(LAYER, SCALING)
    start = Adapter(factors(0, rank), scalings)
    idle = peak_bytes()
    spool = UpdateStore(folder)
    seconds = {}

    clock = time.perf_counter()
    spooled = [
        spool.put(Adapter(factors(i, rank, start.modules), scalings, name=f"client {i}"))
        for i in range(1, clients + 1)
    ]
    weights = torch.arange(1, clients + 1, dtype=torch.float64)
    seconds["draw and spool"] = time.perf_counter() - clock

    clock = time.perf_counter()
    result = aggregate_updates(
        spooled,
        weights.tolist(),
        FedMomentum(),
        RoundContext(ranks=dict.fromkeys(LAYER, rank), scalings=scalings, reference=start),
    )
    seconds["combine"] = time.perf_counter() - clock
    combined = peak_bytes()

    clock = time.perf_counter()
    diagnostics = round_diagnostics(
        start, spooled, result.weights.tolist(), result.adapter, result.residual, None
    )
    seconds["diagnostics"] = time.perf_counter() - clock

    spool.clear()
    kept = sum(SCALING**2 * f["kept_energy"] for f in result.findings.values())
    return {
        "clients": clients,
        "idle_bytes": idle,
        "combine_bytes": combined,
        "peak_bytes": peak_bytes(),
        "kept_energy": kept / (kept + sum(norm(part) ** 2 for part in result.residual.values())),
        "client_drift": diagnostics.client_drift,
        **{f"{name} seconds": value for name, value in seconds.items()},
    }


def fit(sizes: list[float], seconds: list[float]) -> tuple[float, float, float]:
    """Fit `a + b n` by least squares; return a, b, and the largest relative distance from it."""
    X = torch.tensor([[1.0, n] for n in sizes], dtype=torch.float64)
    y = torch.tensor(seconds, dtype=torch.float64)
    a, b = (
        torch.linalg.lstsq(X / y[:, None], torch.ones_like(y)[:, None]).solution[:, 0].tolist()
    )  # relative errors
    return a, b, max(abs(a + b * n - t) / t for n, t in zip(sizes, seconds, strict=True))


def plot(rows: list[dict[str, float]], file: Path) -> None:
    """Draw memory and time against the number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = [row["clients"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(n, [row["peak_bytes"] / 2**30 for row in rows], "o-", label="peak of the process")
    left.plot(n, [row["idle_bytes"] / 2**30 for row in rows], "o:", label="before the first update")
    left.axhline(LIMIT / 2**30, color="grey", linestyle="--", label="2 GiB")
    left.set(
        xscale="log",
        xlabel="clients",
        ylabel="GiB",
        ylim=(0, None),
        title="Memory of the server, one layer",
    )
    left.legend()
    for name in ("combine", "diagnostics"):
        right.plot(n, [row[f"{name} seconds"] for row in rows], "o-", label=name)
    right.set(
        xscale="log", yscale="log", xlabel="clients", ylabel="seconds", title="Time, one layer"
    )
    right.legend()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure each number of clients in a process of its own."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--clients", default="10", help="numbers, with commas between")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(), help="where the updates are spooled")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="scale-") as folder:
        if chosen.one:
            print(json.dumps(one(chosen.one, chosen.rank, Path(folder) / "updates")))
            return
    rows: list[dict[str, float]] = []
    for clients in map(int, chosen.clients.split(",")):
        command = [sys.executable, __file__, "--one", str(clients), "--rank", str(chosen.rank)]
        ran = subprocess.run(
            [*command, "--folder", str(chosen.folder)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        report(rows, chosen.rank, chosen.json)


def report(rows: list[dict[str, float]], rank: int, file: Path | None) -> None:
    """Print what is measured so far, and write it to the file."""
    table = Table(
        "clients", "peak, GiB", "combine, s", "diagnostics, s", "kept energy", title=f"rank {rank}"
    )
    for row in rows:
        table.add_row(
            str(row["clients"]),
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['combine seconds']:.1f}",
            f"{row['diagnostics seconds']:.1f}",
            f"{row['kept_energy']:.3f}",
        )
    Console().print(table)
    targets = [
        Target.at_most(
            "peak memory, GiB", LIMIT / 2**30, max(row["peak_bytes"] for row in rows) / 2**30
        )
    ]
    # From rank (out + in) n >= out in on, for every module, all sums are dense, and each client
    # costs the same.
    dense = [
        row
        for row in rows
        if all(row["clients"] * rank * (d + k) >= d * k for d, k in LAYER.values())
    ]
    if len(dense) > 1:
        peaks = [row["peak_bytes"] for row in dense]
        targets.append(
            Target.at_most(
                "largest peak over least, where sums are dense", 1.1, max(peaks) / min(peaks)
            )
        )
    fits = {}
    if len(dense) > 2:
        for name in ("combine", "diagnostics"):
            a, b, off = fit(
                [row["clients"] for row in dense], [row[f"{name} seconds"] for row in dense]
            )
            fits[name] = {"seconds": a, "seconds_per_client": b, "largest_relative_error": off}
            targets.append(Target.at_most(f"{name}: distance from a straight line", 0.25, off))
    print_targets(targets)
    if file:
        write_json(
            file, targets=targets, rank=rank, rows=rows, fits=fits, environment=environment()
        )
        if len(rows) > 1:
            plot(rows, file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
