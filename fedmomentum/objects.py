"""A folder of objects: files that are named by the SHA-256 of their bytes, and checked whenever they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmomentum.errors import DamagedObject, MissingObject, ModelError
from fedmomentum.files import sha256, write_atomically
from fedmomentum.records import read_file

MAX_OBJECT_BYTES = 2**40


def object_file(folder: Path, name: str) -> Path:
    """Where an object lies; `name` is checked to be a hash, so that no path can hide in it.

    Raises:
        ModelError: not 64 hexadecimal digits.
    """
    check_name(name)
    return folder / "objects" / f"{name}.safetensors"


def check_name(name: Any) -> None:
    """Refuse what is no object's name.

    Raises:
        ModelError: not 64 hexadecimal digits.
    """
    if not isinstance(name, str) or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        raise ModelError(f"{str(name)[:80]!r} is no SHA-256; object names are hashes")


def save_objects(objects: Mapping[str, bytes], folder: Path) -> None:
    """Write the objects that are not there yet, or not whole."""
    (folder / "objects").mkdir(parents=True, exist_ok=True)
    for name, data in objects.items():
        file = object_file(folder, name)
        if not file.is_file() or file.stat().st_size != len(data) or file.read_bytes() != data:
            write_atomically(file, data)


def read_object(folder: Path, name: str, size: int | None = None) -> bytes:
    """Return the bytes of an object, which are what its name says.

    Args:
        folder: holds `objects/`.
        name: the SHA-256 of the bytes.
        size: how many bytes it has, where that is known; a file of another size is refused unread.

    Raises:
        MissingObject: If it is not there.
        DamagedObject: If the bytes have another hash, or the file is none that can be read.
    """
    file = object_file(folder, name)
    try:
        if size is not None and file.is_file() and file.stat().st_size != size:
            raise DamagedObject(f"object {file} has {file.stat().st_size} bytes, {size} were written")
        data = read_file(file, max_bytes=MAX_OBJECT_BYTES if size is None else size, error=DamagedObject)
    except FileNotFoundError:
        raise MissingObject(f"{folder} lacks the object {name[:16]}...; was the folder copied in part?") from None
    if sha256(data) != name:
        raise DamagedObject(f"object {file} does not match its hash; it was damaged or altered")
    return data


def object_size(folder: Path, name: str) -> int:
    """How many bytes an object has.

    Raises:
        MissingObject: it is not there.
    """
    file = object_file(folder, name)
    if not file.is_file():
        raise MissingObject(f"{folder} lacks the object {name[:16]}...; was the folder copied in part?")
    return file.stat().st_size


def prune_objects(folder: Path, keep: set[str]) -> None:
    """Delete the objects that are not to be kept."""
    for file in (folder / "objects").glob("*.safetensors"):
        if file.stem not in keep and (file.is_file() or file.is_symlink()):
            file.unlink()
