"""The figures of the page. Each takes the rows of a run and gives a plot, or None where nothing was recorded."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fedmomentum.report.curves import (
    Curve,
    colour_of,
    curves_legend,
    draw_curves,
    finite,
    name_axes,
    round_axes,
)
from fedmomentum.report.summary import Measure, SummaryRow, measure, natural_order
from fedmomentum.report.svg import GRID, INK, PAPER, SERIES, SOFT, Key, Plot, make_plot
from fedmomentum.report.text import byte_unit, second_unit, shorten

Rows = Sequence[dict[str, Any]]

_DRAWN_BARS = 100  # more groups than this are in the data only


def intervals(summary: Sequence[SummaryRow], group: str, title: str) -> Plot | None:
    """Exact match with its interval, untouched and federated, one line a group."""
    lines = [line for line in summary if line.group in {"total", group} and (line.untouched or line.federated)]
    shown = lines[:_DRAWN_BARS]
    if len(lines) < 2:
        return None

    def draw(axes: Axes) -> None:
        for y, line in enumerate(shown):
            _interval(axes, y - 0.16, line.untouched, colour=SOFT, face=PAPER)
            _interval(axes, y + 0.16, line.federated, colour=SERIES[0], face=SERIES[0])
        axes.axhline(0.5, color=GRID, linewidth=0.8)
        name_axes(axes, [line.name for line in shown], group, "exact match (%), 95 % interval")
        axes.set_xlim(-1, min(101.0, 1.04 * axes.dataLim.x1 + 1))
        axes.spines["left"].set_visible(False)

    data: list[Sequence[Any]] = [("group", "name", "model", "items", "exact", "exact_match", "low", "high", "loss")]
    for line in lines:
        for model, value in (("untouched", line.untouched), ("federated", line.federated)):
            if value:
                cells = value.num_examples, value.num_exact, value.exact_match, *value.interval, value.loss
                data.append((line.group, line.name, model, *cells))
    legend = (Key("untouched", SOFT, "ring"), Key("federated", SERIES[0], "dot"))
    caption = "The share of items answered exactly, with its 95 % Wilson interval." + _left_out(shown, lines)
    height = 0.75 + (0.36 if len(shown) <= 20 else 0.29) * len(shown)
    return make_plot(f"intervals-{group}", title, draw, caption=caption, data=data, height=height, legend=legend)


def exact_match(rows: Rows) -> Plot | None:
    """Exact match by round, all items and each client."""
    totals = [(row["round"], value) for row in rows if (value := measure(_scores(row, "total")))]
    if not totals:
        return None
    rounds = [server_round for server_round, _ in totals]
    band = 100 * np.array([value.interval for _, value in totals])
    curve = [(server_round, 100 * value.exact_match) for server_round, value in totals]
    clients = _client_scores(rows, lambda value: 100 * value.exact_match)

    def draw(axes: Axes) -> None:
        axes.fill_between(rounds, band[:, 0], band[:, 1], color=INK, alpha=0.12, linewidth=0)
        if len(rounds) == 1:
            axes.plot(2 * rounds, band[0], color=INK, alpha=0.3, linewidth=5, solid_capstyle="butt")
        draw_curves(axes, curve, clients)
        round_axes(axes, "exact match (%)")
        axes.set_ylim(max(-2.0, axes.get_ylim()[0]), min(102.0, axes.get_ylim()[1]))

    caption = "Share of items answered exactly; shaded, the 95 % interval over all items." + _uneven(totals)
    data: list[Sequence[Any]] = [("round", "client", "items", "exact", "exact_match", "low", "high")]
    for row in rows:
        for client_id, _, value in _all_scores(row):
            cells = value.num_examples, value.num_exact, value.exact_match, *value.interval
            data.append((row["round"], client_id, *cells))
    legend = curves_legend("all items", clients)
    return make_plot("exact-match", "Exact match by round", draw, caption=caption, data=data, legend=legend)


def evaluation_loss(rows: Rows) -> Plot | None:
    """Loss on the test items by round, all items and each client."""
    curve = finite((row["round"], value.loss) for row in rows if (value := measure(_scores(row, "total"))))
    clients = _client_scores(rows, lambda value: value.loss)
    caption = "Mean loss on the test items."
    data: list[Sequence[Any]] = [("round", "client", "items", "tokens", "nll", "loss")]
    for row in rows:
        for client_id, score, value in _all_scores(row):
            cells = value.num_examples, score.get("num_tokens"), score.get("nll"), value.loss
            data.append((row["round"], client_id, *cells))
    return _loss_plot("loss", "Test loss by round", caption, "all items", curve, clients, data)


def train_loss(rows: Rows) -> Plot | None:
    """Training loss by round: the weighted mean and each client."""
    curve = finite((row["round"], row.get("train_loss")) for row in rows)
    clients = _no_curves(rows)
    data: list[Sequence[Any]] = [("round", "client", "loss", "first_loss", "last_loss", "steps", "tokens")]
    for row in rows:
        if row.get("train_loss") is not None:
            data.append((row["round"], "", row["train_loss"], "", "", "", ""))
        for client_id, report in (row.get("clients") or {}).items():
            clients[client_id] += finite([(row["round"], report.get("loss"))])
            keys = "loss", "first_loss", "last_loss", "num_steps", "num_tokens"
            data.append((row["round"], client_id, *(report.get(key) for key in keys)))
    caption = "Mean loss of the local steps, while they were taken; the clients weighted as in the aggregation."
    return _loss_plot("train-loss", "Training loss by round", caption, "weighted mean", curve, clients, data)


def aggregation(rows: Rows) -> list[Plot]:
    """What the method kept, merged and carried, and how exact it was."""
    energy = "Share of the squared singular values of the exact sum that stays in the adapter."
    rank = "Rank of what is merged into the base weights each round, mean over the modules."
    applied = "Share of the merged residual that the model really computes with, after its number format."
    candidates = (
        _simple(rows, "retained_energy", "Energy kept in the adapter", "energy kept (%)", energy, 100.0),
        _simple(rows, "residual_rank", "Residual rank", "rank", rank),
        _residual_norm(rows),
        _exactness(rows),
        _simple(rows, "applied_share", "Applied share of the residual", "applied (%)", applied, 100.0),
    )
    return [plot for plot in candidates if plot]


def movement(rows: Rows) -> list[Plot]:
    """How the effective weights and the factors moved; docs/metrics.md has the formulas."""
    cosine = (
        "Cosine of a round's change of the weights with that of the round before, and with each client's own change."
    )
    drift = "Mean distance of the clients' changes from their weighted mean, against its norm; 0 where all agree."
    angle = "Mean principal angle between successive adapters: of their row spaces (A) and column spaces (B)."
    norms = "Frobenius norm over all modules: what the clients sent, their weighted mean, and what they are sent next."
    clients = {part: ("diagnostics", "client_cosine", part) for part in ("min", "mean", "max")}
    factors = [
        (f"{factor} {when}", ("diagnostics", "factor_norms", when, factor), SERIES[k], shape)
        for when, shape in (("before", "dashed"), ("after", "thick"))
        for k, factor in enumerate(("A", "B"))
    ]
    candidates = (
        _lines(
            rows, "update-cosine", "Direction of the update", "cosine", cosine,
            [("with the round before", ("diagnostics", "update_cosine"), SERIES[0], "thick"),
             ("with a client's, mean", clients["mean"], SERIES[1], "thick")],
            band=("with a client's, least to greatest", clients["min"], clients["max"], SERIES[1]),
        ),
        _lines(
            rows, "client-drift", "Client drift", "relative distance", drift,
            [("drift", ("diagnostics", "client_drift"), SERIES[0], "thick")], zero=True,
        ),
        _lines(
            rows, "subspace-angle", "Turning of the adapter", "angle (degrees)", angle,
            [(f"{factor} ({name} space)", ("diagnostics", "subspace_angle", factor), SERIES[k], "thick")
             for k, (factor, name) in enumerate((("A", "row"), ("B", "column")))], zero=True,
        ),
        _lines(rows, "factor-norms", "Size of the factors", "norm", norms, factors, zero=True),
    )  # fmt: skip
    return [plot for plot in candidates if plot]


def traffic(rows: Rows) -> list[Plot]:
    """Bytes up and down, by round and summed."""
    rounds = [row["round"] for row in rows]
    up = np.array([sum((row.get("uplink_bytes") or {}).values()) for row in rows], dtype=float)
    down = np.array([sum((row.get("downlink_bytes") or {}).values()) for row in rows], dtype=float)
    if not up.any() and not down.any():
        return []
    legend_bars = (Key("up, clients to server", SERIES[0], "bar"), Key("down, server to clients", SERIES[1], "bar"))
    legend_lines = (Key("up", SERIES[0], "thick"), Key("down", SERIES[1], "thick"))

    def bars(axes: Axes) -> None:
        factor, unit = byte_unit(max(up.max(), down.max()))
        axes.bar(np.array(rounds) - 0.2, up / factor, 0.38, color=SERIES[0])
        axes.bar(np.array(rounds) + 0.2, down / factor, 0.38, color=SERIES[1])
        round_axes(axes, f"all clients ({unit})", zero=True)

    def lines(axes: Axes) -> None:
        factor, unit = byte_unit(max(up.sum(), down.sum()))
        axes.plot(rounds, np.cumsum(up) / factor, color=SERIES[0], linewidth=2.2, marker="o", markersize=4)
        axes.plot(rounds, np.cumsum(down) / factor, color=SERIES[1], linewidth=2.2, marker="s", markersize=4)
        round_axes(axes, f"so far ({unit})", zero=True)

    header = "round", "client", "uplink_bytes", "downlink_bytes"
    data: list[Sequence[Any]] = [header]
    for row in rows:
        sent, received = row.get("uplink_bytes") or {}, row.get("downlink_bytes") or {}
        for client_id in sorted(sent.keys() | received.keys(), key=natural_order):
            data.append((row["round"], client_id, sent.get(client_id, 0), received.get(client_id, 0)))
    summed = zip(rounds, np.cumsum(up).astype(int), np.cumsum(down).astype(int), strict=True)
    total: list[Sequence[Any]] = [("round", "uplink_bytes", "downlink_bytes"), *summed]
    caption = "Payload bytes of all clients together."
    return [
        make_plot("bytes", "Bytes by round", bars, caption=caption, data=data, legend=legend_bars),
        make_plot("bytes-sum", "Bytes so far", lines, caption=caption, data=total, legend=legend_lines),
    ]


def seconds(rows: Rows) -> Plot | None:
    """Time by phase, stacked."""
    phases = list(dict.fromkeys(phase for row in rows for phase in row.get("seconds") or {}))
    if not phases:
        return None
    rounds = [row["round"] for row in rows]
    times = np.array([[(row.get("seconds") or {}).get(phase) or 0.0 for phase in phases] for row in rows])

    def draw(axes: Axes) -> None:
        factor, unit = second_unit(times.sum(axis=1).max())
        bottom = np.zeros(len(rounds))
        for k in range(len(phases)):
            axes.bar(rounds, times[:, k] / factor, 0.7, bottom, color=colour_of(k), edgecolor=PAPER, linewidth=0.5)
            bottom += times[:, k] / factor
        round_axes(axes, f"time ({unit})", zero=True)

    data: list[Sequence[Any]] = [("round", *phases), *((r, *t) for r, t in zip(rounds, times.tolist(), strict=True))]
    legend = [Key(phase, colour_of(k), "bar") for k, phase in enumerate(phases)]
    caption = "Wall-clock time of each round by what it was spent on."
    return make_plot("seconds", "Time by phase", draw, caption=caption, data=data, legend=legend)


def partition(clients: Mapping[str, Mapping[str, Mapping[str, int]]], split: str) -> Plot | None:
    """How many examples of which category each client holds. A category has one colour in both splits."""
    counts = {client_id: clients[client_id].get(split) or {} for client_id in sorted(clients, key=natural_order)}
    num_examples = sum(sum(held.values()) for held in counts.values())
    if not num_examples:
        return None
    totals: dict[str, int] = {}
    for splits in clients.values():
        for held in splits.values():
            for category, num in held.items():
                totals[category] = totals.get(category, 0) + num
    shown = list(counts)[:_DRAWN_BARS]
    largest = sorted(totals, key=lambda category: (-totals[category], natural_order(category)))
    caption = f"Examples of each client by category, {num_examples:,} in all."
    if len(largest) <= len(SERIES):
        labels = [_label(category) for category in largest]
        columns = [[counts[client_id].get(category, 0) for client_id in shown] for category in largest]
    else:  # more categories than colours: how skewed a client is still shows when its own are put in order
        labels = ["its largest", "2nd", "3rd", "4th", "5th", "6th", "all its others"]
        top = len(labels) - 1
        ordered = [sorted(counts[client_id].values(), reverse=True) + top * [0] for client_id in shown]
        columns = [list(column) for column in zip(*((*held[:top], sum(held[top:])) for held in ordered), strict=True)]
        caption += f" With {len(largest)} categories, colours tell a client's own largest from its next."
    colours = [*SERIES[: len(labels) - 1], SOFT if len(largest) > len(SERIES) else SERIES[len(labels) - 1]]

    def draw(axes: Axes) -> None:
        left = np.zeros(len(shown))
        for k, column in enumerate(columns):
            axes.barh(range(len(shown)), column, 0.72, left, color=colours[k], edgecolor=PAPER, linewidth=0.6)
            left += np.array(column)
        name_axes(axes, shown, "client", "examples")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))

    legend = [Key(label, colour, "bar") for label, colour in zip(labels, colours, strict=True)]
    order = sorted(totals, key=natural_order)
    data: list[Sequence[Any]] = [("client", "category", "examples")]
    data += [(c, category, held[category]) for c, held in counts.items() for category in order if held.get(category)]
    title = {"train": "Training examples", "test": "Test examples"}[split]
    caption += _left_out(shown, list(counts))
    height = 0.75 + 0.26 * len(shown)
    return make_plot(f"partition-{split}", title, draw, caption=caption, data=data, height=height, legend=legend)


def _residual_norm(rows: Rows) -> Plot | None:
    residual = finite((row["round"], _scaled(row, "residual_norm", 100)) for row in rows)
    carried = finite((row["round"], _scaled(row, "carried_norm", 100)) for row in rows)
    if not any(value for _, value in carried):  # the default: nothing is ever carried
        carried = []
    if not residual and not carried:
        return None

    def draw(axes: Axes) -> None:
        if residual:
            axes.plot(*zip(*residual, strict=True), color=SERIES[0], linewidth=2.2, marker="o", markersize=4)
        if carried:
            style: dict[str, Any] = {"linewidth": 1.8, "linestyle": "--", "marker": "s", "markersize": 4}
            axes.plot(*zip(*carried, strict=True), color=SERIES[1], **style)
        round_axes(axes, "norm (% of the sum's)", zero=True)

    legend = [Key("residual, merged into the base", SERIES[0], "thick")] if residual else []
    if carried:
        legend.append(Key("carried into the next round", SERIES[1], "dashed"))
    data: list[Sequence[Any]] = [("round", "residual_norm", "carried_norm")]
    data += [(row["round"], row.get("residual_norm"), row.get("carried_norm")) for row in rows]
    caption = "Frobenius norm of what left the adapter, against that of the exact sum."
    return make_plot("residual-norm", "Residual norm", draw, caption=caption, data=data, legend=legend)


def _exactness(rows: Rows) -> Plot | None:
    curve = finite((row["round"], row.get("exactness_error")) for row in rows)
    if not curve:
        return None
    positive = [(server_round, value) for server_round, value in curve if value > 1e-300]  # a log axis ends there
    zero = [server_round for server_round, value in curve if value <= 1e-300]
    floor = 10.0 ** (math.floor(math.log10(min((value for _, value in positive), default=1e-16))) - 1)
    values = [value for _, value in positive] + [floor] * bool(zero)

    def draw(axes: Axes) -> None:
        axes.set_yscale("log")
        if positive:
            axes.plot(*zip(*positive, strict=True), color=SERIES[0], linewidth=2.2, marker="o", markersize=4)
        axes.plot(zero, [floor] * len(zero), color=SERIES[1], linestyle="none", marker="v", markersize=7, clip_on=False)
        round_axes(axes, "relative error (log scale)")
        low, high = min(values), max(values)  # whole decades, so that at least two are labelled
        axes.set_ylim(10.0 ** math.floor(math.log10(low)), 10.0 ** min(307, math.floor(math.log10(high)) + 1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-")))
        axes.yaxis.set_minor_locator(NullLocator())

    legend = [Key("error", SERIES[0], "thick")] if positive else []
    if zero:
        legend.append(Key("exactly zero", SERIES[1], "down"))
    caption = "Relative distance between the weights the clients load next and the exact weighted sum."
    data = [("round", "exactness_error"), *((row["round"], row.get("exactness_error")) for row in rows)]
    return make_plot("exactness", "Exactness error", draw, caption=caption, data=data, legend=legend)


def _simple(rows: Rows, name: str, title: str, label: str, caption: str, factor: float = 1.0) -> Plot | None:
    curve = finite((row["round"], _scaled(row, name, factor)) for row in rows)
    if not curve:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*curve, strict=True), color=SERIES[0], linewidth=2.2, marker="o", markersize=4)
        round_axes(axes, label)
        if factor == 100:  # a share cannot pass 100 %, so its axis need not either
            bottom, top = axes.get_ylim()
            axes.set_ylim(bottom, min(top, 100 + 0.05 * (100 - bottom)))
        else:
            axes.set_ylim(bottom=0)

    data = [("round", name), *((row["round"], row.get(name)) for row in rows)]
    return make_plot(name.replace("_", "-"), title, draw, caption=caption, data=data)


Path = tuple[str, ...]
"""Where a value lies in a row: key within key."""


def _lines(
    rows: Rows,
    key: str,
    title: str,
    label: str,
    caption: str,
    lines: Sequence[tuple[str, Path, str, str]],
    *,
    band: tuple[str, Path, Path, str] | None = None,
    zero: bool = False,
) -> Plot | None:
    """Several values by round, (name, path, colour, shape) each, and a band between two more."""
    curves = [finite((row["round"], _at(row, path)) for row in rows) for _, path, _, _ in lines]
    if not any(curves):
        return None
    edges: list[Curve] = [
        finite((row["round"], _at(row, path)) for row in rows) for path in (band[1:3] if band else ())
    ]

    def draw(axes: Axes) -> None:
        if band and edges[0]:
            x, low = zip(*edges[0], strict=True)
            axes.fill_between(x, low, [value for _, value in edges[1]], color=band[3], alpha=0.18, linewidth=0)
            if len(x) == 1:
                axes.plot(2 * x, [low[0], edges[1][0][1]], color=band[3], alpha=0.3, linewidth=5, solid_capstyle="butt")
        for (_, _, colour, shape), curve in zip(lines, curves, strict=True):
            if curve:
                style: dict[str, Any] = {"linestyle": "--"} if shape == "dashed" else {"linestyle": "-"}
                axes.plot(*zip(*curve, strict=True), color=colour, linewidth=2, marker="o", markersize=3.5, **style)
        round_axes(axes, label, zero=zero)

    legend = [Key(name, colour, shape) for (name, _, colour, shape), curve in zip(lines, curves, strict=True) if curve]
    paths = [path for _, path, _, _ in lines] + list(band[1:3] if band else ())
    if band and edges[0]:
        legend.append(Key(band[0], band[3], "bar"))
    data: list[Sequence[Any]] = [("round", *("_".join(path[1:]) for path in paths))]
    data += [(row["round"], *(_at(row, path) for path in paths)) for row in rows]
    return make_plot(key, title, draw, caption=caption, data=data, legend=legend)


def _at(row: Mapping[str, Any], path: Path) -> float | None:
    value: Any = row
    for name in path:
        value = (value or {}).get(name)
    return value


def _loss_plot(
    key: str, title: str, caption: str, main: str, curve: Curve, clients: dict[str, Curve], data: list[Sequence[Any]]
) -> Plot | None:
    if not curve and not any(clients.values()):
        return None

    def draw(axes: Axes) -> None:
        draw_curves(axes, curve, clients)
        round_axes(axes, "loss (nats per token)")

    return make_plot(key, title, draw, caption=caption, data=data, legend=curves_legend(main, clients))


def _interval(axes: Axes, y: float, value: Measure | None, *, colour: str, face: str) -> None:
    if value is None:
        return
    low, high = value.interval
    axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    style: dict[str, Any] = {"markersize": 6, "markerfacecolor": face, "markeredgecolor": colour, "zorder": 3}
    axes.plot([100 * value.exact_match], [y], marker="o", markeredgewidth=1.5, clip_on=False, **style)


def _scores(row: dict[str, Any], key: str) -> dict[str, Any]:
    return (row.get("evaluation") or {}).get(key) or {}


def _all_scores(row: dict[str, Any]) -> list[tuple[str, dict[str, Any], Measure]]:
    """The scores of a row: all items under the empty name, then each client."""
    scores = [("", _scores(row, "total")), *_scores(row, "by_client").items()]
    return [(name, score, value) for name, score in scores if (value := measure(score))]


def _client_scores(rows: Rows, of: Callable[[Measure], float]) -> dict[str, Curve]:
    curves = _no_curves(rows)
    for row in rows:
        for client_id, score in _scores(row, "by_client").items():
            if value := measure(score):
                curves[client_id] += finite([(row["round"], of(value))])
    return curves


def _no_curves(rows: Rows) -> dict[str, Curve]:
    """An empty curve for every client that ever trained or was evaluated: the same clients in every figure."""
    names = {name for row in rows for name in (*(row.get("clients") or ()), *_scores(row, "by_client"))}
    return {name: [] for name in sorted(names, key=natural_order)}


def _scaled(row: dict[str, Any], name: str, factor: float) -> float | None:
    value = row.get(name)
    return None if value is None else factor * value


def _label(category: str) -> str:
    return shorten(category, 40) if category else "no category"


def _left_out(shown: Sequence[Any], lines: Sequence[Any]) -> str:
    return "" if len(shown) == len(lines) else f" The first {len(shown)} of {len(lines)}; all are in the data."


def _uneven(totals: list[tuple[int, Measure]]) -> str:
    sizes = sorted({value.num_examples for _, value in totals})
    return "" if len(sizes) == 1 else f" A round's score is over {sizes[0]:,} to {sizes[-1]:,} items."
