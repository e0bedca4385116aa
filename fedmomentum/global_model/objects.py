"""Content-addressed objects: files named by the SHA-256 of their bytes, and their matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmomentum.errors import DamagedObject, MissingObject, ModelError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.weighted_sum import exact_sum
from fedmomentum.utils.io import sha256, write_atomically
from fedmomentum.utils.records import read_file
from fedmomentum.utils.tensors import is_finite, safetensors_bytes, view_safetensors

if TYPE_CHECKING:
    from fedmomentum.linalg.matrix import Matrix


# The largest object that is read if its size is unknown; no model has such large matrices.
MAX_OBJECT_BYTES = 2**40

# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def object_file(directory: Path, name: str) -> Path:
    """Return the file of an object.

    Raises:
        ModelError: If `name` is not a SHA-256; otherwise, it could contain a path.
    """
    check_name(name)
    return directory / "objects" / f"{name}.safetensors"


def check_name(name: Any) -> None:
    """Refuse anything that is not the name of an object.

    Raises:
        ModelError: If it is not 64 hexadecimal digits.
    """
    if not isinstance(name, str) or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        raise ModelError(f"{str(name)[:80]!r} is no SHA-256; object names are hashes")


def save_objects(objects: Mapping[str, bytes], directory: Path) -> None:
    """Write the given objects, bytes keyed by hash, that are missing or damaged on disk."""
    (directory / "objects").mkdir(parents=True, exist_ok=True)
    for name, data in objects.items():
        file = object_file(directory, name)
        if not file.is_file() or file.stat().st_size != len(data) or file.read_bytes() != data:
            write_atomically(file, data)


def read_object(directory: Path, name: str, size: int | None = None) -> bytes:
    """Return the bytes of an object, checked against its hash.

    Args:
        directory: The directory that holds `objects/`.
        name: The SHA-256 of the bytes.
        size: The number of bytes, if known; a file of another size is refused without reading it.

    Raises:
        MissingObject: If there is no such file.
        DamagedObject: If the bytes have another hash, or the file cannot be read.
    """
    file = object_file(directory, name)
    try:
        if size is not None and file.is_file() and file.stat().st_size != size:
            raise DamagedObject(
                f"object {file} has {file.stat().st_size} bytes, {size} were written"
            )
        max_bytes = MAX_OBJECT_BYTES if size is None else size
        data = read_file(file, max_bytes=max_bytes, error=DamagedObject)
    except FileNotFoundError:
        raise _missing(directory, name) from None
    if sha256(data) != name:
        raise DamagedObject(f"object {file} does not match its hash; it was damaged or altered")
    return data


def object_size(directory: Path, name: str) -> int:
    """Return the number of bytes of an object.

    Raises:
        MissingObject: If there is no such file.
    """
    file = object_file(directory, name)
    if not file.is_file():
        raise _missing(directory, name)
    return file.stat().st_size


def prune_objects(directory: Path, retained: set[str]) -> None:
    """Delete all objects but these."""
    for file in (directory / "objects").glob("*.safetensors"):
        if file.stem not in retained and (file.is_file() or file.is_symlink()):
            file.unlink()


def _missing(directory: Path, name: str) -> MissingObject:
    return MissingObject(
        f"{directory} does not hold the object {name[:16]}...; was the directory copied in part?"
    )


# ── matrices ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StoredObject:
    """Matrices by module, as the bytes that are sent and stored.

    The tensors are `<module>.B` and `<module>.A` for a low-rank matrix and `<module>.dense` for a
    dense one, in float32 and in effective-weight units: they are added to the base with factor 1.

    Attributes:
        data: The bytes of a safetensors file.
    """

    data: bytes = field(repr=False)

    @cached_property
    def name(self) -> str:
        """The SHA-256 of the bytes."""
        return sha256(self.data)

    @classmethod
    def read(cls, directory: Path, name: str, size: int | None = None) -> StoredObject:
        """Read an object; its bytes are hashed once (see `read_object`).

        Raises:
            MissingObject: If it is missing or damaged.
        """
        stored = cls(read_object(directory, name, size))
        stored.__dict__["name"] = name  # read_object has already verified the hash
        return stored

    @classmethod
    def of(cls, matrices: Mapping[str, Matrix]) -> StoredObject:
        """Return the object of these matrices, cast to float32."""
        tensors = {}
        # On the CPU and in float32, so that the bytes depend only on the values.
        for module, matrix in matrices.items():
            if isinstance(matrix, LowRank):
                tensors[f"{module}.B"] = matrix.B.to(torch.float32).cpu()
                tensors[f"{module}.A"] = matrix.A.to(torch.float32).cpu()
            else:
                tensors[f"{module}.dense"] = matrix.to(torch.float32).cpu()
        return cls(safetensors_bytes(tensors))

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Module to its matrix, `(out, in)`: views of the bytes, which must not be modified.

        Raises:
            PayloadError: If the bytes are not a safetensors file.
            ModelError: If tensors do not have the form above, or are not finite.
        """
        name = f"object {self.name[:16]}"
        tensors = view_safetensors(self.data, name)
        for key, tensor in tensors.items():
            check_matrix(tensor, f"{name}: tensor {key}")
        # In sorted order, A comes before B: pairs are read at their A; a B is only checked.
        matrices: dict[str, Matrix] = {}
        for key in sorted(tensors):
            module, _, kind = key.rpartition(".")
            if kind == "dense":
                if module in matrices:
                    raise ModelError(f"{name} holds module {module} both in factors and dense")
                matrices[module] = tensors[key]
            elif kind == "A" and f"{module}.B" in tensors:
                B = tensors[f"{module}.B"]
                matrices[module] = _low_rank(B, tensors[key], f"{name}: module {module}")
            elif kind != "B" or f"{module}.A" not in tensors:
                raise ModelError(f"{name} holds {key}, which is no part of a base update")
        return matrices

    @property
    def num_parameters(self) -> int:
        """The number of elements of all factors and dense matrices."""
        total = 0
        for matrix in self.matrices.values():
            if isinstance(matrix, LowRank):
                total += matrix.B.numel() + matrix.A.numel()
            else:
                total += matrix.numel()
        return total


def check_matrix(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that is not a finite float32 matrix.

    Raises:
        ModelError: If it is not; the message begins with `name`.
    """
    if tensor.dtype != torch.float32 or tensor.ndim != 2:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(f"{name} is {dtype} {tuple(tensor.shape)}; wanted a float32 matrix")
    if not is_finite(tensor):
        raise ModelError(f"{name} holds NaN or Inf")


def _low_rank(B: Tensor, A: Tensor, name: str) -> LowRank:
    try:
        return LowRank(B, A)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error


def sum_objects(objects: Sequence[StoredObject]) -> dict[str, Matrix]:
    """Return the sum of each module's matrices."""
    totals = {}
    for module, terms in group_by_module(objects).items():
        totals[module] = terms[0] if len(terms) == 1 else exact_sum([], [], terms)
    return totals


def group_by_module(objects: Sequence[StoredObject]) -> dict[str, list[Matrix]]:
    """Return each module's matrices, in the order of the objects; modules are sorted."""
    terms: dict[str, list[Matrix]] = {}
    for stored in objects:
        for module, matrix in stored.matrices.items():
            terms.setdefault(module, []).append(matrix)
    return dict(sorted(terms.items()))
