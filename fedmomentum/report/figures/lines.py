"""Figures of one or a few metrics by round, the most common kind on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.report.figures.curves import (
    Curve,
    finite,
    limit_percent,
    marker_of,
    round_axes,
)
from fedmomentum.report.figures.svg import SERIES, Key, Plot, make_plot
from fedmomentum.results.formatting import shorten

Rounds = Sequence[RoundRecord]
# Extracts a metric from a round's record.
ValueOf = Callable[[RoundRecord], float | None]

# Bars beyond this number are only in the data.
MAX_BARS = 100


@dataclass(frozen=True)
class Texts:
    """A figure's key, title, caption and vertical axis label."""

    key: str
    title: str
    axis_label: str
    caption: str


@dataclass(frozen=True)
class Line:
    """One metric in a figure of several.

    Attributes:
        label: The label in the legend.
        column: The column in the CSV.
        value_of: Extracts it from a round's record.
        color: Its color.
        shape: `thick` or `dashed`.
    """

    label: str
    column: str
    value_of: ValueOf
    color: str
    shape: str = "thick"


@dataclass(frozen=True)
class Band:
    """An area between two metrics; `label` is used in the legend."""

    label: str
    low: Line
    high: Line


def metric_plot(
    rounds: Rounds, metric: str, texts: Texts, *, as_percent: bool = False
) -> Plot | None:
    """Plot one metric by round; return None if it was not recorded.

    Args:
        rounds: The rounds.
        metric: A field of `RoundRecord`.
        texts: The figure's texts.
        as_percent: Whether the metric is a fraction to be shown in percent.
    """
    factor = 100.0 if as_percent else 1.0
    values = [(record.round, getattr(record, metric)) for record in rounds]
    curve = finite((server_round, scaled(value, factor)) for server_round, value in values)
    if not curve:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(
            *zip(*curve, strict=True),
            color=SERIES[0],
            linewidth=2.2,
            marker=marker_of(curve),
            markersize=4,
        )
        round_axes(axes, texts.axis_label)
        if as_percent:
            limit_percent(axes)
        else:
            axes.set_ylim(bottom=0)

    data = [("round", metric), *values]
    return make_plot(texts.key, texts.title, draw, caption=texts.caption, data=data)


def lines_plot(
    rounds: Rounds,
    texts: Texts,
    lines: Sequence[Line],
    *,
    band: Band | None = None,
    from_zero: bool = False,
) -> Plot | None:
    """Plot several metrics by round, and optionally a band; return None if none was recorded."""
    # Only finite values can be drawn.
    curves = [_curve(rounds, line) for line in lines]
    if not any(curves):
        return None
    low = _curve(rounds, band.low) if band else []
    high = _curve(rounds, band.high) if band else []

    def draw(axes: Axes) -> None:
        # The band goes behind the lines.
        if band and low:
            _draw_band(axes, low, high, band.low.color)
        for line, curve in zip(lines, curves, strict=True):
            if curve:
                _draw_line(axes, line, curve)
        round_axes(axes, texts.axis_label, from_zero=from_zero)

    # The legend shows what is drawn; the data has all columns, including missing values.
    legend = []
    for line, curve in zip(lines, curves, strict=True):
        if curve:
            legend.append(Key(line.label, line.color, line.shape))
    if band and low:
        legend.append(Key(band.label, band.low.color, "bar"))
    columns = [*lines, band.low, band.high] if band else list(lines)
    data: list[Sequence[Any]] = [("round", *(line.column for line in columns))]
    for record in rounds:
        data.append((record.round, *(line.value_of(record) for line in columns)))
    return make_plot(texts.key, texts.title, draw, caption=texts.caption, data=data, legend=legend)


def _curve(rounds: Rounds, line: Line) -> Curve:
    return finite((record.round, line.value_of(record)) for record in rounds)


def _draw_line(axes: Axes, line: Line, curve: Curve) -> None:
    rounds, values = zip(*curve, strict=True)
    axes.plot(
        rounds,
        values,
        color=line.color,
        linewidth=2,
        linestyle="--" if line.shape == "dashed" else "-",
        marker=marker_of(curve),
        markersize=3.5,
    )


def _draw_band(axes: Axes, low: Curve, high: Curve, color: str) -> None:
    rounds = [server_round for server_round, _ in low]
    bottom = [value for _, value in low]
    top = [value for _, value in high]
    axes.fill_between(rounds, bottom, top, color=color, alpha=0.18, linewidth=0)
    if len(rounds) == 1:
        # An area over a single round has no width.
        ends = [bottom[0], top[0]]
        axes.plot(2 * rounds, ends, color=color, alpha=0.3, linewidth=5, solid_capstyle="butt")


def present(*candidates: Plot | None) -> list[Plot]:
    """Return the plots that are not None."""
    return [plot for plot in candidates if plot is not None]


def scaled(value: float | None, factor: float) -> float | None:
    """Return a value times a factor; None stays None."""
    return None if value is None else factor * value


def category_label(category: str) -> str:
    """Return a category's label in legends."""
    return shorten(category, 40) if category else "no category"


def omitted_note(shown: Sequence[Any], everything: Sequence[Any]) -> str:
    """Return a sentence for the caption if not everything is drawn."""
    if len(shown) == len(everything):
        return ""
    return f" The first {len(shown)} of {len(everything)}; all are in the data."
