"""`base_update` over hundreds of rounds: bytes for clients that missed some, time, exactness.

    python benchmarks/catching_up.py [--threads 2] [--json FILE]

400 rounds of FedMomentum at energy 1, four clients of rank 8, one module of 576 x 576: a round's
residual has a twelfth of the dense size. Twice: with the same clients in every round, and with a
new one in every round. Everything but the clients' training is as in a run: `GlobalModel.advance`,
`should_consolidate`, `consolidate` and `plan_delivery` on the server, `rebuild_snapshot` and
`Float32Weights.apply` on the clients.
Bytes are those of the objects that a client is sent for the base. What a client that missed rounds
would download is computed in each round of the last half, without an effect on the run.

Then one consolidation of a 4096 x 4096 matrix, 14 parts of rank 150 on a snapshot: its time on both
sides, against adding the same parts to a weight in float32. A figure is drawn next to the JSON.
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
from fedmomentum.aggregation.aggregate import AggregationResult, RoundContext, aggregate_updates
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.formats.manifest import Recipe
from fedmomentum.global_model.consolidation import (
    Delivery,
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

SIZE = 576
RANK = 8
CLIENTS = 4
DENSE = 4 * SIZE**2
MISSED = (1, 2, 5, 10, 20, 50, 100, 200)
SAME_CLIENTS = "the same clients in every round"
NEW_CLIENT = "a new client in every round"
Row = dict[str, float]


def live_module(folder: Path, generator: torch.Generator) -> Float32Weights:
    """Return one linear layer as the base weights of a client."""
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

    def delivery(self, cached: Collection[str]) -> Delivery:
        """Return what a client that has cached these is sent."""
        names = [part.name for part in self.model.base_update]
        return plan_delivery(names, cached, self.recipes, self.sizes.__getitem__)

    def grow(self, model: GlobalModel) -> None:
        """Take the next round's model."""
        self.model = model
        self.sizes |= {part.name: len(part.data) for part in model.base_update}

    def consolidate(self) -> StoredObject:
        """Make the snapshot, and return its ties."""
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
) -> tuple[list[Row], list[list[int]]]:
    """Run the rounds.

    Args:
        num_rounds: How many.
        folder: Takes the base model's weights.
        newcomers: Whether a new client takes part in every round.

    Returns:
        A row for each round; and for each of the last half, the bytes after 0, 1, ... missed
        rounds, with those of a new client last.
    """
    generator = torch.Generator().manual_seed(0)
    live = live_module(folder, torch.Generator().manual_seed(1))
    newcomer = live_module(folder, torch.Generator().manual_seed(1))
    pretrained = live.pretrained("m").double()
    wanted = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    server = Server(GlobalModel(BaseIdentity("b"), draw_adapter(generator)))
    store: dict[str, StoredObject] = {}
    rows: list[Row] = []
    lists: list[list[str]] = []
    costs: list[list[int]] = []
    for server_round in range(1, num_rounds + 1):
        # The server aggregates, and consolidates if a client would otherwise download too much.
        result = aggregate_round(server, server_round, generator)
        wanted += to_dense(result.residual["m"]).double()
        row: Row = {"round": server_round, "ties": 0, "parts summed": 0}
        clock = time.perf_counter()
        server.grow(server.model.advance(result, "fedmomentum"))
        row["next model"] = time.perf_counter() - clock
        if server_round > num_rounds // 2:  # while the list is as the round left it
            costs.append(would_download(server, lists))
        parts = {part.name: part for part in server.model.base_update}
        _ = [part.matrices for part in parts.values()]  # read when they arrive, once
        caches = [set(store), *([set[str]()] if newcomers else [])]
        if should_consolidate(server.model, [server.delivery(cached).size for cached in caches]):
            row["float32"] = in_float32(server.model.base_update)
            row["parts summed"] = len(server.model.base_update)
            clock = time.perf_counter()
            ties = server.consolidate()
            row["server"] = time.perf_counter() - clock
            row["ties"] = len(ties.data)
            parts[ties.name] = ties
        base_update = server.model.base_update
        lists.append([part.name for part in base_update])

        # The client that takes part in every round makes what it can, and checks it.
        delivery = server.delivery(set(store))
        store |= {name: parts.get(name) or base_update[0] for name in delivery.objects}
        clock = time.perf_counter()
        for recipe in delivery.recipes:
            snapshot = rebuild_snapshot(
                [store[name] for name in recipe.summed], store[recipe.ties], {"m": (SIZE, SIZE)}
            )
            assert snapshot.name == recipe.makes
            store[snapshot.name] = snapshot
        row["client"] = time.perf_counter() - clock
        store = {name: store[name] for name in lists[-1]}
        cached_parts = [store[name] for name in lists[-1]]
        _ = [part.matrices for part in cached_parts]
        clock = time.perf_counter()
        live.apply(cached_parts)
        row["apply the newest"] = time.perf_counter() - clock

        # A process that starts has the pretrained weights, and adds all parts.
        clock = time.perf_counter()
        newcomer.apply(())
        newcomer.apply(cached_parts)
        row["apply all"] = time.perf_counter() - clock
        assert torch.equal(newcomer.weight("m"), live.weight("m"))
        has_snapshot = isinstance(base_update[0].matrices["m"], Tensor)
        rows.append(
            {
                **row,
                "parts": len(lists[-1]),
                "size": sum(map(server.sizes.__getitem__, lists[-1])) / DENSE,
                "download": delivery.size,
                "snapshots": float(has_snapshot and lists[-1][0] in delivery.objects),
                "residual": sum(len(part.data) for part in server.model.newest),
                "newcomer": server.delivery(set()).size if newcomers else 0,
                "error": relative_distance(to_dense(server.model.merged("m")).double(), wanted),
                "live error": relative_distance(live.weight("m").double(), pretrained + wanted),
            }
        )
    return rows, costs


def draw_adapter(generator: torch.Generator) -> Adapter:
    """Draw an adapter of the module."""
    B = torch.randn(SIZE, RANK, generator=generator)
    A = torch.randn(RANK, SIZE, generator=generator)
    return Adapter({"m": LowRank(B / 100, A / SIZE**0.5)}, {"m": 1.0})


def aggregate_round(
    server: Server, server_round: int, generator: torch.Generator
) -> AggregationResult:
    """Draw the updates of a round, and aggregate them."""
    updates = [draw_adapter(generator) for _ in range(CLIENTS)]
    context = RoundContext(
        ranks={"m": RANK},
        scalings={"m": 1.0},
        reference=server.model.adapter,
        server_round=server_round,
    )
    return aggregate_updates(updates, [1.0] * CLIENTS, METHODS["fedmomentum"](), context)


def would_download(server: Server, lists: list[list[str]]) -> list[int]:
    """Return bytes for a client with the list of 1, 2, ... rounds ago, and last for a new one."""
    sizes = []
    consolidated: Server | None = None
    for cached in [*(set(names) for names in reversed(lists[-MISSED[-1] :])), set[str]()]:
        delivery = server.delivery(cached)
        if should_consolidate(server.model, [delivery.size]):
            if consolidated is None:
                consolidated = replace(server, sizes=dict(server.sizes))
                consolidated.consolidate()
            delivery = consolidated.delivery(cached)
        sizes.append(delivery.size)
    return sizes


def in_float32(parts: Sequence[StoredObject]) -> float:
    """Return seconds to add the parts to a weight in float32, as they are merged into a base."""
    matrices = [part.matrices["m"] for part in parts]
    weight = torch.zeros(matrices[0].shape)
    clock = time.perf_counter()
    for matrix in matrices:
        if isinstance(matrix, LowRank):
            weight.addmm_(matrix.B, matrix.A)
        else:
            weight += matrix
    return time.perf_counter() - clock


def large_layer(repeats: int = 3) -> dict[str, float]:
    """Consolidate a layer of an 8B model: median seconds, and bytes of ties over the snapshot's."""
    generator = torch.Generator().manual_seed(2)
    size = 4096
    rank = 150
    parts = [StoredObject.of({"m": torch.randn(size, size, generator=generator) * 1e-3})]
    for _ in range(14):
        B = torch.randn(size, rank, generator=generator)
        A = torch.randn(rank, size, generator=generator)
        parts.append(StoredObject.of({"m": LowRank(B / 100, A / size**0.5)}))
    _ = [part.matrices for part in parts]
    snapshot, ties = make_snapshot(parts)
    assert rebuild_snapshot(parts, ties, {"m": (size, size)}).name == snapshot.name
    seconds: dict[str, list[float]] = {"server": [], "client": [], "float32": []}
    for _ in range(repeats):
        clock = time.perf_counter()
        make_snapshot(parts)
        seconds["server"].append(time.perf_counter() - clock)
        clock = time.perf_counter()
        rebuild_snapshot(parts, ties, {"m": (size, size)})
        seconds["client"].append(time.perf_counter() - clock)
        seconds["float32"].append(in_float32(parts))
    return {**medians(seconds), "ties": len(ties.data) / len(snapshot.data)}


def relative_distance(got: Tensor, wanted: Tensor) -> float:
    """Return `||got - wanted|| / ||wanted||`."""
    return float((got - wanted).norm() / wanted.norm())


def plot(rows: list[Row], costs: Mapping[str, list[list[float]]], part: float, file: Path) -> None:
    """Draw what catching up costs, the size of `base_update`, and times.

    Args:
        rows: The rounds of `SAME_CLIENTS`.
        costs: Dense sizes to download, by number of missed rounds.
        part: Dense sizes of a round's residual.
        file: Takes the figure.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fedmomentum"
    blue = "#1f5fa8"
    brown = "#b5651d"
    green = "#6aa84f"
    gray = "#555555"
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    missed = range(1, len(costs[SAME_CLIENTS]))
    for (name, sizes), color, width in zip(costs.items(), (blue, green), (4, 1.2), strict=True):
        least = [min(sizes[k]) for k in missed]
        most = [max(sizes[k]) for k in missed]
        means = [statistics.mean(sizes[k]) for k in missed]
        left.fill_between(missed, least, most, color=color, alpha=0.2, linewidth=0)
        left.plot(missed, means, color=color, linewidth=width, label=name)
    left.plot(
        missed, [k * part for k in missed], color=brown, linestyle=":", label="all that was missed"
    )
    left.axhline(1, color=gray, linestyle="--", linewidth=1, label="the snapshot")
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
    middle.axhline(1, color=gray, linestyle="--", linewidth=1)
    middle.set(xlabel="round", ylabel="dense sizes", ylim=(0, 2.4))
    middle.set_title("Size of base_update, no new clients", fontsize=9)
    for name, label, color in (
        ("server", "server: the snapshot", brown),
        ("client", "client: the snapshot", gray),
        ("apply all", "client: all parts", blue),
        ("apply the newest", "client: the new part", green),
    ):
        timed = [row for row in shown if row["parts summed"] or name.startswith("apply")]
        right.plot(
            [row["round"] for row in timed],
            [1e3 * row[name] for row in timed],
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


def report(
    rows: Mapping[str, list[Row]],
    costs: Mapping[str, list[list[float]]],
    layer: Mapping[str, float],
) -> tuple[dict[str, Any], list[Target]]:
    """Print the tables; return the numbers that are kept, and the targets."""
    part = statistics.mean(row["residual"] for row in rows[SAME_CLIENTS]) / DENSE
    downloads: dict[str, list[Row]] = {}
    for name, sizes in costs.items():
        downloads[name] = [
            {
                "missed": k,
                "mean": statistics.mean(sizes[k]),
                "least": min(sizes[k]),
                "most": max(sizes[k]),
            }
            for k in (*MISSED, -1)  # the last: a new client
        ]
        table = Table(
            "rounds to catch up with",
            "mean",
            "least",
            "most",
            "all that was missed",
            title=f"Dense sizes, {name}",
        )
        for row in downloads[name]:
            is_new = row["missed"] < 0
            cells = [f"{row[key]:.2f}" for key in ("mean", "least", "most")]
            missed = "" if is_new else f"{row['missed'] * part:.2f}"
            table.add_row("all" if is_new else str(row["missed"]), *cells, missed)
        Console().print(table)
    measured = {name: summary(rounds) for name, rounds in rows.items()}
    for name, numbers in measured.items():
        Console().print(f"{name}: {numbers}")
    Console().print(f"4096 x 4096: {dict(layer)}")
    all_rows = [row for rounds in rows.values() for row in rounds]
    most = max(size for by_missed in costs.values() for sizes in by_missed for size in sizes)
    targets = [
        Target.at_most(
            "clients that missed any number of rounds, or are new: snapshots to download",
            1.01,
            most,
        ),
        Target.at_most(
            "clients that missed none: snapshots downloaded",
            0,
            sum(row["snapshots"] for row in all_rows),
        ),
    ]
    for name, numbers in measured.items():
        early = statistics.median(row["apply all"] for row in rows[name][:100])
        late = statistics.median(row["apply all"] for row in rows[name][-100:])
        targets += [
            Target.at_most(
                f"{name}: bytes over those of the residuals, for a client that missed none",
                1.01,
                numbers["overhead"],
            ),
            Target.at_most(
                f"{name}: time to apply all of it, last hundred rounds over the first",
                1.5,
                late / early,
            ),
            Target.at_most(f"{name}: error of base_update, any round", 1e-6, numbers["error"]),
            Target.at_most(
                f"{name}: error of the live weights, any round", 1e-6, numbers["live error"]
            ),
        ]
    return {
        "rounds": len(rows[SAME_CLIENTS]),
        "part": part,
        "missed": downloads,
        "measured": measured,
        "layer": dict(layer),
    }, [
        *targets,
        Target.at_most(
            "parts of base_update", round(2 / part), max(row["parts"] for row in all_rows)
        ),
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


def summary(rows: list[Row]) -> dict[str, float]:
    """Summarize a run: medians of seconds, bytes, errors."""
    consolidations = [row for row in rows if row["parts summed"]]
    seconds: dict[str, float] = {}
    for name in ("server", "client", "float32"):
        seconds[name] = statistics.median(row[name] for row in consolidations)
    for name in ("next model", "apply the newest", "apply all"):
        seconds[name] = statistics.median(row[name] for row in rows)
    return {
        **seconds,
        "consolidations": len(consolidations),
        "ties": statistics.mean(row["ties"] for row in consolidations) / DENSE,
        "overhead": sum(row["download"] for row in rows) / sum(row["residual"] for row in rows),
        "error": max(row["error"] for row in rows),
        "live error": max(row["live error"] for row in rows),
    }


def main() -> None:
    """Run both federations and the large layer; print the tables and targets."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    tune_malloc()
    rows: dict[str, list[Row]] = {}
    costs: dict[str, list[list[float]]] = {}
    for name in (SAME_CLIENTS, NEW_CLIENT):
        with tempfile.TemporaryDirectory() as folder:
            rows[name], bytes_by_round = rounds_of(
                2 * MISSED[-1], Path(folder), newcomers=name == NEW_CLIENT
            )
        # By the number of missed rounds: the first is for one round, which is none that was
        # missed; the last is for a new client.
        by_missed = zip(*bytes_by_round, strict=True)
        costs[name] = [[], *([size / DENSE for size in sizes] for sizes in by_missed)]
    measured, targets = report(rows, costs, large_layer())
    finish(targets, chosen.json, Console(), **measured)
    if chosen.json:
        shown = {name: sizes[:-1] for name, sizes in costs.items()}
        plot(rows[SAME_CLIENTS], shown, measured["part"], chosen.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
