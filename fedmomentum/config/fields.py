"""Fields of a section of the configuration: defaults with their documentation, and checks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from fedmomentum.errors import ConfigError
from fedmomentum.utils.schema import check_free_form
from fedmomentum.utils.text import printable

MAX_SHOWN = 200
"""Characters of a refused value that a message shows: a path fits, a pasted file does not."""


def option(default: Any, doc: str) -> Any:
    """Declare a key of the configuration with its default and its documentation."""
    if isinstance(default, (dict, list)):
        # Each configuration gets a container of its own.
        return dataclasses.field(
            default_factory=lambda: type(default)(default),
            metadata={"doc": doc},
        )
    return dataclasses.field(default=default, metadata={"doc": doc})


def describe_value(value: Any) -> str:
    """Return a value as a message shows it: on one line, and cut where it is long."""
    return printable(repr(value), MAX_SHOWN)


def require(is_valid: bool, key: str, value: Any, wanted: str) -> None:
    """Refuse a value that does not satisfy a condition.

    Args:
        is_valid: Whether the condition holds.
        key: The key of the configuration, as the user wrote it.
        value: The value given.
        wanted: What the value must be, completing the phrase "must be".

    Raises:
        ConfigError: If the condition does not hold.
    """
    if not is_valid:
        raise ConfigError(f"{printable(key)} must be {wanted}; got {describe_value(value)}")


def require_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ConfigError: If the value is none of the choices.
    """
    *others, last = choices
    require(value in choices, key, value, f"{', '.join(others)} or {last}")


def require_fraction(key: str, value: float) -> None:
    """Refuse a value outside (0, 1].

    Raises:
        ConfigError: If the value is outside.
    """
    require(0 < value <= 1, key, value, "in (0, 1]")


def require_at_least(key: str, value: float, minimum: int) -> None:
    """Refuse a value below a minimum.

    Raises:
        ConfigError: If the value is below the minimum.
    """
    wanted = f"at least {minimum}" if minimum else "0 or more"
    require(value >= minimum, key, value, wanted)


def check_modules(key: str, value: Any) -> None:
    """Refuse what cannot stand for modules: neither names nor a regular expression.

    Raises:
        ConfigError: If it is of another type, or Python cannot compile the expression.
    """
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            wanted = f"all-linear, attention or a regular expression ({error})"
            require(False, key, value, wanted)
        return
    are_names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    require(are_names, key, value, "a list of names, or a text")
    require("" not in value, key, value, "a list of names that are not empty")


def check_numbers(value: Any, key: str) -> None:
    """Refuse numbers that are not finite or do not fit 64 bits, at any depth of a value.

    Args:
        value: A value of any type; tables and lists are searched.
        key: The key of the configuration, as the user wrote it.

    Raises:
        ConfigError: If there is such a number, or tables are nested deeper than any setting is.
    """
    check_free_form(value, key, ConfigError)
    # Not recursively, so that a message can name the key at any depth.
    pending: list[tuple[str, Any]] = [(key, value)]
    while pending:
        name, item = pending.pop()
        if isinstance(item, Mapping):
            pending.extend((f"{name}.{part}", inner) for part, inner in item.items())
        elif isinstance(item, (list, tuple)):
            pending.extend((name, inner) for inner in item)
        elif isinstance(item, float):
            require(math.isfinite(item), name, item, "a finite number")
        elif isinstance(item, int):
            require(
                -(2**63) <= item < 2**63,
                name,
                "a number of more than 64 bits",
                "a whole number of at most 64 bits",
            )
