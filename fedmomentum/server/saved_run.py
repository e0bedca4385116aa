"""Read a run directory's settings and committed metrics without opening (locking) it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.config.toml import from_dict, load_config
from fedmomentum.errors import FormatError, ModelError
from fedmomentum.formats.directories import (
    check_last_round,
    find_manifest,
    read_manifest,
    retained_rounds,
    round_file,
)
from fedmomentum.formats.metrics_file import METRICS, check_metrics, parse_record_line, read_metrics
from fedmomentum.global_model.model import suggest_undamaged_round

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.formats.round_record import RoundRecord


def saved_method(directory: Path, server_round: int | None = None) -> str | None:
    """Return a run's method with all of its settings, as in its checkpoint; None without one.

    Args:
        directory: The run's directory.
        server_round: A kept round; by default the last one.
    """
    rounds = retained_rounds(directory)
    if not rounds:
        return None
    file = find_manifest(directory, rounds[-1] if server_round is None else server_round)
    return read_manifest(file).method


def saved_settings(directory: Path, server_round: int | None = None) -> Config | None:
    """Return a run's settings from its last checkpoint, else from config.toml.

    Args:
        directory: The run's directory.
        server_round: A kept round; by default the last one.

    Returns:
        The settings; None if there is neither.

    Raises:
        ModelError: If the checkpoint is damaged.
        ConfigError: If there is none, and config.toml is not a valid configuration.
    """
    rounds = retained_rounds(directory)
    if not rounds:
        file = directory / "config.toml"
        return load_config(file) if file.is_file() else None
    if server_round is None:
        check_last_round(directory, rounds[-1])
    file = find_manifest(directory, rounds[-1] if server_round is None else server_round)
    try:
        run = read_manifest(file).run
    except FormatError:
        raise
    except ModelError as error:
        raise ModelError(
            f"{str(error).rstrip('.?')}. {suggest_undamaged_round(directory, file)}"
        ) from error
    assert run is not None  # ensured by read_manifest
    if not run.settings:
        return None
    try:
        return from_dict(tomllib.loads(run.settings))
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"{file}: run.settings is not TOML: {error}") from error


def committed_records(directory: Path, server_round: int) -> list[RoundRecord]:
    """Return the rows of metrics with which a kept round was committed.

    Raises:
        ModelError: If the checkpoint is damaged, or rows are missing or were altered.
    """
    run = read_manifest(round_file(directory, server_round)).run
    assert run is not None  # ensured by read_manifest
    path = directory / METRICS
    try:
        lines = read_metrics(path, ModelError)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; restore it from a copy") from None
    check_metrics(lines, run.metrics, path)
    return [
        parse_record_line(line, f"{path}, line {n}", ModelError)
        for n, line in enumerate(lines[: run.metrics.rows], 1)
    ]
