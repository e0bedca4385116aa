"""Bytes on disk and in tensors: written whole or not at all, and never pickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedmomentum.errors import PayloadError

MAX_HEADER_BYTES = 64 * 2**20
"""A safetensors header of a model of 100,000 tensors has about 10 MiB."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` so that at every moment it holds its old content or all of the new one, also after a crash.

    A temporary file beside it is written and synced to disk, renamed over it, and the folder synced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically`, as readable JSON."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return a value as readable JSON."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def canonical_json(value: Any) -> str:
    """Encode a value as compact JSON with sorted keys: equal values give equal text.

    Raises:
        ValueError: If the value holds NaN or an infinity, which JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(data: bytes) -> str:
    """The name of these bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: tuple[str, str] | None = None) -> bytes:
    """The tensors as safetensors bytes: equal tensors and metadata give equal bytes.

    The metadata is one pair at most: safetensors writes several in an order that changes from call to call.
    """
    ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
    return safetensors.torch.save(ordered, dict([metadata]) if metadata else None)


def read_safetensors(data: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of safetensors bytes from anywhere.

    Raises:
        PayloadError: a header that is too long, is not JSON, or claims tensors that the bytes do not hold.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise PayloadError(f"{name}: the header claims {length} bytes of {len(data)} received; these are no tensors")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no table")
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise PayloadError(f"{name}: not safetensors: {error}") from error
    return tensors, metadata


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading its tensors.

    Raises:
        PayloadError: If the header is too long or is not JSON.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(MAX_HEADER_BYTES, file.stat().st_size - 8):
            raise PayloadError(f"{file}: the header claims {length} bytes, more than the file holds")
        header = opened.read(length)
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError, RecursionError) as error:
        raise PayloadError(f"{file}: not safetensors: {error}") from error
    return metadata if isinstance(metadata, dict) else {}


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor Inf; no second tensor of its size is made."""
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # aminmax knows no float8
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def tensor_of(data: bytes) -> Tensor:
    """Bytes as a tensor of uint8, to travel among tensors."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
