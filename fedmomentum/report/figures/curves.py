"""Shared parts of figures: curves of many clients, axes by round and by name."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedmomentum.report.figures.svg import INK, SERIES, SOFT, Key
from fedmomentum.results.formatting import shorten

# (round, value) pairs with finite values.
Curve = list[tuple[int, float]]

# With more clients than this, all share one color.
NUM_CLIENT_COLORS = len(SERIES)
# If there are more clients than this, they are drawn as a band.
MAX_CLIENT_CURVES = 60
# Of more rounds than this, points and bars run into each other; they are drawn as lines and areas.
MAX_MARKED_ROUNDS = 60
# How far an axis of percentages goes beyond 0 and 100 %, in points.
PERCENT_MARGIN = 2.0
# The most characters of a name on an axis; a legend allows twice as many.
LABEL_LENGTH = 20
# With more names than this, the plot has its scale at both ends.
LONG_AXIS = 12


def draw_curves(axes: Axes, curve: Curve, clients: dict[str, Curve]) -> None:
    """Draw thin lines for clients, or a band if there are many, and a thick line for all together.

    Args:
        axes: Where to draw.
        curve: The curve for all clients together.
        clients: The curve of each client, whose position determines its color.
    """
    if len(clients) > MAX_CLIENT_CURVES:
        _draw_client_band(axes, clients)
    else:
        _draw_client_lines(axes, clients)
    if curve:
        marker = marker_of(curve)
        axes.plot(
            *zip(*curve, strict=True), color=INK, linewidth=2.6, marker=marker, markersize=4.5
        )


def marker_of(points: Sequence[object], marker: str = "o") -> str:
    """Return the marker of a curve with these points; none if they would run into each other."""
    return marker if len(points) <= MAX_MARKED_ROUNDS else ""


def _draw_client_band(axes: Axes, clients: dict[str, Curve]) -> None:
    """Shade the area from the 10th to the 90th percentile of the clients in each round."""
    by_round: dict[int, list[float]] = {}
    for curve in clients.values():
        for server_round, value in curve:
            by_round.setdefault(server_round, []).append(value)
    if not by_round:
        return
    rounds = sorted(by_round)
    percentiles = [np.percentile(by_round[server_round], [10, 90]) for server_round in rounds]
    low, high = np.transpose(percentiles)
    axes.fill_between(rounds, low, high, color=SOFT, alpha=0.45, linewidth=0)
    if len(rounds) == 1:
        # An area over a single round has no width.
        ends = [low[0], high[0]]
        axes.plot(2 * rounds, ends, color=SOFT, alpha=0.45, linewidth=9, solid_capstyle="butt")


def _draw_client_lines(axes: Axes, clients: dict[str, Curve]) -> None:
    are_many = len(clients) > NUM_CLIENT_COLORS
    for position, curve in enumerate(clients.values()):
        if not curve:
            continue
        rounds, values = zip(*curve, strict=True)
        axes.plot(
            rounds,
            values,
            color=SOFT if are_many else color_of(position),
            linewidth=0.8 if are_many else 1.2,
            alpha=0.6 if are_many else 0.95,
            marker="" if are_many and len(curve) > 1 else marker_of(curve),
            markersize=2.5,
        )


def curves_legend(main_label: str, clients: dict[str, Curve]) -> list[Key]:
    """Return the legend of `draw_curves`."""
    main = Key(main_label, INK, "thick")
    num_drawn = sum(1 for curve in clients.values() if curve)
    if len(clients) > MAX_CLIENT_CURVES:
        return [main, Key(f"10 to 90 % of {num_drawn} clients", SOFT, "bar")]
    if len(clients) > NUM_CLIENT_COLORS:
        return [main, Key(f"each of {num_drawn} clients", SOFT)]
    legend = [main]
    for position, (client, curve) in enumerate(clients.items()):
        if curve:
            legend.append(Key(shorten(client, 2 * LABEL_LENGTH), color_of(position)))
    return legend


def name_axes(axes: Axes, names: Sequence[str], kind: str, label: str) -> None:
    """Put names along the vertical axis, with the first at the top.

    Args:
        axes: The axes.
        names: One name per bar or dot; a name may have several lines.
        kind: What the names are: client, category.
        label: The label of the horizontal axis.
    """
    # The first name is at the top.
    is_long = len(names) > LONG_AXIS
    axes.set_yticks(range(len(names)), [_shorten_lines(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.set_ylabel(kind, loc="top" if is_long else "center")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labeltop=is_long)
    axes.grid(axis="x")


def _shorten_lines(name: str) -> str:
    lines = name.splitlines() or [""]
    return "\n".join(shorten(line, LABEL_LENGTH) for line in lines)


def limit_percent(axes: Axes) -> None:
    """Leave little room beyond 0 and 100 % if all values lie between; call after `round_axes`."""
    low, high = axes.dataLim.y0, axes.dataLim.y1
    bottom, top = axes.get_ylim()
    if low >= 0:
        bottom = max(bottom, -PERCENT_MARGIN)
    if high <= 100:
        top = min(top, 100 + PERCENT_MARGIN)
    if low == high == 0:
        top = 1.0  # not thousandths of a percent around zero
    axes.set_ylim(bottom, top)


def round_axes(axes: Axes, label: str, *, from_zero: bool = False) -> None:
    """Put integer rounds along the horizontal axis; call this after drawing.

    Args:
        axes: The axes.
        label: The label of the vertical axis.
        from_zero: Whether the vertical axis starts at zero.
    """
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.grid(axis="y")

    # The horizontal axis has a small margin and ticks at integers.
    first, last = axes.dataLim.x0, axes.dataLim.x1
    margin = max(0.3, 0.03 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if axes.get_yscale() == "log":
        return

    # The vertical axis has few ticks and starts at zero if requested.
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    bottom, top = axes.dataLim.y0, axes.dataLim.y1
    if from_zero:
        axes.set_ylim(0, 1.06 * top or 1.0)
    elif top - bottom < 1e-3 * abs(top):
        # Choose a scale on which a constant looks constant.
        axes.set_ylim(bottom - max(0.02 * abs(bottom), 1e-3), top + max(0.02 * abs(top), 1e-3))


def finite(points: Iterable[tuple[int, float | None]]) -> Curve:
    """Return the points with finite values, which can be drawn."""
    curve = []
    for server_round, value in points:
        if value is not None and math.isfinite(value):
            curve.append((server_round, value))
    return curve


def color_of(position: int) -> str:
    """Return the color at a position; gray beyond the last."""
    return SERIES[position] if position < len(SERIES) else SOFT


def method_color(position: int) -> str:
    """Return a method's color; colors repeat with a different line style."""
    return SERIES[position % len(SERIES)]


def color_cycle(position: int) -> int:
    """Return how often the colors have been used up before a position, at most twice."""
    return min(position // len(SERIES), 2)
