"""Figures of bytes, seconds, and the division of examples among the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedmomentum.report.figures.curves import (
    MAX_MARKED_ROUNDS,
    color_of,
    marker_of,
    name_axes,
    round_axes,
)
from fedmomentum.report.figures.lines import MAX_BARS, Rounds, category_label, omitted_note
from fedmomentum.report.figures.svg import PAPER, SERIES, SOFT, Key, Plot, make_plot
from fedmomentum.results.formatting import byte_unit, second_unit
from fedmomentum.results.summary import natural_order, seconds_by_phase

TRAFFIC_CAPTION = "Payload bytes of all clients together."
# Legend for partitions with more categories than colors.
RANK_LABELS = ["its largest", "2nd", "3rd", "4th", "5th", "6th", "all its others"]
PARTITION_TITLES = {"train": "Training examples", "test": "Test examples"}

# Category -> number of examples.
Counts = Mapping[str, int]


def traffic_plots(rounds: Rounds) -> list[Plot]:
    """Plot the bytes up and down, by round and cumulative."""
    uplink = np.array([sum(record.uplink_bytes.values()) for record in rounds], dtype=float)
    downlink = np.array([sum(record.downlink_bytes.values()) for record in rounds], dtype=float)
    if not uplink.any() and not downlink.any():
        return []
    return [
        _traffic_by_round(rounds, uplink, downlink),
        _traffic_so_far(rounds, uplink, downlink),
    ]


def _traffic_by_round(rounds: Rounds, uplink: Any, downlink: Any) -> Plot:
    are_many = len(rounds) > MAX_MARKED_ROUNDS

    def draw(axes: Axes) -> None:
        factor, unit = byte_unit(max(uplink.max(), downlink.max()))
        positions = np.array([record.round for record in rounds])
        if are_many:
            axes.plot(positions, uplink / factor, color=SERIES[0], linewidth=1.4)
            axes.plot(positions, downlink / factor, color=SERIES[1], linewidth=1.4)
        else:
            # Two bars side by side, up and down.
            axes.bar(positions - 0.2, uplink / factor, 0.38, color=SERIES[0])
            axes.bar(positions + 0.2, downlink / factor, 0.38, color=SERIES[1])
        round_axes(axes, f"all clients ({unit})", from_zero=True)

    data: list[Sequence[Any]] = [("round", "client", "uplink_bytes", "downlink_bytes")]
    for record in rounds:
        clients = record.uplink_bytes.keys() | record.downlink_bytes.keys()
        for client in sorted(clients, key=natural_order):
            up = record.uplink_bytes.get(client, 0)
            down = record.downlink_bytes.get(client, 0)
            data.append((record.round, client, up, down))
    shape = "thick" if are_many else "bar"
    legend = (
        Key("up, clients to server", SERIES[0], shape),
        Key("down, server to clients", SERIES[1], shape),
    )
    return make_plot(
        "bytes", "Bytes by round", draw, caption=TRAFFIC_CAPTION, data=data, legend=legend
    )


def _traffic_so_far(rounds: Rounds, uplink: Any, downlink: Any) -> Plot:
    numbers = [record.round for record in rounds]
    uplink_sum = np.cumsum(uplink)
    downlink_sum = np.cumsum(downlink)

    def draw(axes: Axes) -> None:
        factor, unit = byte_unit(max(uplink.sum(), downlink.sum()))
        for values, color, marker in (
            (uplink_sum, SERIES[0], "o"),
            (downlink_sum, SERIES[1], "s"),
        ):
            axes.plot(
                numbers,
                values / factor,
                color=color,
                linewidth=2.2,
                marker=marker_of(numbers, marker),
                markersize=4,
            )
        round_axes(axes, f"so far ({unit})", from_zero=True)

    sums = zip(numbers, uplink_sum.astype(int), downlink_sum.astype(int), strict=True)
    data: list[Sequence[Any]] = [("round", "uplink_bytes", "downlink_bytes"), *sums]
    legend = (Key("up", SERIES[0], "thick"), Key("down", SERIES[1], "thick"))
    return make_plot(
        "bytes-sum", "Bytes so far", draw, caption=TRAFFIC_CAPTION, data=data, legend=legend
    )


def seconds_plot(rounds: Rounds) -> Plot | None:
    """Plot the time by phase, stacked."""
    seconds = [seconds_by_phase(record) for record in rounds]
    phases = list(dict.fromkeys(phase for by_phase in seconds for phase in by_phase))
    if not phases:
        return None
    numbers = [record.round for record in rounds]
    # One row per round, one column per phase.
    rows = []
    for by_phase in seconds:
        rows.append([by_phase.get(phase, 0.0) for phase in phases])
    times = np.array(rows)

    def draw(axes: Axes) -> None:
        factor, unit = second_unit(times.sum(axis=1).max())
        # Each phase is stacked on the previous one.
        bottom = np.zeros(len(numbers))
        for position in range(len(phases)):
            top = bottom + times[:, position] / factor
            color = color_of(position)
            if len(numbers) > MAX_MARKED_ROUNDS:
                axes.fill_between(numbers, bottom, top, step="mid", color=color, linewidth=0)
            else:
                heights = top - bottom
                axes.bar(numbers, heights, 0.7, bottom, color=color, edgecolor=PAPER, linewidth=0.5)
            bottom = top
        round_axes(axes, f"time ({unit})", from_zero=True)

    data: list[Sequence[Any]] = [("round", *phases)]
    for server_round, row in zip(numbers, times.tolist(), strict=True):
        data.append((server_round, *row))
    return make_plot(
        "seconds",
        "Time by phase",
        draw,
        caption="Wall-clock time of each round by what it was spent on.",
        data=data,
        legend=[Key(phase, color_of(k), "bar") for k, phase in enumerate(phases)],
    )


# ── who has which data ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Bars:
    """Stacked bars: labels and colors by segment, `lengths[segment][client]`, and a note."""

    labels: list[str]
    colors: list[str]
    lengths: list[list[int]]
    note: str = ""


def partition_plot(clients: Mapping[str, Mapping[str, Counts]], split: str) -> Plot | None:
    """Plot how many examples of each category each client has.

    Args:
        clients: Client -> split -> category -> number of examples.
        split: `train` or `test`; categories have the same colors in both.
    """
    # Count everything, but draw only the first clients.
    counts = {}
    for client in sorted(clients, key=natural_order):
        counts[client] = clients[client].get(split, {})
    num_examples = sum(sum(by_category.values()) for by_category in counts.values())
    if num_examples == 0:
        return None
    shown = list(counts)[:MAX_BARS]

    # Colors stand for categories or, if there are too many, for ranks within each client.
    totals = _totals_by_category(clients)
    if len(totals) <= len(SERIES):
        bars = _bars_by_category(totals, [counts[client] for client in shown])
    else:
        bars = _bars_by_rank(totals, [counts[client] for client in shown])

    def draw(axes: Axes) -> None:
        # Each category begins where the previous one ends.
        left = np.zeros(len(shown))
        for color, lengths in zip(bars.colors, bars.lengths, strict=True):
            axes.barh(
                range(len(shown)),
                lengths,
                0.72,
                left,
                color=color,
                edgecolor=PAPER,
                linewidth=0.6,
            )
            left += np.array(lengths)
        name_axes(axes, shown, "client", "examples")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))

    legend = []
    for label, color in zip(bars.labels, bars.colors, strict=True):
        legend.append(Key(label, color, "bar"))
    note = bars.note + omitted_note(shown, list(counts))
    return make_plot(
        f"partition-{split}",
        PARTITION_TITLES[split],
        draw,
        caption=f"Examples of each client by category, {num_examples:,} in all.{note}",
        data=_partition_data(counts, totals),
        height=0.75 + 0.26 * len(shown),
        legend=legend,
    )


def _totals_by_category(clients: Mapping[str, Mapping[str, Counts]]) -> dict[str, int]:
    """Return the examples of each category over all clients and splits."""
    totals: dict[str, int] = {}
    for splits in clients.values():
        for by_category in splits.values():
            for category, num_examples in by_category.items():
                totals[category] = totals.get(category, 0) + num_examples
    return totals


def _bars_by_category(totals: Counts, shown: Sequence[Counts]) -> _Bars:
    """Return bars with one color per category, largest category first."""
    by_size = sorted(totals, key=lambda name: (-totals[name], natural_order(name)))
    lengths = []
    for category in by_size:
        lengths.append([counts.get(category, 0) for counts in shown])
    labels = [category_label(category) for category in by_size]
    return _Bars(labels, list(SERIES[: len(labels)]), lengths)


def _bars_by_rank(totals: Counts, shown: Sequence[Counts]) -> _Bars:
    """Return bars of each client's categories by size, which show its skew with few colors."""
    num_named = len(RANK_LABELS) - 1
    lengths: list[list[int]] = [[] for _ in RANK_LABELS]
    for counts in shown:
        by_size = sorted(counts.values(), reverse=True) + num_named * [0]
        for rank in range(num_named):
            lengths[rank].append(by_size[rank])
        lengths[-1].append(sum(by_size[num_named:]))
    note = f" With {len(totals)} categories, colors distinguish a client's largest from its next."
    return _Bars(RANK_LABELS, [*SERIES[:num_named], SOFT], lengths, note)


def _partition_data(counts: Mapping[str, Counts], totals: Counts) -> list[Sequence[Any]]:
    data: list[Sequence[Any]] = [("client", "category", "examples")]
    categories = sorted(totals, key=natural_order)
    for client, by_category in counts.items():
        for category in categories:
            if by_category.get(category):
                data.append((client, category, by_category[category]))
    return data
