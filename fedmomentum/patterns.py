r"""PEFT's `rank_pattern` and `alpha_pattern`: module names as regular expressions, matched in linear time.

PEFT takes the value of the first key with `re.match(rf"(.*\.)?({key})$", module)`. Python's engine backtracks, and a
key such as `(a+)+b` can keep it busy for years. An adapter's configuration comes from strangers, so here keys without
special characters are looked up, and all others are matched by RE2, which needs time in proportion to the text. A key
that RE2 does not take, or might take in another sense than Python, is refused by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import re2

from fedmomentum.errors import AdapterError
from fedmomentum.schema import printable

V = TypeVar("V")

MAX_KEY_LENGTH = 1000
MAX_EXPRESSIONS = 1000
"""Keys of one table that are more than names. Written by hand, they are a few."""
MAX_WORK = 2_000_000
"""Expressions times modules. More would take seconds."""
_PLAIN = re.compile(r"[A-Za-z0-9_.\-/]+")
_OTHER_SENSE = ("{,", "[:", "[.", "[=")
"""What Python and RE2 read differently: `{,3}` is literal in RE2, `[:alpha:]` is no class in Python."""


class Patterns(Generic[V]):
    """A `rank_pattern` or `alpha_pattern`.

    Args:
        table: key to value, in the order that counts.
        field: its name in the configuration.
        name: what to call the adapter in messages.

    Raises:
        AdapterError: If a key is no regular expression, or one that cannot be matched in linear time.
    """

    def __init__(self, table: Mapping[str, V], field: str, name: str) -> None:
        self._table = table
        self._where = f"{name}: {field}"
        self._work = 0
        # Plain keys by where they have points, which stand for any character: (length, points) -> masked key -> number
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._expressions: list[tuple[int, Any]] = []
        self._values = list(table.values())
        for number, key in enumerate(table):
            if len(key) > MAX_KEY_LENGTH:
                raise AdapterError(
                    f"{self._where} has a key of {len(key)} characters; at most {MAX_KEY_LENGTH} are taken"
                )
            if _PLAIN.fullmatch(key):
                points = tuple(at for at, character in enumerate(key) if character == ".")
                self._plain.setdefault((len(key), points), {}).setdefault(key, number)
            else:
                self._expressions.append((number, self._compiled(key)))
        if len(self._expressions) > MAX_EXPRESSIONS:
            raise AdapterError(
                f"{self._where} has {len(self._expressions)} regular expressions; at most {MAX_EXPRESSIONS} are taken. "
                "Name the modules in full"
            )

    def _compiled(self, key: str) -> Any:
        """The expression in RE2; it must be one for Python as well, and mean the same there."""
        whole = rf"(.*\.)?({key})$"
        shown = f"{self._where} has the key {printable(key, 100)!r}, which is"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # Python's own word for: may change its sense
                re.compile(whole)
        except (re.error, RecursionError, OverflowError, FutureWarning, ValueError) as error:
            raise AdapterError(f"{shown} no regular expression: {error}") from error
        refused = f"{shown} not matched here"
        if not key.isascii() or any(part in key for part in _OTHER_SENSE):
            raise AdapterError(f"{refused}; use plain characters, or name the modules in full")
        options = re2.Options()
        options.log_errors = False
        options.max_mem = 2**21
        try:
            return re2.compile(whole, options)
        except re2.error as error:
            text = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
            raise AdapterError(
                f"{refused} ({printable(text, 100)}): look-around and back-references can take for ever. Name the "
                "modules in full"
            ) from error

    def find(self, module: str, default: V) -> V:
        """Return the value of the first key that matches a module, or the default.

        Raises:
            AdapterError: If the module's name is not ASCII and there are expressions, or if they are too many to try.
        """
        best = len(self._values)
        self._work += len(self._plain) + len(self._expressions)
        if self._work > MAX_WORK:
            raise AdapterError(f"{self._where} has too many keys for so many modules; leave out what is not needed")
        for (length, points), keys in self._plain.items():
            number = keys.get(_masked(module, length, points), best)
            best = min(best, number)
        if self._expressions and not module.isascii():
            raise AdapterError(f"{self._where} has regular expressions, and module {printable(module)} is not ASCII")
        for number, expression in self._expressions:
            if number > best:
                break
            if expression.match(module):
                best = number
                break
        if best < len(self._values):
            return self._values[best]
        return self._table.get(module, default)  # as PEFT: a key that is the module's name, whatever it means


def _masked(module: str, length: int, points: tuple[int, ...]) -> str:
    """The end of a module's path with points where the key has them; empty if the key cannot end it."""
    start = len(module) - length
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return ""
    end = module[start:]
    if all(end[at] == "." for at in points):
        return end
    characters = list(end)
    for at in points:
        characters[at] = "."
    return "".join(characters)
