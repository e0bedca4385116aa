"""Files on disk, read with suspicion: regular files of a bounded size, and JSON records with a checksum of their own.

A record is a JSON object with the field `sha256` over all its other fields. Disks, copies and editors damage files;
a record that was changed in any way after it was written is refused by name, whatever it says. (A checksum is no
signature: whoever can write the directory can also write a fitting checksum.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.schema import Hash, Schema, parse_json

MAX_JSON_BYTES = 2**28
"""A manifest of a federation of 10,000 clients has some ten MB."""


class Record(Schema, frozen=True, kw_only=True):
    """A JSON file with a checksum over all its other fields."""

    sha256: Hash


class _Checksummed(Protocol):
    @property
    def sha256(self) -> str: ...


R = TypeVar("R", bound=_Checksummed)


def read_file(path: Path, *, max_bytes: int = MAX_JSON_BYTES, error: type[FedMomentumError] = ModelError) -> bytes:
    """Return a file's bytes; never wait for a pipe, read a device, or read more than expected.

    Args:
        path: the file; a symbolic link to a regular file is followed.
        max_bytes: a larger file is refused unread.
        error: the error to raise.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it is no regular file, is larger than that, or cannot be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path} is no regular file")
            if status.st_size > max_bytes:
                raise error(f"{path} has {status.st_size} bytes; at most {max_bytes} were expected")
            with open(handle, "rb", closefd=False) as file:
                return file.read(status.st_size)
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise
    except OSError as problem:
        if problem.errno == errno.ENOTDIR:
            raise FileNotFoundError(problem.errno, problem.strerror, str(path)) from problem
        raise error(f"{path} cannot be read: {problem.strerror}") from problem


def checksum(table: Mapping[str, Any]) -> str:
    """Return the SHA-256 over a record's fields, `sha256` itself left out.

    It is over the values as compact JSON with sorted keys, so that the file may be indented in any way.
    """
    rest = {key: value for key, value in table.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def checksummed(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table as a record: with its checksum.

    Raises:
        ModelError: If it holds a number that is not finite, which JSON has no word for.
    """
    try:
        return {**table, "sha256": checksum(table)}
    except ValueError as problem:
        raise ModelError(f"nothing was written: a value is not finite ({problem})") from problem


def parse_record(data: bytes, kind: type[R], name: str, error: type[FedMomentumError] = ModelError) -> R:
    """Decode a record: its fields must have their declared types, and its checksum must fit.

    Raises:
        FedMomentumError: If it is no JSON, a field does not fit, or anything was changed since it was written.
    """
    record = parse_json(data, kind, name, error)
    if checksum(msgspec.json.decode(data)) != record.sha256:
        raise error(f"{name} was damaged or altered since it was written: its checksum does not fit")
    return record


def read_record(path: Path, kind: type[R], error: type[FedMomentumError] = ModelError) -> R:
    """Read and decode a record; see `read_file` and `parse_record`.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it cannot be read, is no such record, or was changed since it was written.
    """
    return parse_record(read_file(path, error=error), kind, str(path), error)
