"""The page for watching a run in progress, made from the files in its directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from fedmomentum.errors import FedMomentumError
from fedmomentum.formats.metrics_file import METRICS
from fedmomentum.formats.status_file import STATUS_FILE, StatusFile, read_status
from fedmomentum.report.figures.cost import traffic_plots
from fedmomentum.report.html import asset, render
from fedmomentum.report.live_view import MAX_CLIENTS, LiveView, live_view, shown_name
from fedmomentum.report.page import report_section, score_plots
from fedmomentum.results.formatting import clock
from fedmomentum.results.run_results import RunResults
from fedmomentum.results.summary import natural_order
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.report.figures.svg import Plot


MAX_LOG_LINES = 40
MAX_LINE = 400
"""The most characters per log line."""
LOG_TAIL_BYTES = 2**16
"""How many bytes to read from the end of the log."""
DRAWING_FRACTION = 0.1
"""The fraction of a core that drawing curves may use when rounds are fast."""


@dataclass(frozen=True)
class _Section:
    """A section of the page; `scrolls` is for wide tables and long logs."""

    key: str
    title: str
    scrolls: bool = False


SECTIONS = (
    _Section("clients", "Clients", scrolls=True),
    _Section("curves", "Curves"),
    _Section("recent", "Last rounds", scrolls=True),
    _Section("log", "Log", scrolls=True),
    _Section("versions", "Versions", scrolls=True),
)


@dataclass(frozen=True)
class LiveUpdate:
    """The content of the page at one moment.

    Attributes:
        parts: Part of the page -> its HTML, with all text escaped.
        title: The window's title.
        spoken: What screen readers announce, if it has changed.
        now: The time, in seconds since 1970.
    """

    parts: dict[str, str]
    title: str
    spoken: str
    now: float


class LivePage:
    """Reads the files of a run in progress and makes the parts of its page from them.

    Data that cannot be read at the moment, because the run is writing or pruning it, is left as it
    was.

    Args:
        directory: The run's directory.
        log: The log file in it.
        since: When the run was started, in seconds since 1970; an older status is from an earlier
            start.
        clock: Returns the time.
    """

    def __init__(
        self,
        directory: Path,
        log: str,
        *,
        since: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._log = directory / log
        self._since = since
        self._clock = clock
        self._status: StatusFile | None = None
        self._run: RunResults | None = None
        self._stamps: dict[str, object] = {}
        self._curves = ""
        self._num_drawn = 0
        self._draw_at = 0.0

    def update(self, *, is_ended: bool = False) -> LiveUpdate:
        """Return the current content of the page.

        Args:
            is_ended: Whether the run's process has ended, in which case the report is included.
        """
        self._read()
        now = self._clock()
        run = self._run
        view = live_view(self._status, run, is_ended=is_ended, now=now)
        # The report includes the curves and much more.
        report = ""
        if is_ended and run is not None and run.rounds:
            report = report_section(run)
        parts = {
            "state": self._part("state", view=view),
            "clients": self._part("clients", view=view),
            "curves": "" if report else self._draw(),
            "recent": self._part("recent", view=view),
            "log": self._part("log", lines=self._log_lines()),
            "versions": self._part("versions", facts=self._versions()),
            "report": report,
        }
        name = self.name
        return LiveUpdate(parts, f"{view.headline} · {name}", _spoken(view), now)

    @property
    def name(self) -> str:
        """The run's name, which is that of its directory."""
        return shown_name(self._directory.resolve().name)

    def page(self, update: LiveUpdate) -> str:
        """Return the whole page for an update."""
        content = {
            "name": self.name,
            "directory": printable(str(self._directory)),
            "clock": clock(update.now),
            "sections": SECTIONS,
            "parts": {part: Markup(html) for part, html in update.parts.items()},
        }
        return render("live.html.j2", content, _no_csv)

    @staticmethod
    def style() -> str:
        """Return the page's style sheet."""
        return asset("style.css") + asset("live.css")

    @staticmethod
    def script() -> str:
        """Return the page's script."""
        return asset("live.js")

    # ── reading ──

    def _read(self) -> None:
        """Reread the files that have changed."""
        # Files that fail are read again next time.
        if self._has_changed(STATUS_FILE):
            try:
                status = read_status(self._directory)
            except (FedMomentumError, OSError):
                self._stamps.pop(STATUS_FILE)
            else:
                if status.written >= self._since:
                    self._status = status
        # The plan is written before the first round, the metrics with every round.
        changes = [self._has_changed(name) for name in ("plan.json", METRICS)]
        if any(changes):
            try:
                self._run = RunResults.load(self._directory, may_be_empty=True)
            except (FedMomentumError, OSError):
                self._stamps.pop("plan.json", None)

    def _has_changed(self, name: str) -> bool:
        """Return whether a file has changed since the last call."""
        try:
            status = os.stat(self._directory / name)
        except OSError:
            return False
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if self._stamps.get(name) == stamp:
            return False
        self._stamps[name] = stamp
        return True

    def _log_lines(self) -> list[str]:
        """Return the last lines of the log."""
        try:
            with self._log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                start = max(0, file.tell() - LOG_TAIL_BYTES)
                file.seek(start)
                lines = file.read(LOG_TAIL_BYTES).decode("utf-8", "replace").split("\n")
        except OSError:
            return []
        # The first line may be partial, and the last one is empty.
        complete = lines[1:-1] if start else lines[:-1]
        return [printable(line, MAX_LINE) for line in complete[-MAX_LOG_LINES:]]

    def _versions(self) -> list[tuple[str, str]]:
        """Return the versions of the model and software, here and on the clients."""
        # The model's, as last reported by the run.
        facts = []
        model = self._status.version if self._status is not None else None
        run = self._run
        if model is None and run is not None and run.rounds:
            model = run.rounds[-1].version
        if model is not None:
            facts.append(("model version", model))
        if run is None:
            return facts
        facts += [("base model", run.plan.model), ("method", run.plan.method)]
        versions = run.environment.get("versions", {})
        facts += [(str(name), str(value)) for name, value in versions.items()]
        # Over a network, each client reports its own.
        clients = run.environment.get("clients", {})
        for name in sorted(clients, key=natural_order)[:MAX_CLIENTS]:
            facts.append((name, str(clients[name])))
        return [(shown_name(name), printable(value)) for name, value in facts]

    # ── making parts ──

    def _part(self, part: str, **content: object) -> str:
        return render("live_parts.html.j2", {"part": part, **content}, _no_csv).strip()

    def _draw(self) -> str:
        """Return the curves, redrawn if there are new rounds and it is not too soon."""
        rounds = [] if self._run is None else self._run.rounds
        started = self._clock()
        if not rounds or len(rounds) == self._num_drawn or started < self._draw_at:
            return self._curves
        plots = [*score_plots(rounds), *traffic_plots(rounds)]
        self._curves = self._part("curves", plots=plots)
        self._num_drawn = len(rounds)
        self._draw_at = started + (self._clock() - started) / DRAWING_FRACTION
        return self._curves


def _no_csv(plot: Plot) -> str:
    raise AssertionError(f"the live page offers no data of {plot.key}")


def _spoken(view: LiveView) -> str:
    """Return what screen readers announce: rounds, failures and the end, but not every step."""
    if view.num_finished and not view.is_ended:
        text = f"Round {view.num_finished} of {view.num_rounds} finished"
    else:
        text = view.headline
    names = [row.name for row in view.clients if row.kind == "bad"]
    if names and not view.is_ended:
        text += f". Failed or late: {', '.join(names[:3])}"
    return text
