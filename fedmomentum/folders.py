"""Finding and reading the manifests of a global model's folder, or of a run's; no tensors and no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec

from fedmomentum.errors import ModelError
from fedmomentum.manifest import ModelFile, check_format
from fedmomentum.records import parse_record, read_file
from fedmomentum.schema import parse_json

MANIFEST = "global_model.json"
ADAPTER_CONFIG = "adapter_config.json"
COMMITTED = ".committed"
"""In a run's folder: the number of the round that was committed last, written after its manifest."""


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """What decides whether the rest of a manifest is looked at."""

    format: Any = None
    format_version: Any = None


def read_manifest(file: Path) -> ModelFile:
    """Read the manifest of a global model or of a run's round.

    Raises:
        ModelError: If it is missing, not JSON, of another format or version, has a field that does not fit, was
            changed since it was written, or is that of another round than its name says.
    """
    try:
        data = read_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing") from None
    head = parse_json(data, _Head, str(file), ModelError)
    check_format(head.format, head.format_version, str(file))
    manifest = parse_record(data, ModelFile, str(file))
    if file.name != MANIFEST and (manifest.round != int(file.stem) or manifest.run is None):
        raise ModelError(
            f"{file} holds round {manifest.round}, not the checkpoint of round {int(file.stem)} of a run; it was "
            "renamed or copied"
        )
    return manifest


def round_file(folder: Path, server_round: int) -> Path:
    """Where a run keeps the manifest of a round."""
    return folder / "rounds" / f"{server_round:04d}.json"


def kept_rounds(folder: Path) -> list[int]:
    """The rounds of a run's folder that can be loaded, ascending."""
    names = (file.stem for file in (folder / "rounds").glob("*.json"))
    return sorted(int(name) for name in names if re.fullmatch("[0-9]{4}|[1-9][0-9]{4,8}", name))


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter's, rather than a run's or a global model's.

    Raises:
        ModelError: If it is several of these: what was meant could not be told.
    """
    if not os.path.lexists(folder / ADAPTER_CONFIG):
        return False
    other = MANIFEST if os.path.lexists(folder / MANIFEST) else "rounds/" if kept_rounds(folder) else ""
    if other:
        raise ModelError(f"{folder} holds a PEFT adapter ({ADAPTER_CONFIG}) and {other}; move one of them away")
    return True


def find_manifest(folder: Path, server_round: int | str) -> Path:
    """The manifest of a global model's folder, or of one round of a run's.

    Raises:
        ModelError: there is none, with what there is.
    """
    rounds = kept_rounds(folder)
    if os.path.lexists(folder / MANIFEST):
        if rounds:
            raise ModelError(f"{folder} holds a run (rounds/) and a global model ({MANIFEST}); move one of them away")
        return folder / MANIFEST
    if isinstance(server_round, str) and re.fullmatch("[0-9]{1,9}", server_round):
        server_round = int(server_round)
    if isinstance(server_round, str) and server_round not in ("last", "best"):
        raise ModelError(f"--round must be a number, last or best; got {server_round[:80]!r}")
    if not rounds:
        raise ModelError(f"{folder} is neither a global model (no {MANIFEST}) nor a run with a finished round")
    if isinstance(server_round, str):
        check_last(folder, rounds[-1])
    if server_round == "best":
        run = read_manifest(round_file(folder, rounds[-1])).run
        server_round = run.best_round if run else -1
        if server_round == -1:
            raise ModelError(f"no round of {folder} was evaluated, so none is the best; give --round a number or last")
    elif server_round == "last":
        server_round = rounds[-1]
    if server_round not in rounds:
        raise ModelError(f"{folder} keeps the rounds {rounds}; round {server_round} is not among them")
    return round_file(folder, int(server_round))


def check_last(folder: Path, server_round: int) -> None:
    """Refuse a run whose last checkpoint is gone: an older one would be taken for the result.

    Args:
        folder: the run's.
        server_round: the last one whose manifest is there; -1 for none.

    Raises:
        ModelError: If the folder says that a later round was committed.
    """
    committed = committed_round(folder)
    if committed is not None and committed > server_round:
        use = f", or give --round {server_round} to use what is there" if server_round >= 0 else ""
        raise ModelError(
            f"{folder} finished round {committed}, but {round_file(folder, committed)} is missing. Restore it from a "
            f"copy{use}"
        )


def committed_round(folder: Path) -> int | None:
    """The last round that was committed, by `.committed`; None where that does not say (it is not synced to disk)."""
    try:
        text = read_file(folder / COMMITTED, max_bytes=100).decode(errors="replace").strip()
    except (FileNotFoundError, ModelError):
        return None
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def note_committed(folder: Path, server_round: int) -> None:
    """Note which round was committed last; see `check_last`.

    It is replaced and not synced: losing it in a crash costs a check, not a round.
    """
    file = folder / COMMITTED
    temporary = file.with_name(f"{COMMITTED}.{os.getpid()}.tmp")
    temporary.write_text(f"{server_round}\n")
    temporary.replace(file)
