"""What the figures have in common: curves of many clients, axes by round and by name."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedmomentum.report.svg import INK, SERIES, SOFT, Key
from fedmomentum.report.text import shorten

Curve = list[tuple[int, float]]  # (round, value), finite values only

_NAMED_CLIENTS = len(SERIES)  # more than this share one colour
_DRAWN_CLIENTS = 60  # more than this are drawn as a band
_LABEL = 20  # characters of a name beside an axis; twice as many in a legend


def draw_curves(axes: Axes, curve: Curve, clients: dict[str, Curve]) -> None:
    """Thin lines for the clients, a thick one for all of them. A client's colour goes by its place in `clients`."""
    if len(clients) > _DRAWN_CLIENTS:
        by_round: dict[int, list[float]] = {}
        for points in clients.values():
            for server_round, value in points:
                by_round.setdefault(server_round, []).append(value)
        edges = [np.percentile(by_round[server_round], [10, 90]) for server_round in sorted(by_round)]
        if edges:
            axes.fill_between(sorted(by_round), *np.transpose(edges), color=SOFT, alpha=0.45, linewidth=0)
    else:
        many = len(clients) > _NAMED_CLIENTS
        for k, points in enumerate(clients.values()):
            if not points:
                continue
            colour = SOFT if many else colour_of(k)
            style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6} if many else {"linewidth": 1.2, "alpha": 0.95}
            style["marker"] = "" if many and len(points) > 1 else "o"
            axes.plot(*zip(*points, strict=True), color=colour, markersize=2.5, **style)
    if curve:
        axes.plot(*zip(*curve, strict=True), color=INK, linewidth=2.6, marker="o", markersize=4.5)


def curves_legend(main: str, clients: dict[str, Curve]) -> list[Key]:
    """The legend of `draw_curves`."""
    thick, num_drawn = Key(main, INK, "thick"), sum(map(bool, clients.values()))
    if len(clients) > _DRAWN_CLIENTS:
        return [thick, Key(f"10 to 90 % of {num_drawn} clients", SOFT, "bar")]
    if len(clients) > _NAMED_CLIENTS:
        return [thick, Key(f"each of {num_drawn} clients", SOFT)]
    names = [(k, client_id) for k, (client_id, points) in enumerate(clients.items()) if points]
    return [thick, *(Key(shorten(client_id, 2 * _LABEL), colour_of(k)) for k, client_id in names)]


def name_axes(axes: Axes, names: Sequence[str], kind: str, label: str) -> None:
    """Names down the side, the first at the top; a long list has its scale at both ends. A name may have lines."""
    shown = ["\n".join(shorten(line, _LABEL) for line in name.splitlines() or [""]) for name in names]
    axes.set_yticks(range(len(names)), shown)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(label)
    axes.set_ylabel(kind, loc="top" if len(names) > 12 else "center")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labeltop=len(names) > 12)
    axes.grid(axis="x")


def round_axes(axes: Axes, label: str, *, zero: bool = False) -> None:
    """Whole rounds along the bottom; upwards from zero if asked. Call it after drawing."""
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.grid(axis="y")
    low, high = axes.dataLim.x0, axes.dataLim.x1
    margin = max(0.3, 0.03 * (high - low))
    axes.set_xlim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    if axes.get_yscale() == "log":
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    bottom, top = axes.dataLim.y0, axes.dataLim.y1
    if zero:
        axes.set_ylim(0, 1.06 * top or 1.0)
    elif top - bottom < 1e-3 * abs(top):  # a constant: show a scale on which it looks like one
        axes.set_ylim(bottom - max(0.02 * abs(bottom), 1e-3), top + max(0.02 * abs(top), 1e-3))


def finite(points: Iterable[tuple[int, float | None]]) -> Curve:
    """The points that can be drawn."""
    return [(server_round, value) for server_round, value in points if value is not None and math.isfinite(value)]


def colour_of(k: int) -> str:
    """The k-th colour; past the last, grey."""
    return SERIES[k] if k < len(SERIES) else SOFT
