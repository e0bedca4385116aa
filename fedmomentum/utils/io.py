"""Atomic file writes, JSON text, and hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

# How the text begins that Git LFS leaves in place of a large file until it is pulled.
LFS_START = b"version https://git-lfs"


def write_atomically(
    path: Path, data: bytes, *, durable: bool = True, permissions: int = 0o644
) -> None:
    """Write a file so that it always holds either its old or its complete new content.

    This also holds after a crash: a temporary file in the same directory is written, synced to disk
    and renamed, and the directory is synced.

    Args:
        path: The file.
        data: Its new content.
        durable: Whether the new content must survive a crash of the machine. If not, nothing is
            synced, but every reader still sees a complete file.
        permissions: Who may read and write the file, from the moment that it exists.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, permissions)
    try:
        remaining = memoryview(data)
        while remaining:
            num_written = os.write(handle, remaining)
            remaining = remaining[num_written:]
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    if not durable:
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON; see `write_atomically`."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Encode a value as readable JSON."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def canonical_json(value: Any) -> str:
    """Encode a value as compact JSON with sorted keys, so that equal values give equal text.

    Raises:
        ValueError: If the value contains NaN or infinity, which JSON does not support.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(data: bytes | memoryview) -> str:
    """Return the hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def damage_hint(file: Path) -> str:
    """Return the end of a message about a file that cannot be parsed: how to replace it."""
    try:
        with file.open("rb") as opened:
            is_pointer = opened.read(len(LFS_START)) == LFS_START
    except OSError:
        return ""
    if is_pointer:
        return "; it is a pointer of Git LFS, not the file itself: run `git lfs pull`"
    return "; it is damaged or incomplete: copy or download it again"
