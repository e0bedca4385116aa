"""Figures of scores and losses over the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.formats.scores import NO_EXAMPLES, Score
from fedmomentum.report.figures.curves import (
    MAX_CLIENT_CURVES,
    Curve,
    curves_legend,
    draw_curves,
    finite,
    limit_percent,
    name_axes,
    round_axes,
)
from fedmomentum.report.figures.lines import MAX_BARS, Rounds, Texts, omitted_note
from fedmomentum.report.figures.svg import GRID, INK, PAPER, SERIES, SOFT, Key, Plot, make_plot
from fedmomentum.results.summary import SummaryRow, natural_order, scored

# Up to this many bars are drawn with more space.
ROOMY_BARS = 20


def intervals_plot(summary: Sequence[SummaryRow], group: str, title: str) -> Plot | None:
    """Plot base and federated exact match with intervals, one line per group."""
    # Groups that were evaluated, starting with the total.
    lines = []
    for row in summary:
        if row.group in {"total", group} and (row.base or row.federated):
            lines.append(row)
    if len(lines) < 2:
        return None
    shown = lines[:MAX_BARS]
    total = summary[0].federated or summary[0].base or NO_EXAMPLES

    def draw(axes: Axes) -> None:
        # Two intervals per group, with the base model's on top.
        for y, row in enumerate(shown):
            draw_interval(axes, y - 0.16, row.base, color=SOFT, face=PAPER)
            draw_interval(axes, y + 0.16, row.federated, color=SERIES[0], face=SERIES[0])
        # A line separates the total from the groups.
        axes.axhline(0.5, color=GRID, linewidth=0.8)
        names = [row.name for row in shown]
        name_axes(axes, names, group, f"{total.measure} (%), 95 % interval")
        axes.set_xlim(-1, min(101.0, 1.04 * axes.dataLim.x1 + 1))
        axes.spines["left"].set_visible(False)

    data: list[Sequence[Any]] = [
        ("group", "name", "model", "items", "exact", "exact_match", "low", "high", "loss")
    ]
    for row in lines:
        for model, score in (("base", row.base), ("federated", row.federated)):
            if score is not None:
                cells = (*_exact_match_cells(score), score.loss)
                data.append((row.group, row.name, model, *cells))
    note = omitted_note(shown, lines)
    bar_height = 0.36 if len(shown) <= ROOMY_BARS else 0.29
    return make_plot(
        f"intervals-{group}",
        title,
        draw,
        caption=f"{_fraction(total)}, with its 95 % Wilson interval.{note}",
        data=data,
        height=0.75 + bar_height * len(shown),
        legend=(Key("base model", SOFT, "ring"), Key("federated", SERIES[0], "dot")),
    )


def draw_interval(axes: Axes, y: float, score: Score | None, *, color: str, face: str) -> None:
    """Draw a score as a point with its interval; draw nothing for None."""
    if score is None:
        return
    low, high = score.interval
    axes.plot([100 * low, 100 * high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
    axes.plot(
        [100 * score.exact_match],
        [y],
        marker="o",
        markersize=6,
        markerfacecolor=face,
        markeredgecolor=color,
        markeredgewidth=1.5,
        zorder=3,
        clip_on=False,
    )


def exact_match_plot(rounds: Rounds) -> Plot | None:
    """Plot the exact match by round, on all examples and on each client's."""
    totals = _total_scores(rounds)
    if not totals:
        return None
    evaluated_rounds = [server_round for server_round, _ in totals]
    band = 100 * np.array([score.interval for _, score in totals])
    curve = [(server_round, 100 * score.exact_match) for server_round, score in totals]
    clients = _client_curves(rounds, lambda score: 100 * score.exact_match)
    measure = totals[0][1].measure

    def draw(axes: Axes) -> None:
        # The interval for all examples goes behind the curves.
        low, high = band[:, 0], band[:, 1]
        axes.fill_between(evaluated_rounds, low, high, color=INK, alpha=0.12, linewidth=0)
        if len(evaluated_rounds) == 1:
            # An area over a single round has no width.
            ends = 2 * evaluated_rounds
            axes.plot(ends, band[0], color=INK, alpha=0.3, linewidth=5, solid_capstyle="butt")
        draw_curves(axes, curve, clients)
        round_axes(axes, f"{measure} (%)")
        limit_percent(axes)

    data: list[Sequence[Any]] = [
        ("round", "client", "items", "exact", "exact_match", "low", "high")
    ]
    for record in rounds:
        for client, score in _all_scores(record).items():
            data.append((record.round, client, *_exact_match_cells(score)))
    note = _uneven_note(score for _, score in totals)
    shade = "shaded" if len(clients) <= MAX_CLIENT_CURVES else "shaded dark"
    return make_plot(
        "exact-match",
        f"{measure.capitalize()} by round",
        draw,
        caption=f"{_fraction(totals[0][1])}; {shade}, the 95 % interval over all examples.{note}",
        data=data,
        legend=curves_legend("all examples", clients),
    )


def macro_f1_plot(rounds: Rounds) -> Plot | None:
    """Plot a classifier's macro F1 by round, on all examples and on each client's."""
    totals = _total_scores(rounds)
    curve = finite((server_round, _percent_f1(score)) for server_round, score in totals)
    if not curve:
        return None
    # The page shows the curves; the CSV has the numbers of all rounds and clients.
    clients = _client_curves(rounds, _percent_f1)
    data: list[Sequence[Any]] = [("round", "client", "items", "macro_f1")]
    for record in rounds:
        for client, score in _all_scores(record).items():
            data.append((record.round, client, score.num_examples, score.macro_f1))
    texts = Texts(
        "macro-f1",
        "Macro F1 by round",
        "macro F1 (%)",
        "Mean of the labels' F1, each label counted once; a client's over the labels that it has.",
    )
    return _loss_plot(texts, "all examples", curve, clients, data)


def _percent_f1(score: Score) -> float | None:
    return None if score.macro_f1 is None else 100 * score.macro_f1


def _fraction(score: Score) -> str:
    """Return the unit that exact match is a fraction of."""
    if score.is_of_pairs:
        return "Fraction of pairs whose chosen answer has the larger reward"
    how = "whose label is predicted" if score.by_label else "answered exactly"
    return f"Fraction of examples {how}"


def evaluation_loss_plot(rounds: Rounds) -> Plot | None:
    """Plot the loss on the test examples by round, overall and for each client."""
    curve = finite((server_round, score.loss) for server_round, score in _total_scores(rounds))
    clients = _client_curves(rounds, lambda score: score.loss)
    data: list[Sequence[Any]] = [("round", "client", "items", "tokens", "nll", "loss")]
    for record in rounds:
        for client, score in _all_scores(record).items():
            cells = (score.num_examples, score.num_tokens, score.nll, score.loss)
            data.append((record.round, client, *cells))
    texts = Texts(
        "loss", "Test loss by round", _loss_label(rounds), "Mean loss on the test examples."
    )
    return _loss_plot(texts, "all examples", curve, clients, data)


def train_loss_plot(rounds: Rounds) -> Plot | None:
    """Plot the training loss by round: the weighted mean and each client's."""
    curve = finite((record.round, record.train_loss) for record in rounds)
    clients = _empty_curves(rounds)
    data: list[Sequence[Any]] = [
        ("round", "client", "loss", "first_loss", "last_loss", "steps", "tokens")
    ]
    for record in rounds:
        if record.train_loss is not None:
            data.append((record.round, "", record.train_loss, "", "", "", ""))
        for client, training in record.clients.items():
            clients[client] += finite([(record.round, training.loss)])
            losses = (training.loss, training.first_loss, training.last_loss)
            data.append((record.round, client, *losses, training.num_steps, training.num_tokens))
    texts = Texts(
        "train-loss",
        "Training loss by round",
        _loss_label(rounds),
        "Mean loss of the local steps, while they were taken; the clients weighted as in the "
        "aggregation.",
    )
    return _loss_plot(texts, "weighted mean", curve, clients, data)


def _loss_label(rounds: Rounds) -> str:
    """Return the label of an axis of losses."""
    totals = _total_scores(rounds)
    score = totals[0][1] if totals else NO_EXAMPLES
    return f"loss ({score.loss_unit})"


def _loss_plot(
    texts: Texts,
    main_label: str,
    curve: Curve,
    clients: dict[str, Curve],
    data: list[Sequence[Any]],
) -> Plot | None:
    if not curve and not any(clients.values()):
        return None

    def draw(axes: Axes) -> None:
        draw_curves(axes, curve, clients)
        round_axes(axes, texts.axis_label)

    legend = curves_legend(main_label, clients)
    return make_plot(texts.key, texts.title, draw, caption=texts.caption, data=data, legend=legend)


# ── values ────────────────────────────────────────────────────────────────────────────────────────


def _total_scores(rounds: Rounds) -> list[tuple[int, Score]]:
    """Return the score on all examples of every evaluated round."""
    totals = []
    for record in rounds:
        score = scored(record.evaluation.total) if record.evaluation else None
        if score is not None:
            totals.append((record.round, score))
    return totals


def _all_scores(record: RoundRecord) -> dict[str, Score]:
    """Return a round's scores: overall under the empty name, then each client's."""
    if record.evaluation is None:
        return {}
    scores = {}
    for name, score in (("", record.evaluation.total), *record.evaluation.by_client.items()):
        if scored(score) is not None:
            scores[name] = score
    return scores


def _client_scores(record: RoundRecord) -> Mapping[str, Score]:
    return record.evaluation.by_client if record.evaluation else {}


def _client_curves(rounds: Rounds, value_of: Callable[[Score], float | None]) -> dict[str, Curve]:
    curves = _empty_curves(rounds)
    for record in rounds:
        for client, score in _client_scores(record).items():
            if scored(score) is not None:
                curves[client] += finite([(record.round, value_of(score))])
    return curves


def _empty_curves(rounds: Rounds) -> dict[str, Curve]:
    """Return an empty curve for every client that ever trained or was evaluated.

    All figures show the same clients, so that each has the same color everywhere.
    """
    names: set[str] = set()
    for record in rounds:
        names.update(record.clients)
        names.update(_client_scores(record))
    return {name: [] for name in sorted(names, key=natural_order)}


def _exact_match_cells(score: Score) -> tuple[float, ...]:
    """Return items, exact, exact_match, low, high, for the CSV."""
    interval = score.interval
    return (score.num_examples, score.num_exact, score.exact_match, *interval)


def _uneven_note(scores: Iterable[Score]) -> str:
    """Return a sentence for the caption if rounds are scored on different examples."""
    sizes = sorted({score.num_examples for score in scores})
    if len(sizes) == 1:
        return ""
    return f" A round's score is over {sizes[0]:,} to {sizes[-1]:,} examples."
