"""Figures of what aggregation kept, dropped and moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from fedmomentum.formats.round_record import Diagnostics, PerFactor, RoundRecord
from fedmomentum.report.figures.curves import Curve, finite, marker_of, round_axes
from fedmomentum.report.figures.lines import (
    Band,
    Line,
    Rounds,
    Texts,
    ValueOf,
    lines_plot,
    metric_plot,
    present,
    scaled,
)
from fedmomentum.report.figures.svg import SERIES, Key, Plot, make_plot

# A logarithmic axis cannot show smaller numbers, which count as zero.
SMALLEST_DRAWN_ERROR = 1e-300
# The largest exponent of a float64, where the axis must end.
LARGEST_EXPONENT = 307
# Where errors of exactly zero are drawn if there are no others.
DEFAULT_ZERO_ERROR = 1e-16


def aggregation_plots(rounds: Rounds) -> list[Plot]:
    """Plot what the method kept, merged and carried over, and how exact it was."""
    energy = Texts(
        "retained-energy",
        "Energy kept in the adapter",
        "energy kept (%)",
        "Fraction of the squared singular values of the exact sum that stays in the adapter.",
    )
    rank = Texts(
        "residual-rank",
        "Residual rank",
        "rank",
        "Rank of what is merged into the base weights each round, mean over the modules.",
    )
    applied = Texts(
        "applied-share",
        "Applied fraction of the residual",
        "applied (%)",
        "Fraction of the merged residual that the model computes with, in its number format.",
    )
    return present(
        metric_plot(rounds, "retained_energy", energy, as_percent=True),
        metric_plot(rounds, "residual_rank", rank),
        _residual_norm_plot(rounds),
        _exactness_plot(rounds),
        metric_plot(rounds, "applied_share", applied, as_percent=True),
    )


def movement_plots(rounds: Rounds) -> list[Plot]:
    """Plot how the effective weights and the factors moved; docs/metrics.md has the formulas."""
    return present(
        _update_cosine_plot(rounds),
        _client_drift_plot(rounds),
        _subspace_angle_plot(rounds),
        _factor_norms_plot(rounds),
    )


def _update_cosine_plot(rounds: Rounds) -> Plot | None:
    texts = Texts(
        "update-cosine",
        "Direction of the update",
        "cosine",
        "Cosine of a round's change of the weights with that of the round before, and with each "
        "client's own change.",
    )
    lines = [
        Line("with the round before", "update_cosine", _update_cosine, SERIES[0]),
        Line("with a client's, mean", "client_cosine_mean", _client_cosine("mean"), SERIES[1]),
    ]
    band = Band(
        "with a client's, least to greatest",
        low=Line("", "client_cosine_min", _client_cosine("min"), SERIES[1]),
        high=Line("", "client_cosine_max", _client_cosine("max"), SERIES[1]),
    )
    return lines_plot(rounds, texts, lines, band=band)


def _client_drift_plot(rounds: Rounds) -> Plot | None:
    texts = Texts(
        "client-drift",
        "Client drift",
        "relative distance",
        "Mean distance of the clients' changes from their weighted mean, relative to its norm; 0 "
        "where all agree.",
    )
    lines = [Line("drift", "client_drift", _client_drift, SERIES[0])]
    return lines_plot(rounds, texts, lines, from_zero=True)


def _subspace_angle_plot(rounds: Rounds) -> Plot | None:
    texts = Texts(
        "subspace-angle",
        "Turning of the adapter",
        "angle (degrees)",
        "Mean principal angle between successive adapters: of their row spaces (A) and column "
        "spaces (B).",
    )
    lines = [
        Line("A (row space)", "subspace_angle_A", _subspace_angle("A"), SERIES[0]),
        Line("B (column space)", "subspace_angle_B", _subspace_angle("B"), SERIES[1]),
    ]
    return lines_plot(rounds, texts, lines, from_zero=True)


def _factor_norms_plot(rounds: Rounds) -> Plot | None:
    texts = Texts(
        "factor-norms",
        "Size of the factors",
        "norm",
        "Frobenius norm over all modules: the weighted mean of what the clients sent, and what "
        "they are sent next.",
    )
    lines = []
    for when, shape in (("before", "dashed"), ("after", "thick")):
        for factor, color in (("A", SERIES[0]), ("B", SERIES[1])):
            column = f"factor_norms_{when}_{factor}"
            lines.append(Line(f"{factor} {when}", column, _factor_norm(when, factor), color, shape))
    return lines_plot(rounds, texts, lines, from_zero=True)


# ── values of a round ─────────────────────────────────────────────────────────────────────────────


def _update_cosine(record: RoundRecord) -> float | None:
    return record.diagnostics.update_cosine if record.diagnostics else None


def _client_drift(record: RoundRecord) -> float | None:
    return record.diagnostics.client_drift if record.diagnostics else None


def _client_cosine(statistic: str) -> ValueOf:
    def value_of(record: RoundRecord) -> float | None:
        cosines = record.diagnostics.client_cosine if record.diagnostics else None
        return getattr(cosines, statistic) if cosines else None

    return value_of


def _subspace_angle(factor: str) -> ValueOf:
    def value_of(record: RoundRecord) -> float | None:
        return _side(record.diagnostics.subspace_angle if record.diagnostics else None, factor)

    return value_of


def _factor_norm(when: str, factor: str) -> ValueOf:
    def value_of(record: RoundRecord) -> float | None:
        norms = _factor_norms(record.diagnostics, when)
        return _side(norms, factor)

    return value_of


def _factor_norms(diagnostics: Diagnostics | None, when: str) -> PerFactor | None:
    if diagnostics is None or diagnostics.factor_norms is None:
        return None
    norms = diagnostics.factor_norms
    return norms.before if when == "before" else norms.after


def _side(sides: PerFactor | None, factor: str) -> float | None:
    if sides is None:
        return None
    return sides.A if factor == "A" else sides.B


# ── figures of their own form ─────────────────────────────────────────────────────────────────────


def _residual_norm_plot(rounds: Rounds) -> Plot | None:
    """Plot the norms of the residual and of what is carried over, relative to the sum."""
    residual = finite((record.round, scaled(record.residual_norm, 100)) for record in rounds)
    carried = finite((record.round, scaled(record.carried_norm, 100)) for record in rounds)
    if not any(value for _, value in carried):
        # By default, nothing is ever carried over.
        carried = []
    if not residual and not carried:
        return None

    def draw(axes: Axes) -> None:
        if residual:
            axes.plot(
                *zip(*residual, strict=True),
                color=SERIES[0],
                linewidth=2.2,
                marker=marker_of(residual),
                markersize=4,
            )
        if carried:
            axes.plot(
                *zip(*carried, strict=True),
                color=SERIES[1],
                linewidth=1.8,
                linestyle="--",
                marker=marker_of(carried, "s"),
                markersize=4,
            )
        round_axes(axes, "norm (% of the sum's)", from_zero=True)

    legend = []
    if residual:
        legend.append(Key("residual, merged into the base", SERIES[0], "thick"))
    if carried:
        legend.append(Key("carried into the next round", SERIES[1], "dashed"))
    data: list[Sequence[Any]] = [("round", "residual_norm", "carried_norm")]
    for record in rounds:
        data.append((record.round, record.residual_norm, record.carried_norm))
    return make_plot(
        "residual-norm",
        "Residual norm",
        draw,
        caption="Frobenius norm of what left the adapter, relative to that of the exact sum.",
        data=data,
        legend=legend,
    )


def _exactness_plot(rounds: Rounds) -> Plot | None:
    """Plot the exactness error on a logarithmic axis, with zeros below all other values."""
    values = [(record.round, record.exactness_error) for record in rounds]
    curve = finite(values)
    if not curve:
        return None
    positive = [(server_round, value) for server_round, value in curve if _is_positive(value)]
    zero_rounds = [server_round for server_round, value in curve if not _is_positive(value)]

    def draw(axes: Axes) -> None:
        _draw_exactness(axes, positive, zero_rounds)

    legend = []
    if positive:
        legend.append(Key("error", SERIES[0], "thick"))
    if zero_rounds:
        legend.append(Key("exactly zero", SERIES[1], "down"))
    return make_plot(
        "exactness",
        "Exactness error",
        draw,
        caption=(
            "Relative distance between the weights the clients load next and the exact weighted "
            "sum."
        ),
        data=[("round", "exactness_error"), *values],
        legend=legend,
    )


def _is_positive(error: float) -> bool:
    return error > SMALLEST_DRAWN_ERROR


def _draw_exactness(axes: Axes, positive: Curve, zero_rounds: list[int]) -> None:
    # Zeros go one decade below the smallest error.
    smallest = min((value for _, value in positive), default=DEFAULT_ZERO_ERROR)
    floor = 10.0 ** (math.floor(math.log10(smallest)) - 1)
    axes.set_yscale("log")
    if positive:
        axes.plot(
            *zip(*positive, strict=True),
            color=SERIES[0],
            linewidth=2.2,
            marker=marker_of(positive),
            markersize=4,
        )
    axes.plot(
        zero_rounds,
        [floor] * len(zero_rounds),
        color=SERIES[1],
        linestyle="none",
        marker="v",
        markersize=7,
        clip_on=False,
    )
    round_axes(axes, "relative error (log scale)")

    # The axis spans whole decades, so that at least two are labeled.
    drawn = [value for _, value in positive]
    if zero_rounds:
        drawn.append(floor)
    first_exponent = math.floor(math.log10(min(drawn)))
    last_exponent = min(LARGEST_EXPONENT, math.floor(math.log10(max(drawn))) + 1)
    axes.set_ylim(10.0**first_exponent, 10.0**last_exponent)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _format_power(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def _format_power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")
