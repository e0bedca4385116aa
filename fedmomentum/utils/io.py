"""Files that are written completely or not at all, JSON text, and hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that at every moment holds either its old or its complete new content.

    That is so after a crash, too: a temporary file in the same directory is written and synced to
    disk, renamed, and the directory synced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        remaining = memoryview(data)
        while remaining:
            num_written = os.write(handle, remaining)
            remaining = remaining[num_written:]
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
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
    """Encode a value as compact JSON with sorted keys: equal values give equal text.

    Raises:
        ValueError: If the value holds NaN or an infinity, which JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
