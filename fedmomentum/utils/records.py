"""Defensive reading of files: bounded regular files, and JSON records with a checksum.

A record is a JSON object whose field `sha256` is a hash of all its other fields. Disks, copies and
editors damage files; a record that was changed in any way after it was written is rejected, and the
error names it. (A checksum is not a signature: anyone who can write to the directory can also write
a matching checksum.)
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
"""A manifest of a federation of 10,000 clients has about 10 MB."""


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
    """Read a file, but never wait for a pipe, read a device, or read more than expected.

    Args:
        path: The file; a symbolic link to a regular file is followed.
        max_bytes: Larger files are rejected without being read.
        error: The error to raise.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it is not a regular file, is larger than `max_bytes`, or cannot be
            read.
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
    """Return the SHA-256 of a record's fields, excluding `sha256` itself.

    It is computed from canonical JSON, so that the file's indentation does not matter.

    Raises:
        ValueError: If the record contains a number that is not finite.
    """
    fields = {key: value for key, value in table.items() if key != "sha256"}
    return sha256(canonical_json(fields).encode())


def with_checksum(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table as a record by adding its checksum.

    Raises:
        ModelError: If it contains a number that is not finite, which JSON does not support.
    """
    try:
        return {**table, "sha256": checksum(table)}
    except ValueError as problem:
        raise ModelError(f"nothing was written: a value is not finite ({problem})") from problem


def parse_record(
    data: bytes, kind: type[R], name: str, error: type[FedMomentumError] = ModelError
) -> R:
    """Decode a record, checking its fields' declared types and its checksum.

    Args:
        data: The record's bytes.
        kind: Its type.
        name: How error messages refer to it.
        error: The error to raise.

    Raises:
        FedMomentumError: If it is not JSON, a field is invalid, or anything was changed since it
            was written.
    """
    record = parse_json(data, kind, name, error)
    # Typed decoding skips undeclared fields, but the checksum covers them.
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
        FedMomentumError: If it cannot be read, is not a record of this type, or was changed since
            it was written.
    """
    return parse_record(read_file(path, error=error), kind, str(path), error)
