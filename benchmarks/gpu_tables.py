"""The numbers of `gpu.py` as Markdown: `python benchmarks/gpu.py --render FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Measured = Mapping[str, Any]
ABSENT = "–"


def tables(measured: Measured) -> str:
    """Return everything that was measured as paragraphs and tables, and why something was not."""
    parts = [machine(measured)]
    if measured["tiny"]:
        parts.append(
            "Tiny shapes, whatever the texts say: a trial of the script, whose numbers mean "
            "nothing."
        )
    if "rounds" in measured:
        parts += [_ROUNDS, rounds(measured["rounds"]), _EXPORTS, exports(measured["rounds"])]
    if "residuals" in measured:
        parts += [_residuals_text(measured["residuals"]), residuals(measured["residuals"])]
    if "aggregation" in measured:
        parts += [
            _aggregation_text(measured["aggregation"]),
            aggregated_rounds(measured["aggregation"]),
        ]
        parts += [_MODULES, aggregated_modules(measured["aggregation"])]
    if measured.get("training"):
        parts += [_SPEED, speed(measured["training"]), _MEMORY, memory(measured["training"])]
        parts += [_MERGED, merged(measured["training"]), _TASKS, tasks(measured["training"])]
    parts += [f"Not measured: {name}: {reason}." for name, reason in measured["skipped"].items()]
    parts += [f"Failed: {name}: {reason}." for name, reason in measured["failed"].items()]
    return "\n\n".join(parts) + "\n"


def machine(measured: Measured) -> str:
    """Return one line on the device, the libraries and the time that the run took."""
    device = measured["environment"]["device"]
    versions = ", ".join(
        f"{name} {version}" for name, version in measured["environment"]["versions"].items()
    )
    line = device["name"]
    if device["driver"]:
        line += f" ({gibibytes(device['memory_bytes'])} GiB, driver {device['driver']}, "
        line += f"CUDA {device['cuda']})"
    threads = (
        f"{measured['environment']['processor']}, {measured['environment']['threads']} threads"
    )
    return f"{line}; {threads}; {versions}. The whole run took {measured['total_seconds']:.0f} s."


# ── correctness ───────────────────────────────────────────────────────────────────────────────────

_ROUNDS = (
    "Rounds of a small trained Llama in one process. The exactness error is the largest and the "
    "applied share the smallest of any round, both from the run's metrics. The last two columns "
    "compare the forward pass of the adapted layers with everything that has been merged. `high` "
    "allows TF32 for float32 products during the whole run. In bfloat16, the forward pass's error"
    " is that of rounding its outputs."
)
_EXPORTS = (
    "The exports of the same runs, loaded in float32: the distance of their logits from those of "
    "a live float32 model, relative to the norm of the logits. The last two columns give the same"
    " distance for the run's own live model and for the untouched base."
)


def rounds(measured: Measured) -> str:
    """Return the rounds' exactness."""
    rows = [
        [
            _base(row),
            f"`{row['products']}`",
            f"{row['rounds']} × {row['clients']}",
            " → ".join(f"{loss:.2f}" for loss in row["loss"]),
            f"{row['exactness_error']:.1e}",
            f"{row['applied_share']:.5f}",
            f"{row['forward_share']:.5f}",
            f"{row['forward_error']:.1e}",
        ]
        for row in measured["rows"]
    ]
    names = [
        "base",
        "products",
        "rounds × clients",
        "training loss",
        "exactness error",
        "applied share",
        "in the forward",
    ]
    return markdown([*names, "error in the forward"], rows)


def _base(row: Measured) -> str:
    """Return the base's dtype, and whether its adapted modules stay in it."""
    return f"{row['dtype']}, as loaded" if row.get("holding") == "as-loaded" else row["dtype"]


def exports(measured: Measured) -> str:
    """Return the exports' distances from the live model."""
    keys = ("merged_difference", "adapter_difference", "live_difference", "change")
    rows = [
        [_base(row), f"`{row['products']}`", *(f"{row[key]:.1e}" for key in keys)]
        for row in measured["rows"]
    ]
    return markdown(
        [
            "base",
            "products",
            "merged export",
            "adapter export",
            "run's live model",
            "untouched base",
        ],
        rows,
    )


def _residuals_text(measured: Measured) -> str:
    size = measured["size"]
    plain = 1e3 * measured["seconds"]["bfloat16 weight, nothing merged"]
    is_held_both_ways = "as loaded, with a branch" in measured["seconds"]
    held = " (in the last rows, kept as it was loaded)" if is_held_both_ways else ""
    return (
        f"One {size} × {size} weight, stored in bfloat16 and kept in float32{held}, with 1, 10 and"
        " 50 residuals merged, each of 3e-4 of the weight's norm. The table gives the share of "
        "the residuals that shows in the weight's products, and its error; and the time of a "
        f"client's forward pass over {measured['tokens']} tokens in milliseconds, including casts."
        f" A bfloat16 weight with nothing merged takes {plain:.2f} ms."
    )


def residuals(measured: Measured) -> str:
    """Return what a layer's forward gives of many small residuals."""
    cells_by_products: dict[str, list[str]] = {}
    for row in measured["rows"]:
        cells = cells_by_products.setdefault(row["products"], [row["products"]])
        cells += [f"{100 * row['share']:.1f} %", f"{row['error']:.3f}"]
    for name, cells in cells_by_products.items():
        seconds = measured["seconds"].get(name)
        cells.append(f"{1e3 * seconds:.2f}" if seconds is not None else "–")
    names = ["products", "share of 1", "error", "of 10", "error", "of 50", "error", "ms"]
    return markdown(names, list(cells_by_products.values()))


# ── aggregation ───────────────────────────────────────────────────────────────────────────────────

_MODULES = (
    "One module of each shape, in milliseconds. The device and the CPU were timed in turn; the "
    "published way was timed on its own, with as many runs as fit into the time. Its time does "
    "not depend on what the clients have in common."
)


def _aggregation_text(measured: Measured) -> str:
    return (
        "Aggregation of one round's adapters for all linear modules of Llama-3.1-8B, "
        f"{measured['clients']} clients, in seconds. The whole round was timed as such; the other "
        "columns are the times of one module of each shape, multiplied by how often it occurs in "
        f"{measured['layers']} layers."
    )


def aggregated_rounds(measured: Measured) -> str:
    """Return a whole round on every side."""
    rows = []
    for row in measured["rounds"]:
        sides = [f"{row[side]:.2f}" for side in ("device", "cpu", "published")]
        whole = f"{row['whole']:.2f}" if "whole" in row else ABSENT
        ratios = [f"{row[side] / row['device']:.1f}" for side in ("cpu", "published")]
        rows.append([str(row["rank"]), row["input"], whole, *sides, *ratios])
    names = [
        "rank",
        "clients",
        "whole round",
        "by modules",
        "CPU",
        "published",
        "CPU / ours",
        "published / ours",
    ]
    return markdown(names, rows)


def aggregated_modules(measured: Measured) -> str:
    """Return one module of each shape on every side."""
    rows = []
    for row in measured["modules"]:
        shape = " × ".join(map(str, row["shape"]))
        sides = [f"{1e3 * row[side]:.1f}" for side in ("device", "cpu", "published")]
        cells = [f"{row['module']}: {shape}", str(row["rank"]), row["input"], f"`{row['path']}`"]
        rows.append([*cells, *sides, str(row["published_runs"]), f"{row['error']:.1e}"])
    names = ["module", "rank", "clients", "path", "device", "CPU", "published", "runs of it"]
    return markdown([*names, "error of adapter + residual"], rows)


# ── training ──────────────────────────────────────────────────────────────────────────────────────

_SPEED = (
    "LoRA training on all linear modules of a random bfloat16 base, with full rows, and with "
    "gradient checkpointing only where the name of the size says so. The sides take turns. Ratios"
    " are medians over paired runs, relative to the plain loop, which uses the same batches, "
    "loss, optimizer and clipping. With TF32 allowed, a client's products round what has been "
    "merged, as shown above."
)
_MEMORY = (
    "Peak memory of the device's tensors in GiB, by torch's allocator: at rest, while the base is"
    " loaded and the adapter added, and during training."
)
_MERGED = (
    "The same client after rounds whose residuals are held beside its weights: as factors, or in "
    "8 bits once the factors would take more memory. Ratios are relative to plain PEFT, which has"
    " nothing merged."
)
_TASKS = (
    "A client's round, in seconds: a training task of a second round, which starts by merging a "
    "residual, and an evaluation of one batch. Training probes the live weights; an evaluation "
    "also probes the weights on disk and what has been merged."
)


def speed(measured: Sequence[Measured]) -> str:
    """Return tokens per second of every size and side."""
    rows = []
    for size in measured:
        training = size["training"]
        for row in size["speed"]:
            tokens = f"{training['batch']} × {training['length']}"
            rate = f"{row['tokens_per_second']:.0f}"
            rows.append([size["size"], tokens, row["side"], rate, f"{row['ratio']:.3f}"])
    return markdown(["size", "rows × tokens", "side", "tokens/s", "ratio"], rows)


def memory(measured: Sequence[Measured]) -> str:
    """Return peak memory of a client and of plain PEFT; nothing if the device does not count it."""
    rows = []
    for size in measured:
        cells = [size["size"], f"{size['parameters'] / 1e9:.2f}", f"{size['adapted'] / 1e9:.2f}"]
        for when in ("rest", "loading", "training"):
            one, other = (size[side][when] for side in ("client", "plain"))
            ratio = f"{one / other:.2f}" if one and other and one == one else ABSENT
            cells += [f"{gibibytes(one)} / {gibibytes(other)}", ratio]
        seconds = [f"{size[side]['load_seconds']:.1f}" for side in ("client", "plain")]
        rows.append([*cells, " / ".join(seconds)])
    names = [
        "size",
        "parameters, billion",
        "of them adapted",
        "at rest, client / plain",
        "ratio",
        "loading",
        "ratio",
    ]
    return markdown([*names, "training", "ratio", "load, s"], rows)


def merged(measured: Sequence[Measured]) -> str:
    """Return memory and speed of a client with merged parts."""
    rows = []
    for size in measured:
        for row in size["merged"]:
            cells = [size["size"], row["held"], str(row["rank"])]
            for when in ("rest", "training"):
                one, other = row[when], size["plain"][when]
                is_measured = one is not None and other is not None and one == one
                cells += [gibibytes(one), f"{one / other:.2f}" if is_measured else ABSENT]
            rows.append([*cells, f"{row['ratio']:.3f}"])
    names = ["size", "merged parts in", "of rank", "at rest", "ratio", "training", "ratio"]
    return markdown([*names, "speed, ratio"], rows)


def tasks(measured: Sequence[Measured]) -> str:
    """Return where a client's round goes."""
    rows = []
    for size in measured:
        for name in ("train_task", "evaluate_task"):
            task = size["round"][name]
            what = "training" if name == "train_task" else "evaluation"
            if task is None:
                rows.append([size["size"], what, *([ABSENT] * 6)])
                continue
            steps = str(size["round"]["steps"]) if name == "train_task" else ABSENT
            times = [f"{task[key]:.2f}" for key in ("whole", "merging", "training", "probes")]
            rows.append([size["size"], what, steps, *times, f"{100 * task['probes_share']:.1f} %"])
    return markdown(
        ["size", "task", "steps", "whole", "merging", "training", "probes", "share of probes"], rows
    )


# ── Markdown ──────────────────────────────────────────────────────────────────────────────────────


def gibibytes(size: float | None) -> str:
    """Return bytes in GiB with two decimals; a dash for what was not measured."""
    return ABSENT if size is None or size != size else f"{size / 2**30:.2f}"


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
