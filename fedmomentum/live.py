"""What a run shows in the terminal: its plan, its progress, its table. Reads what it is told; decides nothing."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from fedmomentum.client import Client
from fedmomentum.report import Measure, Run, SummaryRow, absences, summarise
from fedmomentum.report.text import count, human_bytes, number, percent, points
from fedmomentum.run import Plan
from fedmomentum.terminal import log_handler

LOG = logging.getLogger("fedmomentum")
MOST_ABSENCES = 12
"""Clients that the terminal names at a run's end because their updates are missing."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries' progress bars and advice off the terminal; errors still show."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, they warn where a process is started
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Live:
    """The live view of a run: a bar for the rounds, a bar for who is training, a row for every round done.

    Where the output is no terminal, plain lines: one a round.
    """

    def __init__(self, console: Console, num_rounds: int) -> None:
        self._console = console
        self._num_rounds = num_rounds
        self._handler = log_handler(console)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self._rounds = self._progress.add_task("rounds", total=num_rounds, note="")
        self._step = self._progress.add_task("", total=1, note="", visible=False)
        self._table = Table(
            "round", "train loss", "loss", "exact match", "kept energy", "exactness", "up", "down", "seconds",
            caption="* lowest held-out loss so far", caption_justify="left",
        )  # fmt: skip
        self._interrupted = False
        self._live = RichLive(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Live:
        LOG.addHandler(self._handler)
        LOG.propagate = False
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        LOG.removeHandler(self._handler)
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._interrupted = True
        if callable(self._before):  # whoever listened before wants to know too
            self._before(signum, frame)
        raise KeyboardInterrupt

    def stop_if_asked(self) -> None:
        """Ctrl-C once more: where it came, a library may have caught it."""
        if self._interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Leave the last state on the screen."""
        self._progress.update(self._step, visible=False)
        self._live.stop()

    def say(self, text: str) -> None:
        """A line about what is being done before the rounds."""
        self._console.print(Text(text, style="dim"))

    def show_plan(self, plan: Plan, clients: Sequence[Client], out: Path) -> None:
        """What the run will cost, before it starts."""
        self._console.print(plan_table(plan, out))
        self._console.print(_partition_table(clients))
        for warning in plan.warnings:
            self._console.print(Text(f"note: {warning}", style="yellow"), soft_wrap=True)
        for client in clients:
            cut = client.train.num_truncated + client.train.num_lost
            if cut:
                self._console.print(
                    Text(f"note: {client.client_id}: {client.train.num_truncated} examples cut short, "
                         f"{client.train.num_lost} lost their whole answer", style="yellow"), soft_wrap=True,
                )  # fmt: skip

    def on_step(self, client: str, step: int, steps: int, loss: float) -> None:
        """A training step of a client."""
        self.stop_if_asked()
        self._progress.update(
            self._step, description=f"  {client}", completed=step, total=steps, note=f"loss {loss:.3f}", visible=True
        )

    def exchange(self, done: int, asked: int, note: str) -> None:
        """How many of those asked over a network have answered."""
        self._progress.update(self._step, description="  answers", completed=done, total=asked, note=note, visible=True)

    def observe(self, event: str, facts: Mapping[str, Any]) -> None:
        """An event of `run_rounds`."""
        self.stop_if_asked()
        if event == "round":
            if self._console.is_terminal and not self._live.is_started:
                self._live.start()
                self._live.update(Group(self._table, self._progress))
            note = f"{len(facts['participants'])} clients" if facts["round"] else "untouched model"
            self._progress.update(self._rounds, completed=max(0, facts["round"] - 1), note=note)
        elif event == "evaluate":
            self._progress.update(self._step, description="  evaluating", total=None, note="", visible=True)
        elif event == "aggregate":
            self._progress.update(
                self._step, description="  aggregating", completed=facts["done"], total=facts["total"], note="modules",
                visible=True,
            )  # fmt: skip
        elif event == "row":
            self._progress.update(self._rounds, completed=facts["round"])
            cells = _cells(facts)
            self._table.add_row(*cells)
            if not self._console.is_terminal:
                names = [str(column.header) for column in self._table.columns]
                told = ", ".join(f"{n} {c}" for n, c in zip(names, cells, strict=True) if c)
                self._console.print(Text(told), soft_wrap=True)


def plan_table(plan: Plan, out: Path) -> Table:
    """A run's plan."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in (
        ("model", f"{plan.model}: {count(plan.num_parameters)} parameters, {count(plan.num_trained)} trained"),
        ("method", plan.method),
        ("rounds", f"{plan.num_rounds} with {plan.num_clients} clients"),
        ("traffic", f"per client and round: {human_bytes(plan.uplink_bytes)} up, at most "
                    f"{human_bytes(plan.downlink_bytes)} down"),
        ("memory", f"about {human_bytes(plan.memory_bytes)}"),
        ("disk", f"at most {human_bytes(plan.disk_bytes)} in {out}"),
    ):  # fmt: skip
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    score = (row["evaluation"] or {}).get("total", {})
    error = row["exactness_error"]
    return [
        f"{row['round']}{' *' if row['is_best'] else ''}",
        number(row["train_loss"]) if row["train_loss"] is not None else "",
        number(score["loss"]) if score else "",
        f"{percent(score['exact_match'])} of {score['num_examples']}" if score else "",
        percent(row["retained_energy"], 2) if row["retained_energy"] is not None else "",
        f"{error:.0e}" if error is not None else "",
        human_bytes(sum(row["uplink_bytes"].values())),
        human_bytes(sum(row["downlink_bytes"].values())),
        f"{sum(row['seconds'].values()):.0f}",
    ]


def _partition_table(clients: Sequence[Client]) -> Table:
    """Examples a client and category; the smaller categories together where there are many."""
    counts: dict[str, int] = {}
    for client in clients:
        for category in client.train.categories:
            counts[category] = counts.get(category, 0) + 1
    shown = sorted(counts, key=lambda c: (-counts[c], c))[:8]
    more = ["others"] if len(counts) > len(shown) else []
    names = [Column(escape(category or "examples"), overflow="fold") for category in shown]
    table = Table("client", *names, *more, "all", "held out")
    for client in clients[:40]:
        held = [client.train.categories.count(category) for category in shown]
        others = [str(len(client.train) - sum(held))] if len(counts) > len(shown) else []
        table.add_row(Text(client.client_id), *map(str, held), *others, str(len(client.train)), str(len(client.test)))
    if len(clients) > 40:
        table.add_row(f"... {len(clients) - 40} more")
    return table


def summary_table(run: Run) -> Table:
    """Untouched against federated: exact match in percent with 95 % intervals, and loss.

    Of many categories or clients the six that gained least and the six that gained most.
    """
    table = Table(
        Column("", overflow="fold"),
        *(Column(name, no_wrap=True) for name in ("untouched", "federated", "change", "loss")),
        title="Exact match on held-out examples, % [95 % interval]",
    )
    for row in _shortened(table, summarise(run.rows)):
        losses = [number(m.loss) if m and m.loss is not None else "-" for m in (row.untouched, row.federated)]
        table.add_row(
            Text(row.name if row.group != "total" else "all", style="bold" if row.group == "total" else ""),
            _measure(row.untouched), _measure(row.federated), points(row.change), " -> ".join(losses),
        )  # fmt: skip
    return table


def absence_lines(run: Run) -> list[Text]:
    """Return a warning for each client whose update is missing from a round; of many, for those missing most."""
    found = absences(run.rows, run.partition)
    lines = [
        Text.assemble(
            (f"left out: {one.headline}", "bold red" if one.is_total or one.num_too_large else "bold yellow"),
            f"\n  round {one.last_round}: {one.reason}",
        )
        for one in found[:MOST_ABSENCES]
    ]
    if len(found) > MOST_ABSENCES:
        lines.append(Text(f"... and {len(found) - MOST_ABSENCES} more clients, in the report", style="yellow"))
    return lines


def _shortened(table: Table, summary: Sequence[SummaryRow]) -> Iterator[SummaryRow]:
    """The rows to show, with a line between groups, and in a group's middle where it is left out."""
    for _, grouped in groupby(summary, key=lambda row: row.group):
        rows = list(grouped)
        ordered = sorted((row for row in rows if row.change is not None), key=lambda row: row.change or 0.0)
        if len(rows) > 12 and len(ordered) > 12:
            yield from ordered[:6]
            table.add_row(Text(f"... {len(rows) - 12} more, in the report", style="dim"))
            yield from ordered[-6:]
        else:
            yield from rows
        table.add_section()


def _measure(measure: Measure | None) -> Text:
    if measure is None:
        return Text("-")
    low, high = measure.interval
    return Text(f"{100 * measure.exact_match:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
