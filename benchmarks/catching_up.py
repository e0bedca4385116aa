"""What `base_update` comes to over hundreds of rounds: bytes for whoever missed some, time to apply it, exactness.

    python benchmarks/catching_up.py [--threads 2] [--json FILE]

400 rounds of FedMomentum at energy 1, four clients of rank 8, one module of 576 x 576: a round's residual has a
twelfth of the dense size. Everything but the clients' training is as in a run: `GlobalModel.after` with its
consolidation, and `HeldBase.apply` on the clients. Bytes are those of the parts that a client lacks. A figure is drawn
beside the JSON.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Target, finish
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedmomentum import LowRank
from fedmomentum.adapter import Adapter
from fedmomentum.aggregation import METHODS
from fedmomentum.aggregation.whole import combine
from fedmomentum.base import HeldBase
from fedmomentum.files import safetensors_bytes
from fedmomentum.global_model import GlobalModel
from fedmomentum.identity import BaseIdentity
from fedmomentum.sums import as_dense

SIZE, RANK, CLIENTS = 576, 8, 4
DENSE = 4 * SIZE**2
MISSED = (1, 2, 5, 10, 20, 50, 100, 200)


def live_module(folder: Path, generator: torch.Generator) -> HeldBase:
    """One linear layer, held as a client holds it."""
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data.normal_(0, SIZE**-0.5, generator=generator)
    (folder / "model.safetensors").write_bytes(safetensors_bytes({"m.weight": layer.weight.detach()}))
    return HeldBase({"m": layer}, folder)


def rounds_of(num_rounds: int, folder: Path) -> tuple[list[dict[str, float]], list[dict[str, int]]]:
    """A line a round, and each round's `base_update`: part to bytes."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Adapter:
        B, A = (torch.randn(*size, generator=generator) for size in ((SIZE, RANK), (RANK, SIZE)))
        return Adapter({"m": LowRank(B / 100, A / SIZE**0.5)}, {"m": 1.0})

    held, newcomer = (live_module(folder, torch.Generator().manual_seed(1)) for _ in range(2))
    pristine, wanted = held.pristine("m").double(), torch.zeros(SIZE, SIZE, dtype=torch.float64)
    model, rows, lists = GlobalModel(BaseIdentity("b"), draw()), [], []
    for server_round in range(1, num_rounds + 1):
        sent = [draw() for _ in range(CLIENTS)]
        method = METHODS["fedmomentum"]()
        result = combine(
            sent, [1.0] * CLIENTS, method, ranks={"m": RANK}, scalings={"m": 1.0}, reference=model.adapter,
            server_round=server_round,
        )  # fmt: skip
        wanted += as_dense(result.residual["m"]).double()
        seconds, clock = {}, time.perf_counter()
        model = model.after(result, "fedmomentum")
        lists.append({blob.name: len(blob.data) for blob in model.base_update})
        _ = [blob.matrices for blob in model.base_update]  # read when they arrive, once
        seconds["merge"], clock = time.perf_counter() - clock, time.perf_counter()
        held.apply(model.base_update)
        seconds["apply the newest"], clock = time.perf_counter() - clock, time.perf_counter()
        newcomer.apply(())  # what a process that starts has: the pristine weights
        newcomer.apply(model.base_update)
        seconds["apply all"] = time.perf_counter() - clock
        assert torch.equal(newcomer.weight("m"), held.weight("m"))
        rows.append({
            "round": server_round, "parts": len(lists[-1]), "size": sum(lists[-1].values()) / DENSE, **seconds,
            "error": distance(as_dense(model.merged("m")).double(), wanted),
            "live error": distance(held.weight("m").double(), pristine + wanted),
        })  # fmt: skip
    return rows, lists


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def lacking(lists: list[dict[str, int]], missed: int) -> list[float]:
    """Dense sizes to download for who missed so many rounds, at each round of the last half."""
    found = []
    for end in range(len(lists) // 2, len(lists)):
        known = lists[end - missed]
        found.append(sum(size for name, size in lists[end].items() if name not in known) / DENSE)
    return found


def plot(rows: list[dict[str, float]], costs: list[list[float]], part: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fedmomentum"
    blue, brown, green = "#1f5fa8", "#b5651d", "#6aa84f"
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    missed, costs = range(1, len(costs)), costs[1:]
    left.fill_between(missed, list(map(min, costs)), list(map(max, costs)), color=blue, alpha=0.2, linewidth=0,
                      label="least to most")  # fmt: skip
    left.plot(missed, list(map(statistics.mean, costs)), color=blue, linewidth=1.5, label="mean")
    left.plot(missed, [k * part for k in missed], color=brown, linestyle=":", label="all that was missed")
    left.axhline(1, color="#555555", linestyle="--", linewidth=1, label="the snapshot alone")
    left.set(xlabel="rounds missed", ylabel="dense sizes to download", ylim=(0, 2.6), xscale="log")
    left.set_xticks(MISSED, map(str, MISSED))
    left.minorticks_off()
    left.set_title("Catching up", fontsize=9)
    left.legend(frameon=False, fontsize=8, loc="upper left")
    shown = rows[: len(rows) // 2]
    middle.plot([row["round"] for row in shown], [row["size"] for row in shown], color=blue, linewidth=1.2)
    middle.axhline(1, color="#555555", linestyle="--", linewidth=1)
    middle.set(xlabel="round", ylabel="dense sizes", ylim=(0, 2.6))
    middle.set_title("Size of base_update", fontsize=9)
    for name, label, colour in (
        ("apply all", "client: all parts anew", blue),
        ("merge", "server: the next model", brown),
        ("apply the newest", "client: what is new", green),
    ):
        right.plot([row["round"] for row in shown], [1e3 * row[name] for row in shown], ".", markersize=3,
                   color=colour, label=label)  # fmt: skip
    right.set(xlabel="round", ylabel="milliseconds for one module", yscale="log", ylim=(0.1, 100))
    right.set_title("Time", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, middle, right):
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None, "Creator": None})


def report(rows: list[dict[str, float]], costs: list[list[float]]) -> tuple[dict[str, Any], list[Target]]:
    """Print what came out; what is kept of it, and the targets."""
    part, half = min(costs[1]), rows[len(rows) // 2 :]
    told = [
        {"missed": k, "mean": statistics.mean(costs[k]), "least": min(costs[k]), "most": max(costs[k])} for k in MISSED
    ]
    table = Table("rounds missed", "mean", "least", "most", "all that was missed", title="Dense sizes to download")
    for row in told:
        sizes = (row["mean"], row["least"], row["most"], row["missed"] * part)
        table.add_row(str(row["missed"]), *(f"{size:.2f}" for size in sizes))
    Console().print(table)
    seconds = {
        name: statistics.median(row[name] for row in half) for name in ("merge", "apply the newest", "apply all")
    }
    seconds["merge and consolidate"] = statistics.median(row["merge"] for row in half if row["parts"] == 1)
    Console().print("ms a round: " + ", ".join(f"{name} {1e3 * value:.2f}" for name, value in seconds.items()))
    early, late = (statistics.median(row["apply all"] for row in some) for some in (rows[:100], rows[-100:]))
    errors = {name: max(row[name] for row in rows) for name in ("error", "live error")}
    return {"rounds": len(rows), "part": part, "missed": told, "seconds": seconds, "largest": errors}, [
        Target.at_most("whoever missed any number of rounds: snapshots to download", 1.01, max(map(max, costs))),
        Target.at_most("who missed none: bytes over those of the residuals", 2.01, statistics.mean(costs[1]) / part),
        Target.at_most("parts of base_update", round(2 / part), max(row["parts"] for row in rows)),
        Target.at_most("time to apply all of it, last hundred rounds over the first", 1.5, late / early),
        Target.at_most("error of base_update against the float64 sum, any round", 1e-6, errors["error"]),
        Target.at_most("error of the live weights against it, any round", 1e-6, errors["live error"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows, lists = rounds_of(2 * MISSED[-1], Path(folder))
    costs = [lacking(lists, missed) for missed in range(MISSED[-1] + 1)]
    measured, targets = report(rows, costs)
    finish(targets, chosen.json, Console(), **measured)
    if chosen.json:
        plot(rows, costs, measured["part"], chosen.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
