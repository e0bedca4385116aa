"""Find and read the manifests in the directory of a global model or a run, without torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from fedmomentum.errors import ModelError
from fedmomentum.formats.manifest import ModelFile, check_format
from fedmomentum.utils.records import parse_record, read_file
from fedmomentum.utils.schema import parse_json

MANIFEST = "global_model.json"
ADAPTER_CONFIG = "adapter_config.json"
COMMITTED = ".committed"
"""A run's file with the number of the last committed round, written after that round's manifest."""

# A round's number as `round_file` writes it: padded to four digits, and at most nine long.
_ROUND_NAME = re.compile("[0-9]{4}|[1-9][0-9]{4,8}")
_ROUND_NUMBER = re.compile("[0-9]{1,9}")


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that decide whether the rest of a manifest is decoded at all."""

    format: Any = None
    format_version: Any = None


def read_manifest(file: Path) -> ModelFile:
    """Read the manifest of a global model or of a run's round.

    Raises:
        ModelError: If it is missing, is not JSON, has another format or version or an invalid
            field, was changed since it was written, or is for another round than its name says.
    """
    try:
        data = read_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing") from None
    # Check format and version first, since another version may have other fields.
    head = parse_json(data, _Head, str(file), ModelError)
    check_format(head.format, head.format_version, str(file))
    manifest = parse_record(data, ModelFile, str(file))
    if file.name != MANIFEST and (manifest.round != int(file.stem) or manifest.run is None):
        raise ModelError(
            f"{file} holds round {manifest.round}, not the checkpoint of round {int(file.stem)} of "
            "a run; it was renamed or copied"
        )
    return manifest


def round_file(directory: Path, server_round: int) -> Path:
    """Return the path of a run's manifest for a round."""
    return directory / "rounds" / f"{server_round:04d}.json"


def retained_rounds(directory: Path) -> list[int]:
    """Return the rounds of a run that can be loaded, ascending."""
    names = (file.stem for file in (directory / "rounds").glob("*.json"))
    return sorted(int(name) for name in names if _ROUND_NAME.fullmatch(name))


def is_adapter_directory(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter, rather than a run or a global model.

    Raises:
        ModelError: If it holds several of these, so that it is unclear which one is meant.
    """
    if not os.path.lexists(directory / ADAPTER_CONFIG):
        return False
    other = ""
    if os.path.lexists(directory / MANIFEST):
        other = MANIFEST
    elif retained_rounds(directory):
        other = "rounds/"
    if other:
        raise ModelError(
            f"{directory} holds a PEFT adapter ({ADAPTER_CONFIG}) and {other}; move one of them "
            "away"
        )
    return True


def find_manifest(directory: Path, server_round: int | str) -> Path:
    """Find the manifest of a global model, or of one round of a run.

    Args:
        directory: The directory of the global model or run.
        server_round: For a run: a round's number, `last` or `best`.

    Returns:
        The manifest's path.

    Raises:
        ModelError: If there is none; the message says what there is.
    """
    # A global model has a single manifest, and its directory has no rounds.
    if not os.path.lexists(directory):
        raise ModelError(f"{directory} does not exist")
    rounds = retained_rounds(directory)
    if os.path.lexists(directory / MANIFEST):
        if rounds:
            raise ModelError(
                f"{directory} holds a run (rounds/) and a global model ({MANIFEST}); move one of "
                "them away"
            )
        return directory / MANIFEST
    # A run has one per round.
    wanted = _parse_round(server_round)
    if not rounds:
        check_last_round(directory, -1)
        raise ModelError(
            f"{directory} is neither a global model (no {MANIFEST}) nor a run with a finished "
            f"round nor a PEFT adapter (no {ADAPTER_CONFIG})"
        )
    if isinstance(wanted, str):
        check_last_round(directory, rounds[-1])
        wanted = rounds[-1] if wanted == "last" else _best_round(directory, rounds[-1])
    if wanted not in rounds:
        raise ModelError(f"{directory} keeps the rounds {rounds}; round {wanted} is not among them")
    return round_file(directory, wanted)


def _parse_round(text: int | str) -> int | str:
    """Return a round's number, or `last` or `best`.

    Raises:
        ModelError: If the text is neither.
    """
    if isinstance(text, int):
        return text
    if _ROUND_NUMBER.fullmatch(text):
        return int(text)
    if text not in ("last", "best"):
        raise ModelError(f"--round must be a number, last or best; got {text[:80]!r}")
    return text


def _best_round(directory: Path, last_round: int) -> int:
    """Return the evaluated round with the lowest loss, according to the last round's checkpoint.

    Raises:
        ModelError: If no round was evaluated.
    """
    run = read_manifest(round_file(directory, last_round)).run
    best_round = run.best_round if run else -1
    if best_round == -1:
        raise ModelError(
            f"no round of {directory} was evaluated, so none is the best; give --round a number or "
            "last"
        )
    return best_round


def check_last_round(directory: Path, server_round: int) -> None:
    """Refuse a run whose last checkpoint is missing: an older one would be mistaken for the result.

    Args:
        directory: The run's directory.
        server_round: The last round that has a manifest; -1 for none.

    Raises:
        ModelError: If a later round was committed.
    """
    committed = last_committed_round(directory)
    if committed is None or committed <= server_round:
        return
    alternative = ""
    if server_round >= 0:
        alternative = f", or give --round {server_round} to use what is there"
    raise ModelError(
        f"{directory} finished round {committed}, but {round_file(directory, committed)} is "
        f"missing. Restore it from a copy{alternative}"
    )


def last_committed_round(directory: Path) -> int | None:
    """Return the last committed round according to `.committed`.

    None if the file is missing or unreadable, which can happen as it is not synced to disk.
    """
    try:
        text = read_file(directory / COMMITTED, max_bytes=100).decode(errors="replace").strip()
    except (FileNotFoundError, ModelError):
        return None
    return int(text) if _ROUND_NUMBER.fullmatch(text) else None


def record_committed_round(directory: Path, server_round: int) -> None:
    """Record which round was committed last; see `check_last_round`.

    The file is replaced without syncing: losing it in a crash costs a check, not a round.
    """
    file = directory / COMMITTED
    temporary = file.with_name(f"{COMMITTED}.{os.getpid()}.tmp")
    temporary.write_text(f"{server_round}\n")
    temporary.replace(file)
