"""Client names: which ones are allowed, and the one rule that converts a name into a path.

A client is named in a configuration, in a column of data or by its key, so a name is untrusted
text: `a/b`, `..`, `*`, or both `north` and `north-2`. No other module puts a name into a path, and
none searches for files by a pattern that holds a name.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from fedmomentum.errors import ConfigError, FedMomentumError
from fedmomentum.utils.text import printable

MAX_LENGTH = 256
"""Characters in a name: as many as the wire accepts in a label."""

# Names that are directories' names on every file system as they are.
_PLAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# With the tilde and the hash, a name stays well below the 255 bytes of a file system's names.
MAX_READABLE = 48
MAX_READABLE_LABEL = 150
# 96 bits: two names do not share a directory by accident.
HASH_DIGITS = 24


def check_client_name(name: Any, where: str, error: type[FedMomentumError] = ConfigError) -> None:
    """Refuse a name that cannot be shown, sent and stored as it is.

    Args:
        name: The name.
        where: Where it stands, for the message: a key of the configuration, a row of a file.
        error: The error to raise.

    Raises:
        FedMomentumError: If the name is not text, is empty or blank, is longer than `MAX_LENGTH`
            characters, or holds a control character, a line or paragraph separator, a direction
            override, or a lone surrogate.
    """
    if not isinstance(name, str) or not name.strip():
        raise error(
            f"{where}: a client has no name; it must be text that is not blank, got {name!r}"
        )
    if len(name) > MAX_LENGTH:
        raise error(
            f"{where}: a client's name has {len(name)} characters; at most {MAX_LENGTH} are "
            f"allowed. It begins with {printable(name, 40)!r}"
        )
    if printable(name, MAX_LENGTH) != name:
        raise error(
            f"{where}: the client's name {ascii(name)} holds a control character or another "
            "character that cannot be shown; rename the client"
        )


def directory_name(name: str) -> str:
    """Return the name of the directory (or file, before its ending) that belongs to a name.

    Different names have different directories, also on a file system that ignores case or
    normalizes Unicode. The result is at most 73 characters of ASCII and is never hidden, `.` or
    `..`. A plain name (lower-case ASCII letters, digits, dots, dashes and underscores, at most 64)
    is its own directory; any other gets what is readable of it, a tilde, which no plain name holds,
    and a hash of the complete name.
    """
    if _PLAIN.fullmatch(name):
        return name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:MAX_READABLE].lstrip(".-")
    return f"{readable or '_'}~{_hash(name)}"


def readable_name(label: str) -> str:
    """Return a label of the user's as a directory's name for people.

    All but ASCII letters, digits and dots become `-`; a long label is cut and gets a hash. Two
    labels may have one name; the caller must refuse that.
    """
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.") or "-"
    if len(readable) <= MAX_READABLE_LABEL:
        return readable
    return f"{readable[:MAX_READABLE_LABEL]}~{_hash(label)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
