"""The figures of a comparison: methods over rounds and bytes, with what lies between their seeds."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedmomentum.report.cells import Cell, Comparison, MethodSummary, Point
from fedmomentum.report.curves import name_axes, round_axes
from fedmomentum.report.statistics import Mean
from fedmomentum.report.svg import GRID, PAPER, SERIES, Key, Plot, make_plot
from fedmomentum.report.text import byte_unit

Band = list[tuple[float, float, float, float]]  # (x, mean, least, greatest)
_DASHES = ("-", "--", ":")
_SHAPES = ("thick", "dashed", "dotted")


def score_plots(comparison: Comparison) -> list[Plot]:
    """Exact match and loss against rounds and against bytes."""
    items = " On the items that every evaluation of a run has."
    by_bytes = " Bytes of all clients, both ways; the references send nothing."
    candidates = (
        _curves(comparison, "exact-match", "Exact match by round", "exact match (%)", items, "exact_match", 100),
        _curves(comparison, "loss", "Loss by round", "loss (nats per token)", items, "loss"),
        _curves(comparison, "exact-match-bytes", "Exact match by bytes", "exact match (%)", by_bytes, "exact_match",
                100, against_bytes=True),
        _curves(comparison, "loss-bytes", "Loss by bytes", "loss (nats per token)", by_bytes, "loss",
                against_bytes=True),
    )  # fmt: skip
    return [plot for plot in candidates if plot]


def method_plots(comparison: Comparison) -> list[Plot]:
    """What the methods did to the sum and to the adapter, by round."""
    energy = " Share of the squared singular values of the exact sum that stays in the adapter, where a method tells."
    rank = " Rank of what is merged into the base weights each round, mean over the modules."
    cosine = " Cosine of a round's change of the effective weights with that of the round before."
    angle = " Mean principal angle between successive adapters, over the directions that are not zero."
    candidates = (
        _curves(comparison, "retained-energy", "Energy kept in the adapter", "energy kept (%)", energy,
                "retained_energy", 100),
        _curves(comparison, "residual-rank", "Residual rank", "rank", rank, "residual_rank"),
        _curves(comparison, "update-cosine", "Direction of the update", "cosine", cosine, "update_cosine"),
        _curves(comparison, "angle-a", "Turning of A's row space", "angle (degrees)", angle, "angle_a"),
        _curves(comparison, "angle-b", "Turning of B's column space", "angle (degrees)", angle, "angle_b"),
    )  # fmt: skip
    return [plot for plot in candidates if plot]


def difference_plots(comparison: Comparison, summaries: Sequence[MethodSummary]) -> list[Plot]:
    """Paired differences of the last scores to the baseline, with their t-intervals and every seed."""
    candidates = (
        _differences(
            comparison, summaries, "exact-match-difference", "Exact match against the baseline", "points",
            lambda one: one.exact_match_difference, lambda cell: cell.exact_match, 100,
        ),
        _differences(
            comparison, summaries, "loss-difference", "Loss against the baseline", "nats per token",
            lambda one: one.loss_difference, lambda cell: cell.loss, 1,
        ),
    )  # fmt: skip
    return [plot for plot in candidates if plot]


def client_plot(comparison: Comparison, clients: Sequence[str]) -> Plot | None:
    """Exact match of every client on its own items, one dot a method: the mean over seeds."""
    means = client_means(comparison, clients)
    if len(clients) < 2 or not means:
        return None
    shown = clients[:60]

    def draw(axes: Axes) -> None:
        for y in range(len(shown)):
            axes.axhline(y, color=GRID, linewidth=0.5)
        for k, method in enumerate(comparison.methods):
            found = [(100 * means[client, method][0], y) for y, client in enumerate(shown) if (client, method) in means]
            if found:
                face = _colour(k) if k < len(SERIES) else PAPER
                axes.plot(*zip(*found, strict=True), linestyle="none", marker="o", markersize=6, color=_colour(k),
                          markerfacecolor=face, alpha=0.9)  # fmt: skip
        name_axes(axes, shown, "client", "exact match (%)")

    data: list[Sequence[Any]] = [("client", "method", "exact_match", "loss", "seeds")]
    data += [(c, m, *means[c, m]) for c in clients for m in comparison.methods if (c, m) in means]
    legend = [
        Key(method, _colour(k), "dot" if k < len(SERIES) else "ring") for k, method in enumerate(comparison.methods)
    ]
    more = "" if len(shown) == len(clients) else f" The first {len(shown)} of {len(clients)}; all are in the data."
    caption = f"Each client's own held-out items after the last round, mean over seeds.{more}"
    return make_plot("by-client", "By client", draw, caption=caption, data=data, height=0.75 + 0.3 * len(shown),
                     legend=legend)  # fmt: skip


def client_means(comparison: Comparison, clients: Sequence[str]) -> dict[tuple[str, str], tuple[float, float, int]]:
    """(client, method) to exact match and loss, mean over seeds, and how many seeds."""
    means = {}
    for method in comparison.methods:
        for client in clients:
            found = [c.by_client[client] for c in comparison.cells if c.method == method and client in c.by_client]
            if found:
                exact, loss = (sum(values) / len(found) for values in zip(*found, strict=True))
                means[client, method] = exact, loss, len(found)
    return means


def _curves(
    comparison: Comparison,
    key: str,
    title: str,
    label: str,
    caption: str,
    name: str,
    factor: float = 1.0,
    *,
    against_bytes: bool = False,
) -> Plot | None:
    """A value of every method against rounds or bytes: the mean over its seeds, and a band from least to greatest."""
    bands = {method: _band(comparison, method, name, factor, against_bytes) for method in comparison.methods}
    drawn = {method: band for method, band in bands.items() if band}
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        scale, unit = byte_unit(max(band[-1][0] for band in drawn.values())) if against_bytes else (1.0, "")
        for k, method in enumerate(comparison.methods):
            if method not in drawn:
                continue
            x, mean, low, high = (list(values) for values in zip(*drawn[method], strict=True))
            x = [value / scale for value in x]
            if low != high:
                axes.fill_between(x, low, high, color=_colour(k), alpha=0.15 if len(drawn) < 5 else 0.08, linewidth=0)
            style: dict[str, Any] = {"linestyle": _DASHES[_turn(k)], "marker": "o" if len(x) < 30 else ""}
            axes.plot(x, mean, color=_colour(k), linewidth=2, markersize=3.5, **style)
        round_axes(axes, label)
        if against_bytes:
            axes.set_xlabel(f"sent so far ({unit})")
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes.set_xlim(*_with_margin(axes.dataLim.x0, axes.dataLim.x1))
        if factor == 100:
            bottom, top = axes.get_ylim()
            axes.set_ylim(max(bottom, -2.0), min(top, 102.0))

    seeds = max(sum(cell.method == method for cell in comparison.cells) for method in drawn)
    over = "Mean over seeds; shaded, from the least to the greatest." if seeds > 1 else "One seed."
    data: list[Sequence[Any]] = [("method", "seed", "round", *(["bytes"] if against_bytes else []), name)]
    for cell in comparison.cells:
        for point in cell.points:
            if getattr(point, name) is not None and cell.method in drawn:
                middle = [point.num_bytes] if against_bytes else []
                data.append((cell.method, cell.seed, point.round, *middle, getattr(point, name)))
    legend = [
        Key(method, _colour(k), _SHAPES[_turn(k)]) for k, method in enumerate(comparison.methods) if method in drawn
    ]
    return make_plot(key, title, draw, caption=over + caption, data=data, legend=legend)


def _band(comparison: Comparison, method: str, name: str, factor: float, against_bytes: bool) -> Band:
    """Where all of the method's seeds have the value, ascending."""
    cells = [cell for cell in comparison.cells if cell.method == method]
    by_round: dict[int, list[Point]] = {}
    for cell in cells:
        for point in cell.points:
            value = getattr(point, name)
            if value is not None and math.isfinite(value) and not (against_bytes and point.num_bytes is None):
                by_round.setdefault(point.round, []).append(point)
    band = []
    for server_round, points in sorted(by_round.items()):
        if len(points) == len(cells):
            values = [factor * getattr(point, name) for point in points]
            x = sum(point.num_bytes or 0.0 for point in points) / len(points) if against_bytes else server_round
            band.append((x, sum(values) / len(values), min(values), max(values)))
    return band


def _differences(
    comparison: Comparison,
    summaries: Sequence[MethodSummary],
    key: str,
    title: str,
    label: str,
    mean_of: Callable[[MethodSummary], Mean | None],
    value_of: Callable[[Cell], float | None],
    factor: float,
) -> Plot | None:
    lines = [(one.method, mean) for one in summaries if (mean := mean_of(one))]
    if not lines:
        return None
    base = {c.seed: value for c in comparison.cells if c.method == comparison.baseline
            and (value := value_of(c)) is not None}  # fmt: skip
    dots = {
        method: [(cell.seed, value - base[cell.seed]) for cell in comparison.cells
                 if cell.method == method and cell.seed in base and (value := value_of(cell)) is not None]
        for method, _ in lines
    }  # fmt: skip

    # a method's settings on lines of their own, a setting of the run without its section
    names = [re.sub(r"[:;](\w+\.)?", "\n", method) for method, _ in lines]
    most_lines = max(name.count("\n") + 1 for name in names)

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=GRID, linewidth=1.2)
        for y, (method, mean) in enumerate(lines):
            colour = _colour(comparison.methods.index(method))
            if mean.low is not None and mean.high is not None:
                ends = [factor * mean.low, factor * mean.high]
                axes.plot(ends, [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
            x = [factor * value for _, value in dots[method]]
            axes.plot(x, [y + 0.22] * len(x), linestyle="none", marker="|", markersize=6, color=colour)
            axes.plot([factor * mean.mean], [y], marker="o", markersize=6.5, color=colour)
        name_axes(axes, names, "", f"difference ({label})")
        axes.spines["left"].set_visible(False)

    data: list[Sequence[Any]] = [("method", "seed", "difference", "low", "high")]
    for method, mean in lines:
        data += [(method, seed, value, "", "") for seed, value in dots[method]]
        data.append((method, "mean", mean.mean, mean.low, mean.high))
    caption = (
        f"After the last round, minus {comparison.baseline} with the same seed. Dot and line: mean and 95 % "
        "t-interval; ticks: the seeds."
    )
    return make_plot(
        key, title, draw, caption=caption, data=data, height=0.8 + max(0.42, 0.2 * most_lines) * len(lines)
    )


def _with_margin(low: float, high: float) -> tuple[float, float]:
    margin = 0.03 * (high - low) or 0.5
    return low - margin, high + margin


def _colour(k: int) -> str:
    return SERIES[k % len(SERIES)]


def _turn(k: int) -> int:
    """How many times the colours are used up: another dash each time."""
    return min(k // len(SERIES), len(_DASHES) - 1)
