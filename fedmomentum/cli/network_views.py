"""The terminal views of a server and of a client in a federation over a network."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmomentum.cli.columns import name_column
from fedmomentum.cli.progress import RunView, progress_bar
from fedmomentum.cli.tables import plan_table
from fedmomentum.flower.node_callback import NodeCallback, TaskInfo, WorkerInfo
from fedmomentum.formats.status_file import STALE_SECONDS
from fedmomentum.results.formatting import human_bytes
from fedmomentum.server.callbacks import Callback
from fedmomentum.utils.terminal import log_handler
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.formats.plan import Plan
    from fedmomentum.formats.round_record import RoundRecord
    from fedmomentum.formats.status_file import ClientStatus, StatusFile


LOGGERS = (logging.getLogger("fedmomentum"), logging.getLogger("flwr"))
"""Loggers whose warnings are shown on a client's terminal; Flower's may quote the server."""
MAX_NAMES = 4
"""The most clients to name while waiting for replies: what fits on a line."""


class ServerView(Callback):
    """The server's view: clients that connect and leave, the plan, and the rounds.

    Args:
        console: Where to print.
        run_view: The view of the rounds, as in a run on one machine.
        out: The run's directory.
    """

    def __init__(self, console: Console, run_view: RunView, out: Path) -> None:
        self._console = console
        self._run_view = run_view
        self._out = out
        self._online: set[str] = set()
        self._missing: list[str] = []
        self._clients_with_task: set[str] = set()
        self._finished_clients: set[str] = set()

    # ── before a round ──

    def on_message(self, text: str) -> None:
        """Print a line about what the server is doing."""
        self._print(text)

    def on_nodes(self, registered: Sequence[str], online: Sequence[str]) -> None:
        """Print which clients have connected and which have left."""
        self._run_view.raise_if_interrupted()
        connected = set(online)
        for name in sorted(connected - self._online):
            self._print(f"{name} is connected")
        for name in sorted(self._online - connected):
            self._print(f"{name} is gone")
        self._online = connected

    def on_waiting(self, missing: Sequence[str], seconds: float) -> None:
        """Print which clients the server is waiting for, if they have changed."""
        self._run_view.raise_if_interrupted()
        if list(missing) != self._missing:
            self._missing = list(missing)
            names = ", ".join(self._missing) or "clients"
            self._print(f"Waiting up to {seconds:.0f} s for {names}")

    def on_plan(self, plan: Plan) -> None:
        """Print the plan."""
        self._run_view.raise_if_interrupted()
        self._console.print(plan_table(plan, self._out))
        for warning in plan.warnings:
            self._print(f"note: {warning}")

    # ── tasks and replies ──

    def on_task_sent(self, client: str, num_bytes: int, timeout: float) -> None:
        """Count a client that was sent a task."""
        self._clients_with_task.add(client)
        self._finished_clients.discard(client)
        self._show_replies()

    def on_reply(self, client: str, num_bytes: int) -> None:
        """Count a client that has replied."""
        self._clients_with_task.add(client)
        self._finished_clients.add(client)
        self._show_replies()

    def on_failure(self, client: str, reason: str) -> None:
        """Count a client that will not reply."""
        self.on_reply(client, 0)

    def on_late_reply(self, client: str) -> None:
        """Print that a reply arrived too late."""
        self._print(f"{client} answered too late; ignored")
        self._show_replies()

    def _show_replies(self) -> None:
        self._run_view.raise_if_interrupted()
        waiting = sorted(self._clients_with_task - self._finished_clients)
        note = f"waiting for {', '.join(waiting[:MAX_NAMES])}" if waiting else ""
        num_replies = len(self._finished_clients)
        self._run_view.show_replies(num_replies, len(self._clients_with_task), note)

    # ── rounds ──

    def on_round_begin(self, server_round: int, clients: Sequence[str]) -> None:
        """Start counting the replies of a round."""
        self._clients_with_task.clear()
        self._finished_clients.clear()
        self._run_view.on_round_begin(server_round, clients)

    def on_evaluate(self, clients: Sequence[str]) -> None:
        """Start counting the replies of an evaluation."""
        self._clients_with_task.clear()
        self._finished_clients.clear()
        self._run_view.on_evaluate(clients)

    def on_aggregate(self, num_done: int, num_modules: int) -> None:
        """Show how many modules have been aggregated."""
        self._run_view.on_aggregate(num_done, num_modules)

    def on_round_end(self, record: RoundRecord) -> None:
        """Add the round to the table."""
        self._run_view.on_round_end(record)

    def _print(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)


class NodeView(NodeCallback):
    """A client's view: its connection, its tasks, and the progress of its training.

    A context manager.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._log_handler = log_handler(console)
        self._progress = progress_bar(console, "  training", transient=True)
        self._bar = self._progress.add_task("", total=1, note="", visible=False)

    def __enter__(self) -> NodeView:
        self._previous = [
            (logger, list(logger.handlers), logger.propagate, logger.level) for logger in LOGGERS
        ]
        for logger in LOGGERS:
            logger.handlers = [self._log_handler]
            logger.propagate = False
            if logger.level != logging.DEBUG:
                logger.setLevel(logging.WARNING)
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()
        for logger, handlers, propagate, level in self._previous:
            logger.handlers = handlers
            logger.propagate = propagate
            logger.setLevel(level)

    def on_message(self, text: str) -> None:
        """Print what the worker is doing."""
        self._print(text)

    def on_warning(self, text: str) -> None:
        """Print a warning that concerns this client's data."""
        self._print(text, style="bold red")

    def on_ready(self, info: WorkerInfo) -> None:
        """Print what the worker has loaded."""
        base = (info.base_sha256 or "unknown")[:16]
        self._print(
            f"Ready: {info.num_train} examples to train on, {info.num_test} held out; "
            f"{info.num_parameters:,} parameters in {info.dtype}, base {base}"
        )

    def on_connected(self, server: str) -> None:
        """Print that the server has admitted this client."""
        self._print(f"Connected to {server}; waiting for tasks. Ctrl-C leaves")

    def on_connection_lost(self, reason: str, retry_seconds: float) -> None:
        """Print why the connection was lost and when the next attempt will be made."""
        self._print(f"Not connected: {reason}. Trying again in {retry_seconds:.0f} s")

    def on_task(self, task: TaskInfo, num_bytes: int) -> None:
        """Print which task has arrived."""
        received = human_bytes(num_bytes)
        self._print(f"Round {task.server_round}: asked to {task.kind} ({received} received)")

    def on_repeated_task(self, task: TaskInfo) -> None:
        """Print that the last task was repeated."""
        self._print(f"Round {task.server_round}: the same task again; sending the last reply again")

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Show a training step."""
        note = f"loss {loss:.3f}"
        self._progress.update(self._bar, visible=True, completed=step, total=num_steps, note=note)

    def on_task_done(self, task: TaskInfo, num_bytes: int, seconds: float) -> None:
        """Print how long a task took and the size of its reply."""
        sent = human_bytes(num_bytes)
        self._print(f"Round {task.server_round}: done in {seconds:.1f} s (sending {sent})")

    def on_task_failed(self, reason: str) -> None:
        """Print why a task has no reply."""
        self._print(f"The task failed: {reason}")

    def _print(self, text: str, style: str = "") -> None:
        self._progress.update(self._bar, visible=False)
        line = printable(text, 2000)  # partly from the server
        timed_line = Text(f"{time.strftime('%H:%M:%S')} {line}", style=style)
        self._console.print(timed_line, soft_wrap=True)


# ── fedmomentum status ──


def status_table(status: StatusFile, now: float) -> Table:
    """Return a table of the status of a run.

    Clients on this machine have no connection, so only a served run has a column for it.

    Args:
        status: The contents of its `status.json`.
        now: The time, in seconds since 1970.
    """
    has_ended = status.phase == "ended"
    is_stale = now - status.written > STALE_SECONDS
    online_column = ["online"] if status.networked else []
    table = Table(
        name_column("client"),
        *online_column,
        "state",
        "left",
        "rounds",
        "down",
        "up",
        "what went wrong",
        title=Text(printable(_status_title(status, now))),
    )
    for name, client in sorted(status.clients.items()):
        remaining = ""
        if client.until and not has_ended:
            remaining = f"{max(0, client.until - now):.0f} s"
        online = _online_cell(client)
        # the file lists the clients that were connected when it was written
        if has_ended:
            online = Text("")
        elif is_stale:
            online = Text("?")
        table.add_row(
            Text(printable(name, 80)),
            *([online] if status.networked else []),
            Text(printable(client.state, 80)),
            remaining,
            str(client.rounds),
            human_bytes(client.down_bytes),
            human_bytes(client.up_bytes),
            Text(printable(client.reason or "")),
        )
    return table


def _online_cell(client: ClientStatus) -> Text:
    return Text("yes") if client.connected else Text("no", style="yellow")


def _status_title(status: StatusFile, now: float) -> str:
    """Describe a run's phase, what it waits for, and whether the status is out of date."""
    has_ended = status.phase == "ended"
    age = now - status.written
    title = "before the first round"
    if status.round is not None:
        title = f"round {status.round} of {status.num_rounds}"
    title += f", {status.phase}"
    if status.waiting_for and status.waits_until and not has_ended:
        names = ", ".join(printable(name, 80) for name in status.waiting_for)
        title += f"; waiting {max(0, status.waits_until - now):.0f} s more for {names}"
    if has_ended and status.reason:
        title += f": {status.reason}"
    if status.version:
        title += f"; base version {status.version[:16]}"
    if age > STALE_SECONDS and not has_ended:
        writer = "server" if status.networked else "run"
        title += f"; written {age:.0f} s ago: the {writer} is busy, or gone"
    return title
