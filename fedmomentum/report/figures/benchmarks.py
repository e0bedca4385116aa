"""Figures of standard benchmarks: base against federated model, and by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from fedmomentum.formats.benchmark_file import MetricScore
from fedmomentum.formats.scores import Score
from fedmomentum.report.figures.curves import (
    Curve,
    color_of,
    draw_curves,
    name_axes,
    round_axes,
)
from fedmomentum.report.figures.lines import MAX_BARS, omitted_note, present
from fedmomentum.report.figures.scores import draw_interval
from fedmomentum.report.figures.svg import PAPER, SERIES, SOFT, Key, Plot, make_plot
from fedmomentum.results.benchmarks import BenchmarkLine, BenchmarkResults


def benchmark_plots(results: BenchmarkResults) -> list[Plot]:
    """Return the figures of a run's benchmarks."""
    return present(_intervals_plot(results.newest), _rounds_plot(results.lines))


def _intervals_plot(lines: Sequence[BenchmarkLine]) -> Plot | None:
    """Plot base and federated scores with intervals, one line per task and metric."""
    if not lines:
        return None
    shown = lines[:MAX_BARS]

    def draw(axes: Axes) -> None:
        for y, line in enumerate(shown):
            draw_interval(axes, y - 0.16, _as_score(line.base), color=SOFT, face=PAPER)
            draw_interval(axes, y + 0.16, _as_score(line.score), color=SERIES[0], face=SERIES[0])
        # Put the metric below the task.
        names = [line.name.replace(", ", "\n", 1) for line in shown]
        name_axes(axes, names, "task", "answered right (%), 95 % interval")
        axes.set_xlim(-1, min(101.0, 1.04 * axes.dataLim.x1 + 1))
        axes.spines["left"].set_visible(False)

    data: list[Sequence[Any]] = [
        ("task", "metric", "client", "model", "items", "correct", "fraction", "low", "high")
    ]
    for line in lines:
        for model, score in (("base", line.base), ("federated", line.score)):
            if score is not None:
                cells = (score.num_examples, score.correct.count("1"), score.fraction)
                names = (line.task, score.name, line.model.client, model)
                data.append((*names, *cells, *score.interval))
    return make_plot(
        "benchmarks",
        "Base model against federated model",
        draw,
        caption=(
            "The fraction of a benchmark's examples that was answered right, with its 95 % Wilson "
            f"interval; the last round that was scored.{omitted_note(shown, lines)}"
        ),
        data=data,
        height=0.75 + 0.45 * len(shown),
        legend=(Key("base model", SOFT, "ring"), Key("federated", SERIES[0], "dot")),
    )


def _rounds_plot(lines: Sequence[BenchmarkLine]) -> Plot | None:
    """Plot each metric by round, starting with the base model; None if fewer than two rounds."""
    curves: dict[str, Curve] = {}
    data: list[Sequence[Any]] = [("round", "task", "metric", "client", "fraction")]
    for line in lines:
        if line.model.round is None:
            continue
        # Before the first round, the model is the base model.
        if line.name not in curves:
            start = [] if line.base is None else [(0, 100 * line.base.fraction)]
            curves[line.name] = start
        if line.model.round > 0 or line.base is None:
            curves[line.name].append((line.model.round, 100 * line.score.fraction))
        names = (line.task, line.score.name, line.model.client)
        data.append((line.model.round, *names, line.score.fraction))
    if len({line.model.round for line in lines}) < 2:
        return None
    # Every curve has its own color.
    drawn = dict(list(curves.items())[: len(SERIES)])

    def draw(axes: Axes) -> None:
        draw_curves(axes, [], drawn)
        round_axes(axes, "answered right (%)")

    return make_plot(
        "benchmark-rounds",
        "Benchmarks by round",
        draw,
        caption=(
            "The fraction of a benchmark's examples that was answered right; round 0 is the base "
            f"model.{omitted_note(list(drawn), list(curves))}"
        ),
        data=data,
        legend=[Key(name, color_of(position)) for position, name in enumerate(drawn)],
    )


def _as_score(score: MetricScore | None) -> Score | None:
    if score is None:
        return None
    return Score(0.0, 0, score.num_examples, score.correct.count("1"))
