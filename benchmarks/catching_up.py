"""`base_update` over hundreds of rounds: bytes for clients that missed some, time, exactness.

    python benchmarks/catching_up.py [--threads 2] [--json FILE]

400 rounds of FedMomentum at energy 1, four clients of rank 8, one module of 576 x 576: a round's
residual has a twelfth of the dense size. Twice: with the same clients in every round, and with a
new one in every round. Everything but the clients' training is as in a run: `GlobalModel.after`,
`should_consolidate`, `consolidate` and `delivery` on the server, `rebuild_snapshot` and
`Float32Weights.apply` on the clients.
Bytes are those of the objects that a client is sent for the base. What somebody who missed rounds
would download is asked in each round of the last half, without the run taking notice.

Then one consolidation of a 4096 x 4096 matrix, 14 parts of rank 150 on a snapshot: its time on both
sides, against adding the same parts to a weight in float32. A figure is drawn beside the JSON.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common import Target, finish, medians
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedmomentum import LowRank
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.global_model.consolidation import (
    Delivery,
    Recipe,
    consolidate,
    dense_bytes,
    make_snapshot,
    plan_delivery,
    prune_recipes,
    rebuild_snapshot,
    should_consolidate,
)
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.lora.adapter import Adapter
from fedmomentum.utils.process import tune_malloc
from fedmomentum.utils.tensors import safetensors_bytes

SIZE, RANK, CLIENTS = 576, 8, 4
DENSE = 4 * SIZE**2
MISSED = (1, 2, 5, 10, 20, 50, 100, 200)


def live_module(folder: Path, generator: torch.Generator) -> Float32Weights:
    """One linear layer, held as a client holds it."""
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data.normal_(0, SIZE**-0.5, generator=generator)
    (folder / "model.safetensors").write_bytes(
        safetensors_bytes({"m.weight": layer.weight.detach()})
    )
    return Float32Weights({"m": layer}, folder)


@dataclass
class Server:
    """The server's side of `base_update`: the list, the recipes, the size of every object."""

    model: GlobalModel
    recipes: tuple[Recipe, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    def way(self, held: Collection[str]) -> Delivery:
        """What a client that holds these is sent."""
        return plan_delivery(
            [blob.name for blob in self.model.base_update],
            held,
            self.recipes,
            self.sizes.__getitem__,
        )

    def grow(self, model: GlobalModel) -> None:
        """The next round's model."""
        self.model = model
        self.sizes |= {blob.name: len(blob.data) for blob in model.base_update}

    def consolidate(self) -> StoredObject:
        """Make the snapshot; its ties."""
        before = self.model
        later, recipe, ties = consolidate(before)
        self.sizes[ties.name] = len(ties.data)
        self.recipes = prune_recipes(
            (*self.recipes, recipe), self.sizes.__getitem__, dense_bytes(before)
        )
        self.grow(later)
        return ties


def rounds_of(
    num_rounds: int, folder: Path, *, newcomers: bool
) -> tuple[list[dict[str, float]], list[list[int]]]:
    """A line a round; for the last half, the bytes after 0, 1, ... missed rounds."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Adapter:
        B, A = (torch.randn(*size, generator=generator) for size in ((SIZE, RANK), (RANK, SIZE)))
        return Adapter({"m": LowRank(B / 100, A / SIZE**0.5)}, {"m": 1.0})

    held, newcomer = (live_module(folder, torch.Generator().manual_seed(1)) for _ in range(2))
    pristine, wanted = held.pretrained("m").double(), torch.zeros(SIZE, SIZE, dtype=torch.float64)
    server, store = Server(GlobalModel(BaseIdentity("b"), draw())), dict[str, StoredObject]()
    rows, lists, costs = [], [], []
    for server_round in range(1, num_rounds + 1):
        sent = [draw() for _ in range(CLIENTS)]
        result = aggregate_updates(
            sent,
            [1.0] * CLIENTS,
            METHODS["fedmomentum"](),
            RoundContext(
                ranks={"m": RANK},
                scalings={"m": 1.0},
                reference=server.model.adapter,
                server_round=server_round,
            ),
        )
        wanted += to_dense(result.residual["m"]).double()
        row: dict[str, float] = {"round": server_round, "ties": 0, "parts summed": 0}
        clock = time.perf_counter()
        server.grow(server.model.advance(result, "fedmomentum"))
        row["next model"] = time.perf_counter() - clock
        if server_round > num_rounds // 2:  # while the list is as the round left it
            costs.append(would_download(server, lists))
        parts = {blob.name: blob for blob in server.model.base_update}
        _ = [blob.matrices for blob in parts.values()]  # read when they arrive, once
        asked = [set(store), *([set()] if newcomers else [])]
        if should_consolidate(server.model, [server.way(held).size for held in asked]):
            merging = in_float32(server.model.base_update)
            row["parts summed"] = len(server.model.base_update)
            clock = time.perf_counter()
            ties = server.consolidate()
            row |= {
                "server": time.perf_counter() - clock,
                "float32": merging,
                "ties": len(ties.data),
            }
            parts |= {ties.name: ties}
        base_update = server.model.base_update
        lists.append([blob.name for blob in base_update])

        # the client that is always there; it makes what it can, and checks it
        way = server.way(set(store))
        store |= {name: parts.get(name) or base_update[0] for name in way.objects}
        clock = time.perf_counter()
        for recipe in way.recipes:
            made = rebuild_snapshot(
                [store[name] for name in recipe.summed], store[recipe.ties], {"m": (SIZE, SIZE)}
            )
            assert made.name == recipe.makes
            store[made.name] = made
        row["client"] = time.perf_counter() - clock
        store = {name: store[name] for name in lists[-1]}
        held_parts = [store[name] for name in lists[-1]]
        _ = [blob.matrices for blob in held_parts]
        clock = time.perf_counter()
        held.apply(held_parts)
        row["apply the newest"], clock = time.perf_counter() - clock, time.perf_counter()
        newcomer.apply(())  # what a process that starts has: the pristine weights
        newcomer.apply(held_parts)
        row["apply all"] = time.perf_counter() - clock
        assert torch.equal(newcomer.weight("m"), held.weight("m"))
        rows.append(
            {
                **row,
                "parts": len(lists[-1]),
                "size": sum(map(server.sizes.__getitem__, lists[-1])) / DENSE,
                "download": way.size,
                "snapshots": float(
                    any(name == lists[-1][0] for name in way.objects)
                    and isinstance(base_update[0].matrices["m"], Tensor)
                ),
                "residual": sum(len(blob.data) for blob in server.model.newest),
                "newcomer": server.way(set()).size if newcomers else 0,
                "error": distance(to_dense(server.model.merged("m")).double(), wanted),
                "live error": distance(held.weight("m").double(), pristine + wanted),
            }
        )
    return rows, costs


def would_download(server: Server, lists: list[list[str]]) -> list[int]:
    """Bytes for a client with the list of 1, 2, ... rounds ago, and last for a new client."""
    found, after = [], None
    for held in [*(set(names) for names in reversed(lists[-MISSED[-1] :])), set[str]()]:
        way = server.way(held)
        if should_consolidate(server.model, [way.size]):
            if after is None:
                after = replace(server, sizes=dict(server.sizes))
                after.consolidate()
            way = after.way(held)
        found.append(way.size)
    return found


def in_float32(parts: Sequence[StoredObject]) -> float:
    """Seconds to add the parts to a weight in float32, as they are merged into a base."""
    matrices = [blob.matrices["m"] for blob in parts]
    weight = torch.zeros(matrices[0].shape)
    clock = time.perf_counter()
    for matrix in matrices:
        if isinstance(matrix, LowRank):
            weight.addmm_(matrix.B, matrix.A)
        else:
            weight += matrix
    return time.perf_counter() - clock


def large_layer(repeats: int = 3) -> dict[str, float]:
    """One consolidation of a layer of an 8B model: median seconds, bytes of ties over snapshot."""
    generator, size, rank, count = torch.Generator().manual_seed(2), 4096, 150, 14
    parts = [StoredObject.of({"m": torch.randn(size, size, generator=generator) * 1e-3})]
    for _ in range(count):
        B, A = (
            torch.randn(size, rank, generator=generator),
            torch.randn(rank, size, generator=generator),
        )
        parts.append(StoredObject.of({"m": LowRank(B / 100, A / size**0.5)}))
    _ = [blob.matrices for blob in parts]
    made, ties = make_snapshot(parts)
    assert rebuild_snapshot(parts, ties, {"m": (size, size)}).name == made.name
    seconds: dict[str, list[float]] = {"server": [], "client": [], "float32": []}
    for _ in range(repeats):
        clock = time.perf_counter()
        make_snapshot(parts)
        seconds["server"].append(time.perf_counter() - clock)
        clock = time.perf_counter()
        rebuild_snapshot(parts, ties, {"m": (size, size)})
        seconds["client"].append(time.perf_counter() - clock)
        seconds["float32"].append(in_float32(parts))
    return {**medians(seconds), "ties": len(ties.data) / len(made.data)}


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def plot(
    rows: list[dict[str, float]], costs: Mapping[str, list[list[float]]], part: float, file: Path
) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fedmomentum"
    blue, brown, green, grey = "#1f5fa8", "#b5651d", "#6aa84f", "#555555"
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for (name, told), color, width in zip(costs.items(), (blue, green), (4, 1.2), strict=True):
        missed, told = range(1, len(told)), told[1:]
        left.fill_between(
            missed, list(map(min, told)), list(map(max, told)), color=color, alpha=0.2, linewidth=0
        )
        left.plot(
            missed, list(map(statistics.mean, told)), color=color, linewidth=width, label=name
        )
    left.plot(
        missed, [k * part for k in missed], color=brown, linestyle=":", label="all that was missed"
    )
    left.axhline(1, color=grey, linestyle="--", linewidth=1, label="the snapshot")
    left.set(
        xlabel="rounds to catch up with",
        ylabel="dense sizes to download",
        ylim=(0, 1.6),
        xscale="log",
    )
    left.set_xticks(MISSED, map(str, MISSED))
    left.minorticks_off()
    left.set_title("Catching up: mean, least to most", fontsize=9)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    shown = rows[: len(rows) // 2]
    middle.plot(
        [row["round"] for row in shown], [row["size"] for row in shown], color=blue, linewidth=1.2
    )
    middle.axhline(1, color=grey, linestyle="--", linewidth=1)
    middle.set(xlabel="round", ylabel="dense sizes", ylim=(0, 2.4))
    middle.set_title("Size of base_update, nobody new", fontsize=9)
    for name, label, color in (
        ("server", "server: the snapshot", brown),
        ("client", "client: the snapshot", grey),
        ("apply all", "client: all parts anew", blue),
        ("apply the newest", "client: what is new", green),
    ):
        told = [row for row in shown if row.get("parts summed") or name.startswith("apply")]
        right.plot(
            [row["round"] for row in told],
            [1e3 * row[name] for row in told],
            ".",
            markersize=3,
            color=color,
            label=label,
        )
    right.set(xlabel="round", ylabel="milliseconds for one module", yscale="log", ylim=(0.1, 1000))
    right.set_title("Time", fontsize=9)
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axis in (left, middle, right):
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None, "Creator": None})


QUIET, BUSY = "the same clients in every round", "somebody new in every round"


def report(
    rows: Mapping[str, list[dict[str, float]]],
    costs: Mapping[str, list[list[float]]],
    layer: Mapping[str, float],
) -> tuple[dict[str, Any], list[Target]]:
    """Print what came out; what is kept of it, and the targets."""
    part = statistics.mean(row["residual"] for row in rows[QUIET]) / DENSE
    told = {}
    for name, found in costs.items():
        told[name] = [
            {
                "missed": k,
                "mean": statistics.mean(found[k]),
                "least": min(found[k]),
                "most": max(found[k]),
            }
            for k in (*MISSED, -1)  # the last: who is new
        ]
        table = Table(
            "rounds to catch up with",
            "mean",
            "least",
            "most",
            "all that was missed",
            title=f"Dense sizes, {name}",
        )
        for row in told[name]:
            sizes = [f"{row[key]:.2f}" for key in ("mean", "least", "most")]
            table.add_row(
                "all" if row["missed"] < 0 else str(row["missed"]),
                *sizes,
                "" if row["missed"] < 0 else f"{row['missed'] * part:.2f}",
            )
        Console().print(table)
    measured = {name: summary(found) for name, found in rows.items()}
    for name, found in measured.items():
        Console().print(f"{name}: {found}")
    Console().print(f"4096 x 4096: {dict(layer)}")
    most = max(size for found in costs.values() for sizes in found for size in sizes)
    every = [row for found in rows.values() for row in found]
    targets = [
        Target.at_most(
            "whoever missed any number of rounds, or is new: snapshots to download", 1.01, most
        ),
        Target.at_most(
            "who missed none: snapshots downloaded", 0, sum(row["snapshots"] for row in every)
        ),
    ]
    for name, found in measured.items():
        early, late = (
            statistics.median(row["apply all"] for row in some)
            for some in (rows[name][:100], rows[name][-100:])
        )
        targets += [
            Target.at_most(
                f"{name}: bytes over those of the residuals, for who missed none",
                1.01,
                found["overhead"],
            ),
            Target.at_most(
                f"{name}: time to apply all of it, last hundred rounds over the first",
                1.5,
                late / early,
            ),
            Target.at_most(f"{name}: error of base_update, any round", 1e-6, found["error"]),
            Target.at_most(
                f"{name}: error of the live weights, any round", 1e-6, found["live error"]
            ),
        ]
    return {
        "rounds": len(rows[QUIET]),
        "part": part,
        "missed": told,
        "measured": measured,
        "layer": dict(layer),
    }, [
        *targets,
        Target.at_most("parts of base_update", round(2 / part), max(row["parts"] for row in every)),
        Target.at_most(
            "4096 x 4096: server's time over merging in float32",
            4,
            layer["server"] / layer["float32"],
        ),
        Target.at_most(
            "4096 x 4096: client's time over merging in float32",
            4,
            layer["client"] / layer["float32"],
        ),
        Target.at_most("4096 x 4096: bytes of the ties over the snapshot's", 0.01, layer["ties"]),
    ]


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """What is told of a run: medians of seconds, bytes, errors."""
    made, found = [row for row in rows if row["parts summed"]], dict[str, float]()
    for name in ("server", "client", "float32"):
        found[name] = statistics.median(row[name] for row in made)
    for name in ("next model", "apply the newest", "apply all"):
        found[name] = statistics.median(row[name] for row in rows)
    return {
        **found,
        "consolidations": len(made),
        "ties": statistics.mean(row["ties"] for row in made) / DENSE,
        "overhead": sum(row["download"] for row in rows) / sum(row["residual"] for row in rows),
        "error": max(row["error"] for row in rows),
        "live error": max(row["live error"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    tune_malloc()
    rows, costs = {}, {}
    for name in (QUIET, BUSY):
        with tempfile.TemporaryDirectory() as folder:
            rows[name], found = rounds_of(2 * MISSED[-1], Path(folder), newcomers=name == BUSY)
        # from 1 round missed on, which is none: what was asked one round ago was answered; and who
        # is new
        costs[name] = [
            [],
            *([size / DENSE for size in sizes] for sizes in zip(*found, strict=True)),
        ]
    measured, targets = report(rows, costs, large_layer())
    finish(targets, chosen.json, Console(), **measured)
    if chosen.json:
        shown = {name: found[:-1] for name, found in costs.items()}
        plot(rows[QUIET], shown, measured["part"], chosen.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
