"""The terminal view of a run: its plan, progress bars, and a row for every round."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from fedmomentum.cli.tables import (
    ROUND_COLUMNS,
    SCORE_COLUMN,
    partition_table,
    plan_table,
    round_cells,
)
from fedmomentum.server.callbacks import Callback
from fedmomentum.utils.terminal import log_handler

if TYPE_CHECKING:
    from fedmomentum.data.tokenized import TokenizedClient
    from fedmomentum.formats.plan import Plan
    from fedmomentum.formats.round_record import RoundRecord


LOG = logging.getLogger("fedmomentum")


def progress_bar(console: Console, description: str, *, transient: bool = False) -> Progress:
    """Return a progress bar with a description, a count, a note and the elapsed time."""
    return Progress(
        TextColumn(description, markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=transient,
    )


class RunView(Callback):
    """The live view of a run, as a context manager.

    Shows a bar for the rounds, a bar for the current step, and a row for every finished round. If
    the output is not a terminal, prints a line per round instead.

    Args:
        console: Where to print.
        num_rounds: Number of rounds of the run.
    """

    def __init__(self, console: Console, num_rounds: int) -> None:
        self._console = console
        self._log_handler = log_handler(console)
        self._progress = progress_bar(console, "{task.description}")
        self._rounds_bar = self._progress.add_task("rounds", total=num_rounds, note="")
        self._step_bar = self._progress.add_task("", total=1, note="", visible=False)
        columns = [Column(name, overflow="fold") for name in ROUND_COLUMNS]
        self._table = Table(
            *columns, caption="* lowest held-out loss so far", caption_justify="left"
        )
        self._is_interrupted = False
        # Client -> its completed and total steps; several clients may train at once on run.devices.
        self._training: dict[str, tuple[int, int]] = {}
        self._live = Live(console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> RunView:
        LOG.addHandler(self._log_handler)
        LOG.propagate = False
        self._previous_handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        LOG.removeHandler(self._log_handler)
        signal.signal(signal.SIGINT, self._previous_handler)

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._is_interrupted = True
        if callable(self._previous_handler):
            self._previous_handler(signum, frame)
        raise KeyboardInterrupt

    def raise_if_interrupted(self) -> None:
        """Raise Ctrl-C again, since a library may have caught it.

        Raises:
            KeyboardInterrupt: If Ctrl-C was pressed.
        """
        if self._is_interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Leave the last state on the screen."""
        self._progress.update(self._step_bar, visible=False)
        self._live.stop()

    def show_plan(self, plan: Plan, clients: Sequence[TokenizedClient], out: Path) -> None:
        """Print what the run will cost and how many examples each client has."""
        self._console.print(plan_table(plan, out))
        self._console.print(partition_table(clients))
        for warning in plan.warnings:
            self._print_note(warning)
        for client in clients:
            num_truncated = client.train.num_truncated
            num_lost = client.train.num_lost
            if num_truncated + num_lost:
                self._print_note(
                    f"{client.client_id}: {num_truncated} examples are truncated, {num_lost} have "
                    "lost their entire answer"
                )

    def _print_note(self, text: str) -> None:
        self._console.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)

    def on_message(self, text: str) -> None:
        """Print a line about the preparations before the rounds."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def on_step(self, client: str, step: int, num_steps: int, loss: float) -> None:
        """Show a client's training step, combined with those of clients that train concurrently."""
        self._training[client] = (step, num_steps)
        num_done = sum(done for done, _ in self._training.values())
        num_all = sum(total for _, total in self._training.values())
        self._show_step(f"  {', '.join(self._training)}", num_done, num_all, f"loss {loss:.3f}")
        if step == num_steps:
            del self._training[client]

    def show_replies(self, num_replies: int, num_tasks: int, note: str) -> None:
        """Show how many clients have replied over a network."""
        self._show_step("  answers", num_replies, num_tasks, note)

    def on_round_begin(self, server_round: int, clients: Sequence[str]) -> None:
        """Show the bar of the rounds and how many clients train."""
        self.raise_if_interrupted()
        self._training.clear()  # may hold clients that failed
        if self._console.is_terminal and not self._live.is_started:
            self._live.start()
            self._live.update(Group(self._table, self._progress))
        note = f"{len(clients)} clients" if server_round else "base model"
        num_done = max(0, server_round - 1)
        self._progress.update(self._rounds_bar, completed=num_done, note=note)

    def on_evaluate(self, clients: Sequence[str]) -> None:
        """Show that the clients evaluate."""
        self._show_step("  evaluating", None, None, "")

    def on_aggregate(self, num_done: int, num_modules: int) -> None:
        """Show how many modules have been aggregated."""
        self._show_step("  aggregating", num_done, num_modules, "modules")

    def on_round_end(self, record: RoundRecord) -> None:
        """Add the round to the table; if the output is not a terminal, print it."""
        self.raise_if_interrupted()
        self._progress.update(self._rounds_bar, completed=record.round)
        cells = round_cells(record)
        self._table.add_row(*cells)
        evaluation = record.evaluation
        if evaluation is not None:
            self._table.columns[SCORE_COLUMN].header = evaluation.total.measure
        if not self._console.is_terminal:
            names = [str(column.header) for column in self._table.columns]
            named_cells = zip(names, cells, strict=True)
            line = ", ".join(f"{name} {cell}" for name, cell in named_cells if cell)
            self._console.print(Text(line), soft_wrap=True)

    def _show_step(
        self, description: str, completed: int | None, total: int | None, note: str
    ) -> None:
        self.raise_if_interrupted()
        self._progress.update(
            self._step_bar,
            description=description,
            completed=completed,
            total=total,
            note=note,
            visible=True,
        )
