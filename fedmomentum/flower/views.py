"""What the coordinator and the parties see in the terminal. Reads what it is told; decides nothing."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedmomentum.flower.status import FRESH_SECONDS
from fedmomentum.live import Live, plan_table, summary_table
from fedmomentum.names import directory_name
from fedmomentum.report import read_run, write_report
from fedmomentum.report.text import human_bytes
from fedmomentum.results import example_client
from fedmomentum.run import Plan
from fedmomentum.schema import printable
from fedmomentum.terminal import log_handler


class ServerView:
    """The coordinator's: who comes and goes, the plan, and the rounds as in a run on one machine."""

    def __init__(self, console: Console, live: Live, out: Path) -> None:
        self._console, self._live, self._out = console, live, out
        self._online: set[str] = set()
        self._missing: list[str] = []
        self._asked: set[str] = set()
        self._done: set[str] = set()

    def observe(self, event: str, facts: Mapping[str, Any]) -> None:
        """An event of `serve`."""
        self._live.stop_if_asked()
        if event == "listening":
            names = ", ".join(facts["registered"]) or "nobody yet (fedmomentum keys admit)"
            self._say(f"Listening on {facts['host']}:{facts['port']} (TLS). Admitted: {names}")
        elif event == "nodes":
            here = set(facts["online"])
            for name in sorted(here - self._online):
                self._say(f"{name} is connected")
            for name in sorted(self._online - here):
                self._say(f"{name} is gone")
            self._online = here
        elif event == "waiting":
            if facts["for"] != self._missing:
                self._missing = list(facts["for"])
                self._say(f"Waiting up to {facts['seconds']:.0f} s for {', '.join(self._missing) or 'clients'}")
        elif event == "plan":
            self._console.print(plan_table(Plan(**facts), self._out))
            for warning in facts["warnings"]:
                self._say(f"note: {warning}")
        elif event in ("sent", "answered", "failed", "late"):
            self._exchange(event, facts)
        else:
            if event in ("round", "evaluate"):
                self._asked, self._done = set(), set()
            self._live.observe(event, facts)

    def _exchange(self, event: str, facts: Mapping[str, Any]) -> None:
        client = facts["client"]
        if event == "sent":
            self._asked.add(client)
            self._done.discard(client)
        elif event == "late":
            self._say(f"{client} answered too late; ignored")
        else:
            self._done.add(client)
            self._asked.add(client)
        waiting = ", ".join(sorted(self._asked - self._done)[:4])
        self._live.exchange(len(self._done), len(self._asked), f"waiting for {waiting}" if waiting else "")

    def _say(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)


class NodeView:
    """A party's: connected or not, what is asked of it, and how far its training is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._handler = log_handler(console)
        self._progress = Progress(
            TextColumn("  training"), BarColumn(bar_width=30), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(), console=console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=1, note="", visible=False)

    def __enter__(self) -> NodeView:
        # ours and Flower's warnings, which may quote the server, go where everything else does
        self._before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in _LOGGERS]
        for logger in _LOGGERS:
            logger.handlers = [self._handler]
            logger.propagate = False
            logger.setLevel(logging.WARNING)
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._progress.stop()
        for logger, handlers, propagate, level in self._before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)

    def observe(self, event: str, facts: Mapping[str, Any]) -> None:
        """An event of `join`."""
        if event == "step":
            self._progress.update(
                self._task,
                visible=True,
                completed=facts["step"],
                total=facts["steps"],
                note=f"loss {facts['loss']:.3f}",
            )
            return
        self._progress.update(self._task, visible=False)
        if event in ("say", "warning"):
            text = facts["text"]
        elif event == "ready":
            text = (
                f"Ready: {facts['num_train']} examples to train on, {facts['num_test']} held out; "
                f"{facts['num_parameters']:,} parameters in {facts['dtype']}, base {facts['base_sha256'][:16]}"
            )
        elif event == "connected":
            text = f"Connected to {facts['server']}; waiting for tasks. Ctrl-C leaves"
        elif event == "lost":
            text = f"Not connected: {facts['reason']}. Trying again in {facts['seconds']:.0f} s"
        elif event == "task":
            text = f"Round {facts['round']}: asked to {facts['kind']} ({human_bytes(facts['bytes'])} came)"
        elif event == "done":
            text = f"Round {facts['round']}: done in {facts['seconds']:.1f} s ({human_bytes(facts['bytes'])} go)"
        elif event == "again":
            text = f"Round {facts['round']}: asked the same again; the answer is still here"
        else:
            text = f"Could not: {facts['reason']}"
        style = "bold red" if event == "warning" else ""
        line = printable(text, 2000)  # some of it is the server's
        self._console.print(Text(f"{time.strftime('%H:%M:%S')} {line}", style=style), soft_wrap=True)


_LOGGERS = (logging.getLogger("fedmomentum"), logging.getLogger("flwr"))


def status_table(status: Mapping[str, Any], now: float) -> Table:
    """`fedmomentum status` as a table."""
    age = now - status["written"]
    where = (
        "before the first round" if status["round"] is None else f"round {status['round']} of {status['num_rounds']}"
    )
    head = f"{where}, {status['phase']}"
    is_over, is_stale = status["phase"] == "ended", age > FRESH_SECONDS
    if status["waiting_for"] and status["waits_until"] and not is_over:
        names = ", ".join(printable(name, 80) for name in status["waiting_for"])
        head += f"; waiting {max(0, status['waits_until'] - now):.0f} s more for {names}"
    if status["version"]:
        head += f"; base version {status['version'][:16]}"
    if is_stale and not is_over:
        head += f"; written {age:.0f} s ago: the server is busy, or gone"
    table = Table(
        "client", "online", "state", "left", "rounds", "down", "up", "what went wrong", title=Text(printable(head))
    )
    for name, client in sorted(status["clients"].items()):
        left = f"{max(0, client['until'] - now):.0f} s" if client["until"] and not is_over else ""
        online = Text("yes") if client["connected"] else Text("no", style="yellow")
        if is_over or is_stale:  # the file says who was connected, not who is
            online = Text("" if is_over else "?")
        table.add_row(
            Text(printable(name, 80)), online, Text(printable(client["state"], 80)), left, str(client["rounds"]),
            human_bytes(client["down_bytes"]), human_bytes(client["up_bytes"]), Text(printable(client["reason"] or "")),
        )  # fmt: skip
    return table


def after_serving(console: Console, out: Path) -> None:
    """Write the report of a served run, and say where its result is and how to use it.

    The base model is at the parties and need not be here, so the commands name it as a directory to fill in.
    """
    page = write_report(out)
    console.print(summary_table(read_run(out)))
    shown = shlex.quote(str(out))
    client = example_client(out)
    whose = ""
    where = "where it is, on a party's machine for one,"
    if client is not None:
        whose = f" --client {shlex.quote(client)} --store {shlex.quote(f'nodes/{directory_name(client)}')}"
        where = "each client has a model of its own, made of this and of what is in its store; on its machine"
    lines = [
        f"The result is in {out}, its report in {page}. The base model is not needed until the result is used:",
        f"{where} copy {out} there and run",
        f"  fedmomentum export {shown}{whose} --base BASE-DIRECTORY --to merged --out {shlex.quote(f'{out}-merged')}",
        f"  fedmomentum export {shown}{whose} --base BASE-DIRECTORY --to adapter --out {shlex.quote(f'{out}-adapter')}",
        "BASE-DIRECTORY is that of the parties' base model; leave --base out where job.toml names it.",
        "The parties stay until they leave; end them with Ctrl-C there.",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
