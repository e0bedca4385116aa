"""`TrackerCallback`: a run's metrics in TensorBoard, Weights & Biases, MLflow and others.

accelerate has the trackers; this module decides what is reported and when. Only the server reports.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.formats.run_files import ReportedFile, read_facts
from fedmomentum.server.callbacks import Callback
from fedmomentum.utils.io import sha256, write_json
from fedmomentum.utils.records import with_checksum

if TYPE_CHECKING:
    from fedmomentum.formats.round_record import RoundRecord
    from fedmomentum.server.checkpoint import RunDirectory


LOG = logging.getLogger("fedmomentum")
FOLDER = "trackers"
"""Subdirectory of the run's for the trackers' files and `reported.json`, their last rounds."""
PROJECT = "fedmomentum"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse unusable trackers before anything is loaded.

    Raises:
        ConfigError: If accelerate does not know a tracker, or its package is not installed.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"run.report-to names {name!r}; known: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in map(str, get_available_trackers()):
            package = "'fedmomentum[tensorboard]'" if name == "tensorboard" else name
            raise ConfigError(
                f"run.report-to names {name}, which is not installed; install it: pip install "
                f"{package}"
            )


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers in a row of `metrics.jsonl` but its round, as in `evaluation/total/loss`.

    Characters that some trackers refuse become `_`, which leaves letters, digits, `_ . - /` and
    spaces. If two names (clients `a*` and `a?`) would become the same, a hash of the original name
    is appended to the later one.
    """
    found: dict[str, float] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{name}/{key}" if name else str(key), inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            tag = re.sub(r"[^\w.\-/ ]", "_", name)
            found[f"{tag}-{sha256(name.encode())[:8]}" if tag in found else tag] = value

    walk("", {key: value for key, value in row.items() if key != "round"})
    return found


class TrackerCallback(Callback):
    """Reports every committed round to trackers, at step = round.

    First it reports earlier rounds that a tracker has not received, such as those of a run that was
    killed between a commit and its report, or that reports only since it was resumed. A tracker
    that fails is dropped with one warning, and the run continues.

    Args:
        names: `run.report-to`, checked by `check_trackers`.
        directory: The run's directory, after `resume`.
        run_id: The run's identifier, so that a tracker can continue with it after a resume.
    """

    def __init__(self, names: Sequence[str], directory: RunDirectory, run_id: str) -> None:
        self._run_id = run_id
        self._trackers: dict[str, GeneralTracker] = {}
        self._last_rounds: dict[str, int] = {}
        if not names:
            return
        out = directory.path / FOLDER
        self._file = out / "reported.json"
        self._last_rounds = _last_reported(self._file, run_id)
        # A name given twice is a single tracker.
        for name in dict.fromkeys(names):
            self._attempt(name, partial(self._start, name, out, directory.path.name))
        # Report rounds that were committed but not yet reported.
        for record in directory.records:
            self.on_round_end(record)

    def __enter__(self) -> TrackerCallback:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.finish)

    def on_round_end(self, record: RoundRecord) -> None:
        """Report a round to every tracker that has not received it."""
        values = numbers_of(record.to_json())
        for name, tracker in list(self._trackers.items()):
            if record.round <= self._last_rounds.get(name, -1):
                continue
            if self._attempt(name, partial(tracker.log, values, step=record.round)):
                self._last_rounds[name] = record.round
                content = {"rounds": self._last_rounds, "run_id": self._run_id}
                write_json(self._file, with_checksum(content))

    def _start(self, name: str, out: Path, title: str) -> None:
        tracker = _tracker(name, out, title, self._run_id)
        self._trackers[name] = tracker
        tracker.start()

    def _attempt(self, name: str, call: Callable[[], object]) -> bool:
        """Call a tracker; one that fails is dropped."""
        try:
            # accelerate's own loggers need a state, which local training may have reset.
            PartialState()
            call()
        except Exception as error:  # network, disk or login failures must not end a run
            self._trackers.pop(name, None)
            LOG.warning(
                "%s is not reported to from here on: %s: %s", name, type(error).__name__, error
            )
            return False
        return True


def _last_reported(file: Path, run_id: str) -> dict[str, int]:
    """Return each tracker's last reported round.

    Raises:
        ModelError: If the file is damaged, or belongs to another run.
    """
    directory = file.parent
    if directory.exists() and not directory.is_dir():
        raise ModelError(
            f"{directory} is not a directory, and trackers write into it; move it away"
        )
    directory.mkdir(exist_ok=True)
    try:
        content, owner = read_facts(file, ReportedFile)
        if owner != run_id:
            raise ModelError(f"{file} is of another run")
    except FileNotFoundError:
        if any(directory.iterdir()):
            LOG.warning("%s is missing: trackers that know earlier rounds receive them again", file)
        return {}
    except ModelError as error:
        raise ModelError(
            f"{error}. Restore it from a copy; or delete it, and the trackers receive all rounds "
            "again"
        ) from error
    last: dict[str, int] = content["rounds"]
    return last


def _tracker(name: str, out: Path, title: str, run_id: str) -> GeneralTracker:
    """Create one of accelerate's trackers; its files go to `out` if it accepts a directory."""
    more: dict[str, Any] = {
        "wandb": {"name": title, "id": run_id, "resume": "allow", "dir": str(out)},
        "mlflow": {"run_name": title},
    }.get(name, {})
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        return kind(name, str(out), **more)
    return kind(PROJECT, **more)
