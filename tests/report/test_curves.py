"""Axes of the figures."""

import pytest
from matplotlib.figure import Figure

from fedmomentum.report.figures.aggregation import aggregation_plots
from fedmomentum.report.figures.cost import seconds_plot, traffic_plots
from fedmomentum.report.figures.curves import MAX_MARKED_ROUNDS, limit_percent, round_axes
from fedmomentum.report.page import score_plots
from tests.report.folders import records, row


@pytest.mark.parametrize(
    "values, wanted",
    [
        ([97.0, 99.9, 100.0], (96.0, 102.0)),
        ([0.0, 1.0, 100.0], (-2.0, 102.0)),
        ([120.0, 141.0], (118.0, 143.0)),  # mean factors can be longer than the sum
        ([90.0, 130.0], (87.0, 133.0)),
        ([0.0, 0.0], (-0.5, 1.0)),
    ],
)
def test_an_axis_of_percentages_holds_all_values_and_is_not_upside_down(values, wanted):
    axes = Figure().add_subplot()
    axes.plot(range(len(values)), values)
    round_axes(axes, "energy kept (%)")
    limit_percent(axes)
    bottom, top = axes.get_ylim()
    assert wanted[0] <= bottom <= min(values) and max(values) <= top <= wanted[1]


@pytest.mark.parametrize(("num_rounds", "are_bars"), [(MAX_MARKED_ROUNDS, True), (300, False)])
def test_marks_of_many_rounds_do_not_run_into_each_other(num_rounds, are_bars):
    """Thin bars side by side mix their colors, and points hide the curves behind them."""
    rows = [row(t, ["a", "b"], ["x"]) for t in range(num_rounds)]
    rounds = records([one | {"residual_norm": None, "diagnostics": None} for one in rows])
    plots = [*traffic_plots(rounds), seconds_plot(rounds), *score_plots(rounds)]
    plots += aggregation_plots(rounds)
    for plot in plots:
        num_marks = plot.svg.count("<use ") + plot.svg.count("<path ")
        assert (num_marks > num_rounds) == are_bars, plot.key
    shapes = {plot.key: {key.shape for key in plot.legend} for plot in plots}
    assert shapes["bytes"] == ({"bar"} if are_bars else {"thick"})
