"""User-defined objects, named `module:name`, from the environment or the working directory."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from fedmomentum.errors import ConfigError


def import_object(reference: str, key: str) -> Any:
    """Import the object that `module:name` refers to.

    The working directory is searched first.

    Args:
        reference: The reference.
        key: The configuration key that contains it, for error messages.

    Raises:
        ConfigError: If the reference is malformed, or nothing of that name can be imported.
    """
    module, colon, name = reference.partition(":")
    if not colon:
        raise ConfigError(f"{key} must be module:name; got {reference!r}")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key} {reference!r} cannot be imported: {error}") from error
    finally:
        sys.path.pop(0)


def place_of(error: BaseException) -> str:
    """Return where the user's code raised an error or called what did: file, line and function.

    That is the last frame outside of this package, the standard library and installed packages; if
    there is none, the last frame.
    """
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    libraries = [*paths, str(Path(__file__).parents[1])]
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith("<frozen")
        and not any(Path(frame.filename).is_relative_to(library) for library in libraries)
    ]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
