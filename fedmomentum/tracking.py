"""A run's rows in experiment trackers (TensorBoard, Weights & Biases, MLflow, ...), where the run asks for them.

accelerate has the trackers; here is what goes into them and when. The server reports, and nobody else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from fedmomentum.checkpoint import RunFolder
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.files import sha256, write_json
from fedmomentum.records import checksummed
from fedmomentum.rounds import Observer
from fedmomentum.run_files import ReportedFile, read_facts

LOG = logging.getLogger("fedmomentum")
FOLDER = "trackers"
"""In the run's folder: the trackers' own files, and `reported.json`, the last round that each was told of."""
PROJECT = "fedmomentum"


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what cannot be reported to, before anything is loaded.

    Raises:
        ConfigError: a tracker that accelerate does not know, or whose package is not installed.
    """
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"run.report-to names {name!r}; known: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in map(str, get_available_trackers()):
            package = "'fedmomentum[tensorboard]'" if name == "tensorboard" else name
            raise ConfigError(f"run.report-to names {name}, which is not installed; install it: pip install {package}")


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a row of `metrics.jsonl` but its round, as `evaluation/total/loss`.

    Characters that some trackers refuse become `_`: what is left is letters, digits and `_ . - /` and the blank. Where
    two names (clients `a*` and `a?`) would so come to one, the later has a hash of the whole name behind it.
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


@contextmanager
def reported(names: Sequence[str], folder: RunFolder, run_id: str, observer: Observer) -> Iterator[Observer]:
    """An observer that also tells the trackers of every committed round; step = round.

    Rounds that the folder holds and a tracker was not told of come first: those of a run that was killed between a
    commit and its report, or of one that is reported only from its resume on. A tracker that fails is left out with
    one warning, and the run goes on.

    Args:
        names: `run.report-to`, checked by `check_trackers`.
        folder: the run's, after `resume`.
        run_id: a resumed run is the same one where the tracker can go on with one.
        observer: told of everything, first.
    """
    if not names:
        yield observer
        return
    out = folder.folder / FOLDER
    file = out / "reported.json"
    last = _last_reported(file, run_id)
    trackers: dict[str, GeneralTracker] = {}

    def attempt(name: str, call: Callable[[], Any]) -> bool:
        try:
            PartialState()  # accelerate's own loggers want one; whoever trains may have taken it down
            call()
        except Exception as error:  # a network, a full disk, a login: nothing that a run should end for
            trackers.pop(name, None)
            LOG.warning("%s is not reported to from here on: %s: %s", name, type(error).__name__, error)
            return False
        return True

    def tell(row: Mapping[str, Any]) -> None:
        values, step = numbers_of(row), row["round"]
        for name, tracker in list(trackers.items()):
            if step > last.get(name, -1) and attempt(name, partial(tracker.log, values, step=step)):
                last[name] = step
                write_json(file, checksummed({"rounds": last, "run_id": run_id}))

    def observe(event: str, facts: Mapping[str, Any]) -> None:
        observer(event, facts)
        if event == "row":
            tell(facts)

    def begin(name: str) -> None:
        trackers[name] = _tracker(name, out, folder.folder.name, run_id)
        trackers[name].start()

    for name in dict.fromkeys(names):
        attempt(name, partial(begin, name))
    for row in folder.rows:
        tell(row)
    try:
        yield observe
    finally:
        for name, tracker in list(trackers.items()):
            attempt(name, tracker.finish)


def _last_reported(file: Path, run_id: str) -> dict[str, int]:
    """Tracker to the last round that it was told of.

    Raises:
        ModelError: If the file was damaged, or is another run's.
    """
    folder = file.parent
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is no folder, and trackers write into it; move it away")
    folder.mkdir(exist_ok=True)
    try:
        told, owner = read_facts(file, ReportedFile)
        if owner != run_id:
            raise ModelError(f"{file} is of another run")
    except FileNotFoundError:
        if any(folder.iterdir()):
            LOG.warning("%s is missing: trackers that know earlier rounds are told of them again", file)
        return {}
    except ModelError as error:
        raise ModelError(
            f"{error}. Restore it from a copy; or delete it, and the trackers are told of all rounds again"
        ) from error
    last: dict[str, int] = told["rounds"]
    return last


def _tracker(name: str, out: Path, title: str, run_id: str) -> GeneralTracker:
    """A tracker of accelerate's, its files in `out` where it takes a folder."""
    more: dict[str, Any] = {
        "wandb": {"name": title, "id": run_id, "resume": "allow", "dir": str(out)},
        "mlflow": {"run_name": title},
    }.get(name, {})
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        return kind(name, str(out), **more)
    return kind(PROJECT, **more)
