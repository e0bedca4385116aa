"""Tensors as safetensors bytes and back, with defensive decoding of outside data."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fedmomentum.errors import PayloadError

MAX_HEADER_BYTES = 64 * 2**20
"""The safetensors header of a model with 100,000 tensors has about 10 MiB."""
LENGTH_BYTES = 8
"""Number of bytes at the beginning of a safetensors file that hold its header's length."""
FLOAT32_BYTES = 4
MAX_ELEMENTS = 2**62
"""The most elements whose number still fits into torch's integers."""
INVALID = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    RuntimeError,
)
"""What json, safetensors and torch raise on headers that are not what they claim to be."""


def safetensors_bytes(
    tensors: Mapping[str, Tensor], metadata: tuple[str, str] | None = None
) -> bytes:
    """Encode tensors as safetensors: equal tensors and metadata give equal bytes.

    Args:
        tensors: The tensors by name.
        metadata: A key and its value; at most one pair, since safetensors writes several in an
            order that varies between calls.
    """
    ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
    return safetensors.torch.save(ordered, dict([metadata]) if metadata else None)


def read_safetensors(data: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Decode safetensors bytes from any source.

    Args:
        data: The bytes.
        name: How error messages refer to them.

    Returns:
        The tensors and the metadata.

    Raises:
        PayloadError: If the header is too long or not JSON, or declares tensors that the bytes do
            not contain.
    """
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, len(data) - LENGTH_BYTES):
        raise PayloadError(
            f"{name}: the header claims {length} bytes of {len(data)} received; these are no "
            "tensors"
        )
    header = data[LENGTH_BYTES : LENGTH_BYTES + length]
    try:
        metadata = json.loads(header).get("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no table")
        tensors = safetensors.torch.load(data)
    except (SafetensorError, *INVALID) as error:
        raise PayloadError(f"{name}: not safetensors: {error}") from error
    return tensors, metadata


def view_safetensors(data: bytes, name: str) -> dict[str, Tensor]:
    """Decode safetensors bytes from any source, with float32 tensors as views rather than copies.

    The tensors must not be written to. Anything that is not in the simple layout is left to
    `read_safetensors`, which copies or rejects it.

    Raises:
        PayloadError: See `read_safetensors`.
    """
    tensors = _views(data)
    return read_safetensors(data, name)[0] if tensors is None else tensors


def _views(data: bytes) -> dict[str, Tensor] | None:
    """Return float32 tensors as views of safetensors bytes; None if they contain anything else.

    As the format requires, the tensors must be contiguous and fill the bytes.
    """
    start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    if not LENGTH_BYTES < start <= min(MAX_HEADER_BYTES, len(data)) or start % FLOAT32_BYTES:
        return None
    try:
        header = json.loads(data[LENGTH_BYTES:start])
        entries = {key: msgspec.convert(value, _Entry) for key, value in header.items()}
    except INVALID:
        return None
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.data_offsets):
        begin, end = entry.data_offsets
        num_bytes = math.prod(entry.shape) * FLOAT32_BYTES
        if entry.dtype != "F32" or begin != position or end != begin + num_bytes:
            return None
        # The strides of an empty tensor are products of its other sides.
        if math.prod(max(side, 1) for side in entry.shape) > MAX_ELEMENTS:
            return None
        position = end
    if start + position != len(data):
        return None
    views = {}
    for key, entry in entries.items():
        flat = _view(data, start + entry.data_offsets[0], math.prod(entry.shape))
        views[key] = flat.view(entry.shape)
    return views


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor's entry in the header of a safetensors file."""

    dtype: str
    shape: list[Annotated[int, msgspec.Meta(ge=0, le=2**40)]]
    data_offsets: tuple[int, int]


def _view(data: bytes, start: int, count: int) -> Tensor:
    """Return float32 numbers in bytes as a tensor that shares their memory."""
    if not count:
        return torch.zeros(0)
    with warnings.catch_warnings():
        # torch warns that the bytes could be written to through the tensor.
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=torch.float32, count=count, offset=start)


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading its tensors.

    Raises:
        PayloadError: If the header is too long or not JSON.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if length > min(MAX_HEADER_BYTES, file.stat().st_size - LENGTH_BYTES):
            raise PayloadError(
                f"{file}: the header claims {length} bytes, more than the file holds"
            )
        header = opened.read(length)
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except INVALID as error:
        raise PayloadError(f"{file}: not safetensors: {error}") from error
    return metadata if isinstance(metadata, dict) else {}


def is_finite(tensor: Tensor) -> bool:
    """Return whether a floating-point tensor contains neither NaN nor infinity.

    No second tensor of its size is allocated.
    """
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # aminmax does not support float8
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def bytes_to_tensor(data: bytes) -> Tensor:
    """Return bytes as a uint8 tensor, to be sent along with tensors."""
    if not data:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
