"""Axes of the figures."""

import pytest
from matplotlib.figure import Figure

from fedmomentum.report.figures.curves import limit_percent, round_axes


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
