"""Figures of methods over rounds and bytes: the mean over seeds and the range between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedmomentum.report.figures.curves import color_cycle, limit_percent, method_color, round_axes
from fedmomentum.report.figures.lines import present
from fedmomentum.report.figures.svg import Key, Plot, make_plot
from fedmomentum.results.comparison import Comparison
from fedmomentum.results.formatting import byte_unit
from fedmomentum.results.method_run import MethodRun, RoundPoint

# With this many points or more, markers would hide the curve.
MAX_POINTS_WITH_MARKERS = 30
# With this many bands or more, each is drawn fainter.
FEW_BANDS = 5
# Line styles, one for each pass through the colors.
DASHES = ("-", "--", ":")
# The same, for the legend.
LEGEND_SHAPES = ("thick", "dashed", "dotted")


@dataclass(frozen=True)
class CurveFigure:
    """One metric of all methods.

    Attributes:
        key: The figure's key.
        title: Its title.
        axis_label: The label of the vertical axis.
        metric: A field of `RoundPoint`.
        note: A sentence for the caption.
        as_percent: Whether the metric is a fraction to be shown in percent.
        against_bytes: Whether the horizontal axis is bytes instead of rounds.
    """

    key: str
    title: str
    axis_label: str
    metric: str
    note: str
    as_percent: bool = False
    against_bytes: bool = False


@dataclass(frozen=True)
class Band:
    """A method's mean over its seeds, with minimum and maximum, along `x`."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


COMMON_EXAMPLES = "On the examples that every evaluation of a run has."
ALL_BYTES = "Bytes of all clients, both ways; the references send nothing."
ENERGY = (
    "Fraction of the squared singular values of the exact sum that stays in the adapter, where a "
    "method reports it."
)
RANK = "Rank of what is merged into the base weights each round, mean over the modules."
COSINE = "Cosine of a round's change of the effective weights with that of the round before."
ANGLE = "Mean principal angle between successive adapters, over the directions that are not zero."

# Titles and labels are worded for answers; runs on pairs have other names for the same measures.
EXACT_MATCH_LABEL = "{measure} (%)"
LOSS_LABEL = "loss ({unit})"
ANGLE_LABEL = "angle (degrees)"

SCORE_FIGURES = (
    CurveFigure(
        "exact-match",
        "{Measure} by round",
        EXACT_MATCH_LABEL,
        "exact_match",
        COMMON_EXAMPLES,
        as_percent=True,
    ),
    CurveFigure("loss", "Loss by round", LOSS_LABEL, "loss", COMMON_EXAMPLES),
    CurveFigure(
        "exact-match-bytes",
        "{Measure} by bytes",
        EXACT_MATCH_LABEL,
        "exact_match",
        ALL_BYTES,
        as_percent=True,
        against_bytes=True,
    ),
    CurveFigure("loss-bytes", "Loss by bytes", LOSS_LABEL, "loss", ALL_BYTES, against_bytes=True),
)
METHOD_FIGURES = (
    CurveFigure(
        "retained-energy",
        "Energy kept in the adapter",
        "energy kept (%)",
        "retained_energy",
        ENERGY,
        as_percent=True,
    ),
    CurveFigure("residual-rank", "Residual rank", "rank", "residual_rank", RANK),
    CurveFigure("update-cosine", "Direction of the update", "cosine", "update_cosine", COSINE),
    CurveFigure("angle-a", "Turning of A's row space", ANGLE_LABEL, "angle_a", ANGLE),
    CurveFigure("angle-b", "Turning of B's column space", ANGLE_LABEL, "angle_b", ANGLE),
)


def score_plots(comparison: Comparison) -> list[Plot]:
    """Plot exact match and loss against rounds and against bytes."""
    return present(*(_curve_plot(comparison, figure) for figure in SCORE_FIGURES))


def method_plots(comparison: Comparison) -> list[Plot]:
    """Plot each method's effect on the sum and the adapter, by round."""
    return present(*(_curve_plot(comparison, figure) for figure in METHOD_FIGURES))


def _curve_plot(comparison: Comparison, figure: CurveFigure) -> Plot | None:
    """Plot each method's mean of a metric over its seeds, and a band from minimum to maximum."""
    bands = {}
    for method in comparison.methods:
        band = _make_band(comparison.runs_of(method), figure)
        if band.x:
            bands[method] = band
    if not bands:
        return None
    positions = {method: position for position, method in enumerate(comparison.methods)}

    def draw(axes: Axes) -> None:
        scale, unit = 1.0, ""
        if figure.against_bytes:
            scale, unit = byte_unit(max(band.x[-1] for band in bands.values()))
        alpha = 0.15 if len(bands) < FEW_BANDS else 0.08
        for method, band in bands.items():
            _draw_band(axes, band, positions[method], scale, alpha)
        round_axes(axes, _worded(figure.axis_label, comparison))
        if figure.against_bytes:
            _byte_axis(axes, unit)
        if figure.as_percent:
            limit_percent(axes)

    # The caption explains the band, the legend what is drawn.
    most_seeds = max(len(comparison.runs_of(method)) for method in bands)
    seeds = "One seed."
    if most_seeds > 1:
        seeds = "Mean over seeds; shaded, from the least to the greatest."
    legend = []
    for method in bands:
        position = positions[method]
        legend.append(Key(method, method_color(position), LEGEND_SHAPES[color_cycle(position)]))
    return make_plot(
        figure.key,
        _worded(figure.title, comparison),
        draw,
        caption=f"{seeds} {figure.note}",
        data=_curve_data(comparison, figure, bands),
        legend=legend,
    )


def _worded(text: str, comparison: Comparison) -> str:
    """Fill in the names of the runs' measures in a title or label."""
    measure = comparison.measure
    return text.format(measure=measure, Measure=measure.capitalize(), unit=comparison.loss_unit)


def _make_band(runs: Sequence[MethodRun], figure: CurveFigure) -> Band:
    """Return a band over the rounds in which all of a method's seeds have the metric, ascending."""
    # Points where the metric was measured.
    points_by_round: dict[int, list[RoundPoint]] = {}
    for run in runs:
        for point in run.points:
            if _is_drawn(point, figure):
                points_by_round.setdefault(point.round, []).append(point)

    # Mean, minimum and maximum in rounds that all seeds have.
    factor = 100.0 if figure.as_percent else 1.0
    band = Band([], [], [], [])
    for server_round, points in sorted(points_by_round.items()):
        if len(points) < len(runs):
            continue
        values = [factor * getattr(point, figure.metric) for point in points]
        if figure.against_bytes:
            band.x.append(sum(point.num_bytes or 0.0 for point in points) / len(points))
        else:
            band.x.append(server_round)
        band.mean.append(sum(values) / len(values))
        band.low.append(min(values))
        band.high.append(max(values))
    return band


def _is_drawn(point: RoundPoint, figure: CurveFigure) -> bool:
    value = getattr(point, figure.metric)
    if value is None or not math.isfinite(value):
        return False
    return not figure.against_bytes or point.num_bytes is not None


def _draw_band(axes: Axes, band: Band, position: int, scale: float, alpha: float) -> None:
    x = [value / scale for value in band.x]
    if band.low != band.high:
        color = method_color(position)
        axes.fill_between(x, band.low, band.high, color=color, alpha=alpha, linewidth=0)
    axes.plot(
        x,
        band.mean,
        color=method_color(position),
        linewidth=2,
        linestyle=DASHES[color_cycle(position)],
        marker="o" if len(x) < MAX_POINTS_WITH_MARKERS else "",
        markersize=3.5,
    )


def _byte_axis(axes: Axes, unit: str) -> None:
    axes.set_xlabel(f"sent so far ({unit})")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    low, high = axes.dataLim.x0, axes.dataLim.x1
    margin = 0.03 * (high - low) or 0.5
    axes.set_xlim(low - margin, high + margin)


def _curve_data(
    comparison: Comparison, figure: CurveFigure, bands: Mapping[str, Band]
) -> list[Sequence[Any]]:
    middle = ["bytes"] if figure.against_bytes else []
    data: list[Sequence[Any]] = [("method", "seed", "round", *middle, figure.metric)]
    for run in comparison.method_runs:
        if run.method not in bands:
            continue
        for point in run.points:
            value = getattr(point, figure.metric)
            num_bytes = [point.num_bytes] if figure.against_bytes else []
            if value is not None:
                data.append((run.method, run.seed, point.round, *num_bytes, value))
    return data
