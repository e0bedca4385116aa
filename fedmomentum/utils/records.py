"""Files on disk, read with suspicion: bounded regular files, and JSON records with a checksum.

A record is a JSON object with the field `sha256` over all its other fields. Disks, copies and
editors damage files; a record that was changed in any way after it was written is refused by name,
whatever it says. (A checksum is no signature: a person who can write the directory can also write a
matching checksum.)
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.utils.io import canonical_json, sha256
from fedmomentum.utils.schema import Hash, Schema, parse_json

MAX_JSON_BYTES = 2**28
"""A manifest of a federation of 10,000 clients has about ten MB."""


class Record(Schema, frozen=True, kw_only=True):
    """A JSON file with a checksum over all its other fields."""

    sha256: Hash


class _Checksummed(Protocol):
    @property
    def sha256(self) -> str: ...


R = TypeVar("R", bound=_Checksummed)


def read_file(
    path: Path, *, max_bytes: int = MAX_JSON_BYTES, error: type[FedMomentumError] = ModelError
) -> bytes:
    """Return a file's bytes; never wait for a pipe, read a device, or read more than expected.

    Args:
        path: The file; a symbolic link to a regular file is followed.
        max_bytes: A larger file is refused unread.
        error: The error to raise.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it is no regular file, is larger than `max_bytes`, or cannot be read.
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
    """Return the SHA-256 over a record's fields, `sha256` itself excluded.

    It is over the values as canonical JSON, so that the file may be indented in any way.

    Raises:
        ValueError: If the record holds a number that is not finite.
    """
    fields = {key: value for key, value in table.items() if key != "sha256"}
    return sha256(canonical_json(fields).encode())


def with_checksum(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table as a record: with its checksum.

    Raises:
        ModelError: If it holds a number that is not finite, which JSON does not have.
    """
    try:
        return {**table, "sha256": checksum(table)}
    except ValueError as problem:
        raise ModelError(f"nothing was written: a value is not finite ({problem})") from problem


def parse_record(
    data: bytes, kind: type[R], name: str, error: type[FedMomentumError] = ModelError
) -> R:
    """Decode a record: its fields must have their declared types, and its checksum must match.

    Args:
        data: The record's bytes.
        kind: Its type.
        name: What to call it in messages.
        error: The error to raise.

    Raises:
        FedMomentumError: If it is not JSON, a field does not fit, or anything was changed since it
            was written.
    """
    record = parse_json(data, kind, name, error)
    # Decoding with a type skips the fields that are not declared; the checksum covers them.
    table = parse_json(data, dict[str, Any], name, error)
    if checksum(table) != record.sha256:
        raise error(
            f"{name} was damaged or altered since it was written: its checksum does not fit"
        )
    return record


def read_record(path: Path, kind: type[R], error: type[FedMomentumError] = ModelError) -> R:
    """Read and decode a record; see `read_file` and `parse_record`.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it cannot be read, is not such a record, or was changed since it was
            written.
    """
    return parse_record(read_file(path, error=error), kind, str(path), error)
