"""The page of a run, `report.html`: a single self-contained file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.formats.scores import NO_EXAMPLES, LabelCounts
from fedmomentum.formats.withheld import describe_withheld
from fedmomentum.report.figures import aggregation, cost, scores
from fedmomentum.report.figures.benchmarks import benchmark_plots
from fedmomentum.report.figures.lines import present
from fedmomentum.report.figures.svg import Plot
from fedmomentum.report.html import render, write_page
from fedmomentum.results.formatting import count, human_bytes, percent, shorten
from fedmomentum.results.participation import REASON_LENGTH, find_absences
from fedmomentum.results.run_results import RunResults
from fedmomentum.results.summary import (
    SummaryRow,
    find_base_round,
    find_federated_round,
    natural_order,
    summarize_run,
    total_seconds,
)

# Names and values, for a table with two columns.
Facts = list[tuple[str, str]]
# The most clients with missing updates to list at once; the others unfold.
MAX_ABSENCES = 12


@dataclass(frozen=True)
class Participant:
    """A client in a row of the rounds table; `reason` says why its update is missing."""

    name: str
    weight: float | None
    num_examples: int | None
    first_loss: float | None
    last_loss: float | None
    reason: str | None
    is_accepted: bool


@dataclass(frozen=True)
class LabelRow:
    """A row of a classifier's label table."""

    name: str
    base: LabelCounts | None
    federated: LabelCounts | None


@dataclass(frozen=True)
class RoundRow:
    """A row of the rounds table."""

    record: RoundRecord
    participants: list[Participant]
    failures: list[Participant]
    seconds: float


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run directory, with reproducible bytes.

    Returns:
        The page's path.

    Raises:
        ModelError: If the directory or a required file is missing.
        DataError: If a file is damaged.
    """
    run_dir = Path(run_dir)
    content = _content(RunResults.load(run_dir))
    page = render("page.html.j2", {**content, "title_tag": "h1"}, _embedded_csv)
    return write_page(run_dir / "report.html", page)


def report_section(run: RunResults) -> str:
    """Return the content of `report.html` as a section for another page."""
    return render("run.html.j2", {**_content(run), "title_tag": "h2"}, _embedded_csv)


def _embedded_csv(plot: Plot) -> str:
    return "data:text/csv;charset=utf-8," + quote(plot.csv)


def _content(run: RunResults) -> dict[str, Any]:
    """Return the data for the template."""
    rounds = run.rounds
    num_done = rounds[-1].round
    is_finished = num_done >= run.plan.num_rounds
    summary = summarize_run(rounds)
    absences = find_absences(rounds, run.partition)
    withheld = rounds[-1].withheld
    return {
        "run": run,
        "withheld": withheld,
        "left_out": "" if withheld is None else describe_withheld(withheld),
        "method": run.plan.method.partition("(")[0],
        "num_clients": run.plan.num_clients,
        "done": num_done,
        "planned": run.plan.num_rounds,
        "total": summary[0],
        "groups": [
            ("category", _named_categories(summary)),
            ("client", [row for row in summary if row.group == "client"]),
        ],
        "measure": (summary[0].federated or summary[0].base or NO_EXAMPLES).measure,
        "labels": _label_rows(summary[0]),
        "before": find_base_round(rounds),
        "after": find_federated_round(rounds),
        "best": _best_round(rounds),
        "uplink": sum(sum(record.uplink_bytes.values()) for record in rounds),
        "downlink": sum(sum(record.downlink_bytes.values()) for record in rounds),
        "elapsed": sum(total_seconds(record) for record in rounds),
        "rounds": [_round_row(record) for record in rounds if record.round > 0 or record.failures],
        "absences": absences[:MAX_ABSENCES],
        "more_absences": absences[MAX_ABSENCES:],
        "num_failures": sum(len(record.failures) for record in rounds),
        "plan": _plan_facts(run),
        "environment": _environment_facts(run.environment),
        "version": rounds[-1].version,
        "commands": _commands(
            run.name,
            finished=is_finished,
            client=_example_client(run),
            is_classifier=bool(run.plan.labels),
            is_served=run.is_served,
        ),
        **_plots(run, summary),
    }


def score_plots(rounds: Sequence[RoundRecord]) -> list[Plot]:
    """Return the curves of scores and losses over the rounds."""
    return present(
        scores.exact_match_plot(rounds),
        scores.macro_f1_plot(rounds),
        scores.evaluation_loss_plot(rounds),
        scores.train_loss_plot(rounds),
    )


def _plots(run: RunResults, summary: Sequence[SummaryRow]) -> dict[str, list[Plot]]:
    """Return the figures by section."""
    # A run without categories has a single unnamed one.
    by_category = None
    if _named_categories(summary):
        by_category = scores.intervals_plot(summary, "category", "By category")
    by_client = scores.intervals_plot(summary, "client", "By client")
    return {
        "interval_plots": present(by_category, by_client),
        "benchmark_plots": benchmark_plots(run.benchmarks) if run.benchmarks else [],
        "score_plots": score_plots(run.rounds),
        "method_plots": aggregation.aggregation_plots(run.rounds),
        "movement_plots": aggregation.movement_plots(run.rounds),
        "cost_plots": [*cost.traffic_plots(run.rounds), *present(cost.seconds_plot(run.rounds))],
        "partition_plots": present(
            cost.partition_plot(run.partition, "train"),
            cost.partition_plot(run.partition, "test"),
        ),
    }


def _named_categories(summary: Sequence[SummaryRow]) -> list[SummaryRow]:
    return [row for row in summary if row.group == "category" and row.name]


def _label_rows(total: SummaryRow) -> list[LabelRow]:
    """Return both models' scores for each label of a classifier; empty for a language model."""
    before = total.base.by_label if total.base else {}
    after = total.federated.by_label if total.federated else {}
    names = sorted(before.keys() | after.keys(), key=natural_order)
    return [LabelRow(name, before.get(name), after.get(name)) for name in names]


def _best_round(rounds: Sequence[RoundRecord]) -> int | None:
    best = None
    for record in rounds:
        if record.is_best and record.round > 0:
            best = record.round
    return best


def _round_row(record: RoundRecord) -> RoundRow:
    # Clients that were sampled, and those whose evaluation failed.
    rows = []
    names = {*record.participants, *record.failures}
    for name in sorted(names, key=natural_order):
        training = record.clients.get(name)
        failure = record.failures.get(name)
        participant = Participant(
            name=name,
            weight=record.weights.get(name),
            num_examples=record.num_examples.get(name),
            first_loss=training.first_loss if training else None,
            last_loss=training.last_loss if training else None,
            reason=None if failure is None else shorten(failure, REASON_LENGTH),
            is_accepted=name in record.accepted,
        )
        rows.append(participant)
    # The former are counted, and the failures of both are listed.
    participants = [one for one in rows if one.name in record.participants]
    failures = [one for one in rows if one.reason is not None]
    return RoundRow(record, participants, failures, total_seconds(record))


def _plan_facts(run: RunResults) -> Facts:
    plan = run.plan
    trained = count(plan.num_trained)
    if plan.num_trained and plan.num_parameters:
        trained += f" ({percent(plan.num_trained / plan.num_parameters, 2)})"
    labels = [("Labels", shorten(", ".join(plan.labels), REASON_LENGTH))] if plan.labels else []
    facts = [
        ("Model", plan.model),
        *labels,
        ("Method", plan.method),
        ("Learned", plan.objective),
        ("Optimizer state", plan.optimizer_state),
        ("Clients, rounds", f"{count(plan.num_clients)}, {count(plan.num_rounds)}"),
        ("Privacy", plan.privacy),
        ("Parameters", count(plan.num_parameters)),
        ("Trained on each client", trained),
        ("Adapted modules", "; ".join(plan.adapted)),
        ("Not adapted", "; ".join(plan.not_adapted)),
        ("Planned up, a client and round", human_bytes(plan.uplink_bytes)),
        ("Planned down, a client and round", human_bytes(plan.downlink_bytes)),
        ("Planned memory", human_bytes(plan.memory_bytes)),
        ("Planned disk", human_bytes(plan.disk_bytes)),
    ]
    return [(name, value) for name, value in facts if value]


def _environment_facts(environment: dict[str, Any]) -> Facts:
    """Return individual facts, then those in tables."""
    # Individual facts.
    facts = []
    for name, value in environment.items():
        if not isinstance(value, dict):
            facts.append((name, str(value)))

    # Tables, such as library versions.
    for value in environment.values():
        if isinstance(value, dict):
            facts += [(name, str(one)) for name, one in value.items()]
    return facts


def _example_client(run: RunResults) -> str | None:
    """Return a client to use in example commands; None if all clients share one model."""
    checkpoint = run.checkpoint
    if checkpoint is None or checkpoint.run is None or not checkpoint.personal:
        return None
    return min(checkpoint.run.held, default="NAME")


def _commands(
    name: str, *, finished: bool, client: str | None, is_classifier: bool, is_served: bool
) -> list[tuple[str, str]]:
    """Return titled commands for using the run, ready to paste into a shell.

    Args:
        name: The run's directory.
        finished: Whether all rounds are done.
        client: One of the clients, if each has its own model.
        is_classifier: Whether the model predicts labels instead of generating text.
        is_served: Whether the clients were on other machines; the base model may not be on this
            one, so the commands have a placeholder for its directory.
    """
    options = [] if client is None else ["--client", client]
    resume = ["run", f"{name}/config.toml", "--resume", "--out", name]
    if is_served:
        options += ["--base", "BASE-DIRECTORY"]
        resume = ["serve", f"{name}/config.toml", "--resume", "--out", name, "--keys", "KEYS"]
    use = shlex.join(["fedmomentum", "generate", name, *options]) + ' --prompt "..."'
    if is_classifier:
        use = shlex.join(["fedmomentum", "evaluate", name, *options]) + " --data FILE"
    export = ["export", name, *options]
    commands = {
        "Merged model, loads anywhere": [*export, "--to", "merged", "--out", f"{name}-merged"],
        "Adapter for the base model": [*export, "--to", "adapter", "--out", f"{name}-adapter"],
        "Resume after an interruption" if finished else "Finish this run": resume,
    }
    lines = [("Try the model", use)]
    for purpose, arguments in commands.items():
        lines.append((purpose, shlex.join(["fedmomentum", *arguments])))
    return lines
