"""The files of client state: tensors, and a header with a checksum of the file's content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import msgspec
from torch import Tensor

from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.utils.io import sha256
from fedmomentum.utils.schema import Count, Hash, Label, Schema, parse_json
from fedmomentum.utils.tensors import read_metadata, read_safetensors, safetensors_bytes


class StateHeader(Schema, frozen=True, kw_only=True):
    """The header of every file of client state.

    Attributes:
        client: The client's name.
        run_id: The run's identifier on the wire.
        round: The round of training after which it was saved.
        sha256: The checksum; None while it is computed.
    """

    client: Label
    run_id: Label
    round: Count
    sha256: Hash | None = None


H = TypeVar("H", bound=StateHeader)


class StateFile:
    """What every kind of client state has in common: how its files name the client.

    Attributes:
        KEY: The key of the only metadata entry in a file.
        HEADER: The type of the header.
    """

    KEY: ClassVar[str]
    HEADER: ClassVar[type[StateHeader]] = StateHeader

    @classmethod
    def read_client(cls, file: Path) -> str:
        """Return the client that a file names, without reading all of it.

        Raises:
            FedMomentumError: If the file is damaged.
        """
        return read_header(file, cls.KEY, cls.HEADER).client


def encode_state(key: str, header: StateHeader, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a file.

    Args:
        key: The key of the only metadata entry.
        header: The header, without a checksum.
        tensors: The state.
    """
    checked = msgspec.structs.replace(header, sha256=_digest(header, tensors))
    return safetensors_bytes(tensors, (key, _json(checked)))


def read_state(
    file: Path, key: str, header_type: type[H], title: str
) -> tuple[H, dict[str, Tensor]]:
    """Read and check a file.

    Args:
        file: The file.
        key: The key of the only metadata entry.
        header_type: The type of the header.
        title: What messages call the state, such as `own factors`.

    Raises:
        ModelError: If the file is missing or damaged.
    """
    try:
        header = read_header(file, key, header_type)
        tensors, _ = read_safetensors(file.read_bytes(), str(file))
        if _digest(header, tensors) != header.sha256:
            raise ModelError(f"{file} does not match its checksum")
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except FedMomentumError as error:
        raise ModelError(
            f"a client's {title} are damaged: {error}. Restore the file from a copy; without it "
            "this client cannot continue where it stopped"
        ) from error
    return header, tensors


def read_header(file: Path, key: str, header_type: type[H]) -> H:
    """Read the header of a file, without its tensors.

    Raises:
        ModelError: If the file is missing or its header is damaged.
        FedMomentumError: If it is not a safetensors file.
    """
    try:
        if not file.is_file():
            raise ModelError(f"{file} is no regular file")
        metadata = read_metadata(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    return parse_json(str(metadata.get(key, "")), header_type, str(file), ModelError)


def _json(header: StateHeader) -> str:
    return json.dumps(msgspec.structs.asdict(header), sort_keys=True)


def _digest(header: StateHeader, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash over everything in a file except the hash itself."""
    unsigned = msgspec.structs.replace(header, sha256=None)
    return sha256(_json(unsigned).encode() + safetensors_bytes(tensors))
