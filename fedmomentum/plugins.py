"""What users bring along: an object by `module:name`, from their environment or the working folder."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from fedmomentum.errors import ConfigError


def imported(reference: str, key: str) -> Any:
    """The object that `module:name` stands for.

    Raises:
        ConfigError: another form, or nothing of that name; `key` says where it was asked for.
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
