r"""PEFT's `rank_pattern` and `alpha_pattern`, matched in linear time.

PEFT takes the value of the first key with `re.match(rf"(.*\.)?({key})$", module)`. Python's engine
backtracks, so a key such as `(a+)+b` can keep it busy for years. An adapter's configuration is
untrusted, so here keys without special characters are looked up, and all others are matched by RE2,
which takes time linear in the text. Keys that RE2 does not accept, or may interpret differently
from Python, are rejected by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import re2

from fedmomentum.errors import AdapterError
from fedmomentum.utils.text import printable

V = TypeVar("V")

MAX_KEY_LENGTH = 1000
# Maximum number of regular expressions in one table; real tables have a few.
MAX_EXPRESSIONS = 1000
# Maximum number of expressions times modules; more would take seconds.
MAX_WORK = 2_000_000
# Bytes that RE2 may use for one expression.
MAX_RE2_MEMORY = 2**21
_PLAIN = re.compile(r"[A-Za-z0-9_.\-/]+")
# Python and RE2 disagree on these: `{,3}` is literal in RE2, `[:alpha:]` is no class in Python.
_AMBIGUOUS = ("{,", "[:", "[.", "[=")


class Patterns(Generic[V]):
    """A `rank_pattern` or `alpha_pattern`.

    Args:
        table: Key to value; the first matching key wins.
        field: The table's name in the configuration.
        name: The adapter's name in messages.

    Raises:
        AdapterError: If a key is not a regular expression, or cannot be matched in linear time.
    """

    def __init__(self, table: Mapping[str, V], field: str, name: str) -> None:
        self._table = table
        self._where = f"{name}: {field}"
        self._work = 0
        self._values = list(table.values())
        # Plain keys by their length and the positions of their dots, which match any character:
        # (length, dots) -> key -> its position in the table.
        self._plain: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        self._expressions: list[tuple[int, Any]] = []
        for position, key in enumerate(table):
            if len(key) > MAX_KEY_LENGTH:
                raise AdapterError(
                    f"{self._where} has a key of {len(key)} characters; at most {MAX_KEY_LENGTH} "
                    "are supported"
                )
            if _PLAIN.fullmatch(key):
                points = tuple(at for at, character in enumerate(key) if character == ".")
                self._plain.setdefault((len(key), points), {}).setdefault(key, position)
            else:
                self._expressions.append((position, self._compile(key)))
        if len(self._expressions) > MAX_EXPRESSIONS:
            raise AdapterError(
                f"{self._where} has {len(self._expressions)} regular expressions; at most "
                f"{MAX_EXPRESSIONS} are supported. Name the modules in full"
            )

    def _compile(self, key: str) -> Any:
        """Compile a key with RE2; it must also be valid in Python, with the same meaning."""
        expression = rf"(.*\.)?({key})$"
        shown = f"{self._where} has the key {printable(key, 100)!r}, which is"
        try:
            with warnings.catch_warnings():
                # Python warns about expressions whose meaning may change.
                warnings.simplefilter("error", FutureWarning)
                re.compile(expression)
        except (re.error, RecursionError, OverflowError, FutureWarning, ValueError) as error:
            raise AdapterError(f"{shown} no regular expression: {error}") from error
        if not key.isascii() or any(part in key for part in _AMBIGUOUS):
            raise AdapterError(
                f"{shown} not supported; use plain characters, or name the modules in full"
            )
        options = re2.Options()
        options.log_errors = False
        options.max_mem = MAX_RE2_MEMORY
        try:
            return re2.compile(expression, options)
        except re2.error as error:
            reason = error.args[0]
            text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(error)
            raise AdapterError(
                f"{shown} not supported ({printable(text, 100)}): look-around and back-references "
                "can take exponential time. Name the modules in full"
            ) from error

    def find(self, module: str, default: V) -> V:
        """Return the value of the first key that matches a module, or the default.

        Raises:
            AdapterError: If the module's name is not ASCII and there are expressions, or if there
                are too many keys to try.
        """
        self._work += len(self._plain) + len(self._expressions)
        if self._work > MAX_WORK:
            raise AdapterError(
                f"{self._where} has too many keys for so many modules; remove those that are not "
                "needed"
            )
        position = len(self._values)
        for (length, points), positions in self._plain.items():
            plain_position = positions.get(_masked_ending(module, length, points), position)
            position = min(position, plain_position)
        if self._expressions and not module.isascii():
            raise AdapterError(
                f"{self._where} has regular expressions, and module {printable(module)} is not "
                "ASCII"
            )
        for expression_position, expression in self._expressions:
            if expression_position > position:
                break
            if expression.match(module):
                position = expression_position
                break
        if position < len(self._values):
            return self._values[position]
        # As in PEFT: a key equal to the module's name matches, whatever it means as an expression.
        return self._table.get(module, default)


def _masked_ending(module: str, length: int, points: tuple[int, ...]) -> str:
    """Return the end of a module's path, with dots wherever the key has them.

    Returns:
        The last `length` characters; empty if they do not start at a component of the path.
    """
    start = len(module) - length
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return ""
    ending = module[start:]
    if all(ending[at] == "." for at in points):
        return ending
    characters = list(ending)
    for at in points:
        characters[at] = "."
    return "".join(characters)
