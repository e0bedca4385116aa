"""Tables for the terminal: a run's plan, rounds and summary; comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from fedmomentum.cli.columns import name_column, number_columns
from fedmomentum.formats.scores import NO_EXAMPLES, Score
from fedmomentum.results.formatting import (
    count,
    human_bytes,
    human_seconds,
    mean_and_interval,
    mean_and_spread,
    number,
    percent,
    points,
    target_percent,
    with_interval,
)
from fedmomentum.results.summary import total_seconds
from fedmomentum.utils.process import describe_waiting
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.data.tokenized import TokenizedClient
    from fedmomentum.formats.plan import MemoryUse, Plan, WorkerPlan
    from fedmomentum.formats.round_record import RoundRecord
    from fedmomentum.formats.scores import Score
    from fedmomentum.results.comparison import Comparison
    from fedmomentum.results.method_summary import MethodSummary
    from fedmomentum.results.run_results import RunResults
    from fedmomentum.results.summary import SummaryRow


MAX_ABSENCES = 12
"""The most clients with missing updates to list at the end of a run; the report lists all."""
MAX_CATEGORIES = 8
"""The most categories with their own column in the partition table: what fits in a terminal."""
MAX_WORKER_CLIENTS = 5
"""The most clients per worker that the plan lists; plan.json lists all."""
MAX_LABELS = 20
"""The most labels of a classifier that the plan lists; plan.json lists all."""
MAX_CLIENTS = 40
"""The most clients with their own row in the partition table: a screenful."""
NUM_EXTREMES = 6
"""If there are many categories or clients, how many of those with the least and most gain to
show."""
ROUND_COLUMNS = (
    "round",
    "train loss",
    "loss",
    "exact match",
    "kept energy",
    "exactness",
    "up",
    "down",
    "seconds",
)
SCORE_COLUMN = ROUND_COLUMNS.index("exact match")
"""The column whose header is given by the score, `Score.measure`."""


# ── a run ──

OPTIMIZER_PHRASES = {
    "fresh": "fresh in every round",
    "shared": "starts a round with the clients' mean moments",
    "shared-full": "starts a round with the clients' mean moments, sent in full",
    "local": "starts a round with the client's own moments",
}
"""How the plan describes each `training.optimizer-state`."""


def plan_table(plan: Plan, out: Path) -> Table:
    """Return the table of a run's plan, for the run's directory `out`."""
    import torch  # already loaded by now, but not needed for `--help`

    rows = {
        "model": f"{plan.model}: {count(plan.num_parameters)} parameters, "
        f"{count(plan.num_trained)} trained",
        "adapted": "; ".join(plan.adapted),
        "not adapted": "; ".join(plan.not_adapted),
        "method": plan.method,
        "optimizer": OPTIMIZER_PHRASES.get(plan.optimizer_state, plan.optimizer_state),
        "learned": plan.objective,
        "rounds": f"{plan.num_rounds} with {plan.num_clients} clients",
        "privacy": plan.privacy,
        "traffic": f"per client and round: {human_bytes(plan.uplink_bytes)} up, at most "
        f"{human_bytes(plan.downlink_bytes)} down",
        "device": plan.device,
        "workers": "; ".join(_worker_text(worker) for worker in plan.workers),
        "CPU threads": f"{torch.get_num_threads()} ({describe_waiting()})",
        **_memory_rows(plan),
        "disk": f"at most {human_bytes(plan.disk_bytes)} in {out}",
    }
    if plan.labels:
        rows["labels"] = _label_list(plan.labels)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in rows.items():
        if text:
            table.add_row(Text(name, style="bold"), Text(text))
    return table


def _worker_text(worker: WorkerPlan) -> str:
    """Return a worker's device and clients: `cuda:1: south, west`."""
    shown = list(worker.clients[:MAX_WORKER_CLIENTS])
    num_more = len(worker.clients) - len(shown)
    more = f" and {num_more} more" if num_more else ""
    return f"{worker.device}: {', '.join(shown)}{more}"


def _memory_rows(plan: Plan) -> dict[str, str]:
    """Return the plan's memory estimates, for the host and for GPUs."""
    if plan.host_memory is None:
        return {"memory": f"about {human_bytes(plan.memory_bytes)}"}
    texts = {"host memory": _memory_text(plan.host_memory, 1)}
    if plan.device_memory is None:
        return texts
    # A device that is listed twice holds two copies of the model.
    models_on = Counter(worker.device for worker in plan.workers)
    for device, num_models in models_on.items():
        texts[f"{device} memory"] = _memory_text(plan.device_memory, num_models)
    if not models_on:
        texts["device memory"] = _memory_text(plan.device_memory, 1)
    return texts


def _memory_text(use: MemoryUse, num_times: int) -> str:
    """Format a memory use, multiplied by `num_times`, for each phase."""
    phases = {
        "at rest": use.at_rest,
        "in loading": use.loading,
        "in training": use.training,
        "in evaluation": use.evaluating,
        "in aggregation": use.aggregating,
    }
    listed = ", ".join(f"{human_bytes(num_times * size)} {name}" for name, size in phases.items())
    return f"about {human_bytes(num_times * use.peak)}: {listed}"


def _label_list(labels: Mapping[str, int | None]) -> str:
    """Return a classifier's labels, with numbers of training examples if known."""
    shown = []
    for label, num_examples in list(labels.items())[:MAX_LABELS]:
        number_text = "" if num_examples is None else f" ({count(num_examples)})"
        shown.append(printable(label, 60) + number_text)
    num_more = len(labels) - len(shown)
    more = f" and {num_more} more" if num_more else ""
    return f"{len(labels)}: {', '.join(shown)}{more}"


def partition_table(clients: Sequence[TokenizedClient]) -> Table:
    """Return a table of examples by client and category; combine small categories if many."""
    totals: Counter[str] = Counter()
    for client in clients:
        totals.update(client.train.categories)
    by_size = sorted(totals, key=lambda category: (-totals[category], category))
    categories = by_size[:MAX_CATEGORIES]
    has_others = len(by_size) > len(categories)

    columns = [Column(escape(name or "examples"), overflow="fold") for name in categories]
    others_column = ["others"] if has_others else []
    table = Table(name_column("client"), *columns, *others_column, "all", "held out")
    for client in clients[:MAX_CLIENTS]:
        counts = Counter(client.train.categories)
        cells = [counts[category] for category in categories]
        if has_others:
            cells.append(len(client.train) - sum(cells))
        cells += [len(client.train), len(client.test)]
        table.add_row(Text(client.client_id), *map(str, cells))
    if len(clients) > MAX_CLIENTS:
        table.add_row(f"... {len(clients) - MAX_CLIENTS} more")
    return table


def round_cells(record: RoundRecord) -> list[str]:
    """Return a round's cells for `ROUND_COLUMNS`; empty where it has no value."""
    loss = ""
    exact_match = ""
    if record.evaluation is not None:
        score = record.evaluation.total
        loss = number(score.loss if score.num_tokens else None)
        exact_match = f"{percent(score.exact_match)} of {score.num_examples}"
        if score.macro_f1 is not None:
            exact_match += f", macro F1 {percent(score.macro_f1)}"
        if score.is_of_pairs:
            exact_match += f", margin {number(score.mean_margin)}"
    error = record.exactness_error
    energy = record.retained_energy
    return [
        f"{record.round} *" if record.is_best else f"{record.round}",
        number(record.train_loss) if record.train_loss is not None else "",
        loss,
        exact_match,
        percent(energy, 2) if energy is not None else "",
        f"{error:.0e}" if error is not None else "",
        human_bytes(sum(record.uplink_bytes.values())),
        human_bytes(sum(record.downlink_bytes.values())),
        f"{total_seconds(record):.0f}",
    ]


def summary_table(results: RunResults) -> Table:
    """Return a table of base and federated scores: exact match in %, 95 % intervals, and loss."""
    from fedmomentum.results.summary import summarize_run

    rows = summarize_run(results.rounds)
    total = rows[0].federated or rows[0].base or NO_EXAMPLES
    table = Table(
        name_column(),
        *number_columns("base", "federated", "change", "loss"),
        title=f"{total.measure.capitalize()} on held-out examples, % [95 % interval]",
    )
    if total.by_label:
        macro_f1 = [_macro_f1(score) for score in (rows[0].base, rows[0].federated)]
        table.caption = f"macro F1: {' -> '.join(macro_f1)}"
    if total.is_of_pairs:
        margins = [_margin(score) for score in (rows[0].base, rows[0].federated)]
        table.caption = f"mean margin: {' -> '.join(margins)}. The base is its own reference"
    for _, group in groupby(rows, key=lambda row: row.group):
        _add_group(table, list(group))
        table.add_section()
    return table


def _macro_f1(score: Score | None) -> str:
    return "-" if score is None or score.macro_f1 is None else percent(score.macro_f1)


def _margin(score: Score | None) -> str:
    return "-" if score is None or score.margin is None else number(score.mean_margin)


def _add_group(table: Table, rows: Sequence[SummaryRow]) -> None:
    """Add the rows of a group, or if there are many, those with the least and most gain."""
    with_change = [row for row in rows if row.change is not None]
    max_rows = 2 * NUM_EXTREMES
    if len(with_change) <= max_rows:
        for row in rows:
            table.add_row(*_summary_cells(row))
        return
    by_change = sorted(with_change, key=lambda row: row.change or 0.0)
    for row in by_change[:NUM_EXTREMES]:
        table.add_row(*_summary_cells(row))
    table.add_row(Text(f"... {len(rows) - max_rows} more, in the report", style="dim"))
    for row in by_change[-NUM_EXTREMES:]:
        table.add_row(*_summary_cells(row))


def _summary_cells(row: SummaryRow) -> list[Text | str]:
    is_total = row.group == "total"
    name = Text("all", style="bold") if is_total else Text(row.name)
    losses = [_loss_cell(row.base), _loss_cell(row.federated)]
    return [
        name,
        _measure_cell(row.base),
        _measure_cell(row.federated),
        points(row.change),
        " -> ".join(losses),
    ]


def _loss_cell(measure: Score | None) -> str:
    return "-" if measure is None or measure.loss is None else number(measure.loss)


def _measure_cell(measure: Score | None) -> Text:
    return Text("-" if measure is None else with_interval(measure.exact_match, measure.interval))


def absence_lines(results: RunResults) -> list[Text]:
    """Return warnings about clients with missing updates; if many, only those missing most."""
    from fedmomentum.results.participation import find_absences

    all_absences = find_absences(results.rounds, results.partition)
    lines = []
    for absence in all_absences[:MAX_ABSENCES]:
        is_severe = absence.is_total or absence.num_too_large
        headline = (f"left out: {absence.headline}", "bold red" if is_severe else "bold yellow")
        detail = f"\n  round {absence.last_round}: {absence.reason}"
        lines.append(Text.assemble(headline, detail))
    num_more = len(all_absences) - MAX_ABSENCES
    if num_more > 0:
        lines.append(Text(f"... and {num_more} more clients, in the report", style="yellow"))
    return lines


# ── a comparison of methods ──


def gap_lines(comparison: Comparison) -> list[Text]:
    """Return warnings about what is missing from a comparison; if there is much, the first."""
    from fedmomentum.results.comparison_gaps import find_gaps

    gaps = find_gaps(comparison)
    lines = [Text(printable(gap), style="yellow") for gap in gaps[:MAX_ABSENCES]]
    if len(gaps) > MAX_ABSENCES:
        lines.append(Text(f"... and {len(gaps) - MAX_ABSENCES} more, on the page", style="yellow"))
    return lines


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """Yield tables of scores, differences from the baseline, and costs to reach the target."""
    from fedmomentum.results.method_summary import summarize_methods

    summaries = summarize_methods(comparison)
    yield _scores_table(summaries, comparison)
    if len(comparison.methods) > 1:
        yield _differences_table(summaries, comparison)
    yield _cost_table(summaries, comparison)


def _scores_table(summaries: Sequence[MethodSummary], comparison: Comparison) -> Table:
    """Return a table of each method's last and best scores."""
    table = Table(
        name_column(),
        *number_columns(f"{comparison.measure}, last", "best", "loss, last", "best"),
        title="Held-out examples of all clients: mean ± standard deviation over seeds",
        caption="best: over the rounds, on the examples that every evaluation has",
        caption_justify="left",
    )
    for summary in summaries:
        num_seeds = len(summary.seeds)
        table.add_row(
            _method_name(summary, comparison.baseline),
            mean_and_spread(summary.exact_match, 100, 1, num_seeds=num_seeds),
            mean_and_spread(summary.best_exact_match, 100, 1),
            mean_and_spread(summary.loss, 1, 3, num_seeds=num_seeds),
            mean_and_spread(summary.best_loss, 1, 3),
        )
    return table


def _differences_table(summaries: Sequence[MethodSummary], comparison: Comparison) -> Table:
    """Return a table of each method's paired differences from the baseline."""
    baseline = comparison.baseline
    title = f"Difference to {baseline}, paired by seed, [95 % t-interval]"
    columns = number_columns("seeds", f"{comparison.measure}, points", "loss")
    table = Table(name_column(), *columns, title=Text(title))
    for summary in summaries:
        if summary.method == baseline:
            continue
        difference = summary.loss_difference
        table.add_row(
            _method_name(summary, comparison.baseline),
            str(difference.count if difference else 0),
            mean_and_interval(summary.exact_match_difference, 100, 1),
            mean_and_interval(difference, 1, 3),
        )
    return table


def _cost_table(summaries: Sequence[MethodSummary], comparison: Comparison) -> Table:
    """Return a table of the rounds, bytes and time until each method reaches the target."""
    table = Table(
        name_column(),
        *number_columns("reached by", "rounds", "sent, both ways", "time"),
        title=f"To {target_percent(comparison.target)} {comparison.measure}",
    )
    for summary in summaries:
        num_bytes = summary.bytes_to_target
        seconds = summary.seconds_to_target
        table.add_row(
            _method_name(summary, comparison.baseline),
            f"{summary.reached} of {len(summary.seeds)}",
            mean_and_spread(summary.rounds_to_target, 1, 1),
            human_bytes(num_bytes.mean) if num_bytes else "–",
            human_seconds(seconds.mean) if seconds else "–",
        )
    return table


def _method_name(summary: MethodSummary, baseline: str) -> Text:
    return Text(summary.method, style="bold" if summary.method == baseline else "")
