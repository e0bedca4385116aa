"""The base model of an exported adapter, in a file beside it, since PEFT only records its name.

An adapter belongs to weights as they were in training. Without this file, nothing would show that
they were quantized on loading, and the adapter would silently be used on other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedmomentum.errors import AdapterError
from fedmomentum.formats.manifest import Base
from fedmomentum.utils.io import write_json
from fedmomentum.utils.records import read_file
from fedmomentum.utils.schema import Schema, parse_json

BASE_FILE = "fedmomentum_base.json"
FORMAT = "fedmomentum adapter base"
MAX_BYTES = 2**20
"""The largest size of such a file, which holds a few hashes and a classifier's labels."""


class AdapterBase(Schema, frozen=True, kw_only=True):
    """The content of the file.

    Attributes:
        format: Always the same.
        format_version: The version of this layout.
        base: The base model.
    """

    format: Literal["fedmomentum adapter base"]
    format_version: Literal[1]
    base: Base


def write_adapter_base(base: Mapping[str, Any], directory: Path) -> None:
    """Record which base model the adapter in a directory is for.

    Args:
        base: The fields of `Base`.
        directory: The adapter's directory.
    """
    write_json(directory / BASE_FILE, {"format": FORMAT, "format_version": 1, "base": dict(base)})


def read_adapter_base(directory: Path) -> Base | None:
    """Read which base model the adapter in a directory is for; None if it does not say.

    Raises:
        AdapterError: If the file is damaged, or of another version.
    """
    file = directory / BASE_FILE
    if not file.is_file():
        return None
    data = read_file(file, max_bytes=MAX_BYTES, error=AdapterError)
    return parse_json(data, AdapterBase, str(file), AdapterError).base
