"""User-defined objects, named `module:name`, from the environment or the working directory."""

from __future__ import annotations

import importlib
import os
import sys
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
