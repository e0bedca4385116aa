"""PEFT tensors and base residuals as Flower `ArrayRecord`s, validated before use.

A Flower `Array` declares a dtype and shape alongside the bytes of a `.npy` file, but Flower does
not check that they agree. Here, both are compared with what is expected before memory is allocated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from torch import Tensor

from fedmomentum.errors import PayloadError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import Matrix
from fedmomentum.utils.tensors import is_finite
from fedmomentum.utils.text import printable

RESIDUAL_KEY = "base-residual"
"""The name of the `ArrayRecord` with what is added to the base weights."""
STATE_KEY = "base-residual-state"
"""The name of the `ConfigRecord` that identifies it: the number of rounds, and its SHA-256."""
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "bool": torch.bool,
}
"""The dtypes of PEFT state dicts that NumPy supports; it has no bfloat16."""
NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
SHOWN_NAME = 200


class ArraySpec(NamedTuple):
    """The expected form of an array."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as an `ArrayRecord`, in their order."""
    return ArrayRecord({key: Array(tensor.cpu().numpy()) for key, tensor in tensors.items()})


def read_tensors(
    record: ArrayRecord, name: str, expected: Mapping[str, ArraySpec] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of an `ArrayRecord`.

    Args:
        record: A record from any source.
        name: How error messages refer to its sender.
        expected: The exact set of expected arrays, by name; None to accept any names.

    Raises:
        PayloadError: If an array is missing, unknown, of the wrong shape or dtype, damaged, or not
            finite; the message names it, what was received and what was expected.
    """
    if expected is not None:
        # compare all names before reading the first array
        for key in sorted(expected.keys() | record.keys()):
            if key not in record:
                raise PayloadError(f"{name}: array {key} is missing")
            if key not in expected:
                raise PayloadError(
                    f"{name}: array {printable(key, SHOWN_NAME)} is unknown; the adapter has "
                    f"{len(expected)} arrays, not that one"
                )
    tensors = {}
    for key, array in record.items():
        where = f"{name}: array {printable(key, SHOWN_NAME)}"
        tensors[key] = _read_array(array, where, expected[key] if expected else None)
    return tensors


def _read_array(array: Array, name: str, expected: ArraySpec | None) -> Tensor:
    """Return one array as a tensor with its own memory."""
    if array.stype != "numpy.ndarray":
        raise PayloadError(f"{name} is stored as {printable(repr(array.stype), 40)}; wanted .npy")
    # the header is short text that can be read without loading the data
    stream = BytesIO(array.data)
    try:
        shape, is_fortran, dtype = NPY_HEADERS[npy.read_magic(stream)](stream)
    except Exception as error:  # numpy evaluates the header as Python text, and raises anything
        raise PayloadError(f"{name} is no .npy file") from error
    if dtype.name not in DTYPES or not dtype.isnative:
        raise PayloadError(
            f"{name} has dtype {printable(str(dtype), 40)}; supported are {', '.join(DTYPES)}"
        )
    if array.dtype != str(dtype) or tuple(array.shape) != shape:
        declared = printable(f"{array.dtype} {tuple(array.shape)}", 80)
        raise PayloadError(f"{name} declares {declared} and holds {dtype} {shape}")
    if expected is not None and (shape, DTYPES[dtype.name]) != expected:
        wanted = str(expected.dtype).removeprefix("torch.")
        raise PayloadError(f"{name} is {dtype} {shape}; wanted {wanted} {expected.shape}")
    # the bytes received must match the shape, so that no more memory than that is allocated
    start = stream.tell()
    num_bytes = math.prod(shape) * dtype.itemsize
    if any(side < 0 for side in shape) or len(array.data) - start != num_bytes:
        raise PayloadError(f"{name} holds {len(array.data) - start} bytes for {dtype} {shape}")
    flat = np.frombuffer(array.data, dtype, offset=start)
    tensor = torch.from_numpy(flat.reshape(shape, order="F" if is_fortran else "C").copy())
    if tensor.is_floating_point() and not is_finite(tensor):
        raise PayloadError(f"{name} holds NaN or Inf; its training diverged")
    return tensor


# ── base residuals ────────────────────────────────────────────────────────────────────────────────


def residual_record(residual: Mapping[str, Matrix], dtype: torch.dtype) -> ArrayRecord:
    """Return a base residual as arrays: `<module>.B` and `<module>.A`, or `<module>.dense`."""
    tensors = {}
    for module, matrix in sorted(residual.items()):
        if isinstance(matrix, LowRank):
            tensors[f"{module}.B"] = matrix.B.to(dtype)
            tensors[f"{module}.A"] = matrix.A.to(dtype)
        else:
            tensors[f"{module}.dense"] = matrix.to(dtype)
    return to_record(tensors)


def read_residual(
    record: ArrayRecord, shapes: Mapping[str, tuple[int, int]], name: str
) -> dict[str, Matrix]:
    """Return the matrices of a base residual.

    Args:
        record: A record from any source.
        shapes: `(out, in)` of every adapted module.
        name: How error messages refer to it.

    Raises:
        PayloadError: If an array does not belong to an adapted module or has the wrong shape.
    """
    tensors = read_tensors(record, name)
    residual: dict[str, Matrix] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        shown = printable(key, SHOWN_NAME)
        if module not in shapes or kind not in ("B", "A", "dense"):
            raise PayloadError(f"{name}: array {shown} is of no module that is adapted here")
        if kind == "dense":
            matrix: Matrix = tensor
        elif kind == "B" and f"{module}.A" in tensors and f"{module}.dense" not in tensors:
            matrix = _factors(tensor, tensors[f"{module}.A"], f"{name}: module {module}")
        elif f"{module}.B" in tensors and f"{module}.dense" not in tensors:
            continue  # the A of a pair, which is read with its B
        else:
            raise PayloadError(f"{name}: array {shown} has no other factor, or is there twice")
        if tuple(matrix.shape) != shapes[module] or not matrix.dtype.is_floating_point:
            raise PayloadError(
                f"{name}: module {module} is {matrix.dtype} {tuple(matrix.shape)}; wanted floating "
                f"point {shapes[module]}"
            )
        residual[module] = matrix
    return residual


def _factors(B: Tensor, A: Tensor, name: str) -> LowRank:
    try:
        return LowRank(B, A)
    except ValueError as error:
        raise PayloadError(f"{name}: {error}") from error


def digest(record: ArrayRecord) -> str:
    """Return the SHA-256 over the names and bytes of all arrays, in sorted order."""
    sha = hashlib.sha256()
    for key, array in sorted(record.items()):
        sha.update(f"{key} {len(array.data)}\n".encode(errors="backslashreplace"))
        sha.update(array.data)
    return sha.hexdigest()
