"""Library and out-of-memory errors, translated into messages that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.utils.text import printable

# Messages of torch's allocators, whose errors have no specific type.
OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate",
)


@contextmanager
def translate_library_errors(what: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Turn any error of a library within the block into a `ModelError`.

    Args:
        what: The beginning of the message.
        config: The JSON in which `auto_map` would refer to code in the directory.

    Raises:
        ModelError: If the block raises anything but a `FedMomentumError`.
    """
    try:
        yield
    except FedMomentumError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {_reason(error, config)}") from error


def _reason(error: Exception, config: Mapping[str, Any]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if is_out_of_memory(error):
        return _describe_out_of_memory(error)
    if isinstance(error, ImportError):
        return f"a library is missing: {printable(' '.join(lines))}"
    if config.get("auto_map") and "trust_remote_code" in str(error):
        return (
            "it needs code from its directory (auto_map), which is never run, and transformers "
            "does not include this architecture. Use a model that transformers supports"
        )
    return printable(lines[0]) if lines else type(error).__name__


@contextmanager
def translate_out_of_memory(what: str) -> Iterator[None]:
    """Turn running out of memory, on any device, into a `ModelError` that begins with `what`.

    Raises:
        ModelError: If the block runs out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(f"{what}: {_describe_out_of_memory(error)}") from error


def _describe_out_of_memory(error: BaseException) -> str:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"out of memory ({printable(first_line, 200)}). Choose a smaller model, dtype bfloat16, or "
        "a device with more memory, and close other programs that use it"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(part in text for part in OUT_OF_MEMORY_TEXTS)
