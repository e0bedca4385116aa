"""Figures of the methods' final scores: differences from the baseline, and scores by client."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from fedmomentum.report.figures.curves import color_cycle, method_color, name_axes
from fedmomentum.report.figures.lines import omitted_note, present
from fedmomentum.report.figures.svg import GRID, PAPER, Key, Plot, make_plot
from fedmomentum.results.comparison import Comparison
from fedmomentum.results.method_run import MethodRun
from fedmomentum.results.method_summary import MethodSummary, paired_differences
from fedmomentum.results.statistics import MeanEstimate

# Clients beyond this number are only in the data.
MAX_CLIENTS = 60


@dataclass(frozen=True)
class DifferenceFigure:
    """Paired differences of one score from the baseline.

    Attributes:
        key: The figure's key.
        title: Its title.
        unit: The unit of the difference.
        difference_of: Extracts the estimate from a method's summary.
        score_of: Extracts the score from a method's run.
        factor: The factor by which values are multiplied.
    """

    key: str
    title: str
    unit: str
    difference_of: Callable[[MethodSummary], MeanEstimate | None]
    score_of: Callable[[MethodRun], float | None]
    factor: float = 1.0


DIFFERENCE_FIGURES = (
    DifferenceFigure(
        "exact-match-difference",
        "{Measure} against the baseline",
        "points",
        lambda summary: summary.exact_match_difference,
        lambda run: run.exact_match,
        100,
    ),
    DifferenceFigure(
        "loss-difference",
        "Loss against the baseline",
        "{unit}",
        lambda summary: summary.loss_difference,
        lambda run: run.loss,
    ),
)


def difference_plots(comparison: Comparison, summaries: Sequence[MethodSummary]) -> list[Plot]:
    """Plot differences of final scores from the baseline, with t intervals and all seeds."""
    return present(
        *(_difference_plot(comparison, summaries, figure) for figure in DIFFERENCE_FIGURES)
    )


def _difference_plot(
    comparison: Comparison, summaries: Sequence[MethodSummary], figure: DifferenceFigure
) -> Plot | None:
    """Plot one score's differences from the baseline, one line per method."""
    # For methods that have a difference: its estimate, and each seed's value.
    estimates: dict[str, MeanEstimate] = {}
    for summary in summaries:
        estimate = figure.difference_of(summary)
        if estimate is not None:
            estimates[summary.method] = estimate
    if not estimates:
        return None
    differences = {}
    for method in estimates:
        differences[method] = paired_differences(comparison, method, figure.score_of)
    names = [_split_label(method) for method in estimates]
    most_lines = max(name.count("\n") + 1 for name in names)

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=GRID, linewidth=1.2)
        # One line per method: interval, seeds as ticks, mean as a dot.
        for y, (method, estimate) in enumerate(estimates.items()):
            color = method_color(comparison.methods.index(method))
            values = [figure.factor * value for value in differences[method].values()]
            _draw_difference(axes, y, estimate, values, figure.factor, color)
        name_axes(axes, names, "", f"difference ({figure.unit.format(unit=comparison.loss_unit)})")
        axes.spines["left"].set_visible(False)

    data: list[Sequence[Any]] = [("method", "seed", "difference", "low", "high")]
    for method, estimate in estimates.items():
        for seed, value in differences[method].items():
            data.append((method, seed, value, "", ""))
        data.append((method, "mean", estimate.mean, estimate.low, estimate.high))
    return make_plot(
        figure.key,
        figure.title.format(Measure=comparison.measure.capitalize()),
        draw,
        caption=(
            f"After the last round, minus {comparison.baseline} with the same seed. Dot and line: "
            "mean and 95 % t interval; ticks: the seeds."
        ),
        data=data,
        height=0.8 + max(0.42, 0.2 * most_lines) * len(estimates),
    )


def _split_label(method: str) -> str:
    """Put each setting of a method on its own line, without the section of run settings."""
    return re.sub(r"[:;](\w+\.)?", "\n", method)


def _draw_difference(
    axes: Axes,
    y: int,
    estimate: MeanEstimate,
    values: Sequence[float],
    factor: float,
    color: str,
) -> None:
    if estimate.low is not None and estimate.high is not None:
        ends = [factor * estimate.low, factor * estimate.high]
        axes.plot(ends, [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
    ticks = [y + 0.22] * len(values)
    axes.plot(values, ticks, linestyle="none", marker="|", markersize=6, color=color)
    axes.plot([factor * estimate.mean], [y], marker="o", markersize=6.5, color=color)


# ── by client ─────────────────────────────────────────────────────────────────────────────────────


def client_plot(comparison: Comparison, clients: Sequence[str]) -> Plot | None:
    """Plot each client's exact match on its own examples: means over seeds, one dot per method."""
    means = client_means(comparison, clients)
    if len(clients) < 2 or not means:
        return None
    shown = clients[:MAX_CLIENTS]

    def draw(axes: Axes) -> None:
        # A thin line per client guides the eye.
        for y in range(len(shown)):
            axes.axhline(y, color=GRID, linewidth=0.5)
        for position, method in enumerate(comparison.methods):
            _draw_client_dots(axes, means, shown, method, position)
        name_axes(axes, shown, "client", f"{comparison.measure} (%)")

    data: list[Sequence[Any]] = [("client", "method", "exact_match", "loss", "seeds")]
    for client in clients:
        for method in comparison.methods:
            if (client, method) in means:
                data.append((client, method, *means[client, method]))
    legend = []
    for position, method in enumerate(comparison.methods):
        shape = "ring" if color_cycle(position) else "dot"
        legend.append(Key(method, method_color(position), shape))
    note = omitted_note(shown, clients)
    return make_plot(
        "by-client",
        "By client",
        draw,
        caption=f"Each client's own held-out examples after the last round, mean over seeds.{note}",
        data=data,
        height=0.75 + 0.3 * len(shown),
        legend=legend,
    )


def client_means(
    comparison: Comparison, clients: Sequence[str]
) -> dict[tuple[str, str], tuple[float, float, int]]:
    """Return mean exact match, mean loss and number of seeds, by (client, method)."""
    means = {}
    for method in comparison.methods:
        runs = comparison.runs_of(method)
        for client in clients:
            scores = [run.by_client[client] for run in runs if client in run.by_client]
            if scores:
                exact_match = sum(score[0] for score in scores) / len(scores)
                loss = sum(score[1] for score in scores) / len(scores)
                means[client, method] = (exact_match, loss, len(scores))
    return means


def _draw_client_dots(
    axes: Axes,
    means: Mapping[tuple[str, str], tuple[float, float, int]],
    shown: Sequence[str],
    method: str,
    position: int,
) -> None:
    """Draw one method's dots, one per client."""
    x = []
    y = []
    for row, client in enumerate(shown):
        if (client, method) in means:
            x.append(100 * means[client, method][0])
            y.append(row)
    if not x:
        return
    axes.plot(
        x,
        y,
        linestyle="none",
        marker="o",
        markersize=6,
        color=method_color(position),
        markerfacecolor=PAPER if color_cycle(position) else method_color(position),
        alpha=0.9,
    )
