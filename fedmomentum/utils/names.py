"""Client names: which ones are allowed, and the only rule that converts a name into a path.

Client names come from a configuration, a data column or a key file, so they are untrusted text:
`a/b`, `..`, `*`, or both `north` and `north-2`. No other module puts a name into a path, and none
searches for files by a pattern that contains a name.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from fedmomentum.errors import ConfigError, FedMomentumError
from fedmomentum.utils.text import printable

MAX_LENGTH = 256
"""The most characters in a name: as many as the protocol accepts in a label."""

# Names that are valid directory names on every file system.
_PLAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# With the tilde and the hash, this stays well below a file system's limit of 255 bytes.
MAX_READABLE = 48
MAX_READABLE_LABEL = 150
# 96 bits, so that two names never share a directory by accident.
HASH_DIGITS = 24


def check_client_name(name: Any, where: str, error: type[FedMomentumError] = ConfigError) -> None:
    """Reject a name that cannot be displayed, sent and stored unchanged.

    Args:
        name: The name.
        where: Where it comes from, for the message: a configuration key, a row of a file.
        error: The error to raise.

    Raises:
        FedMomentumError: If the name is not text, is empty or blank, is longer than `MAX_LENGTH`
            characters, or contains a control character, a line or paragraph separator, a direction
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
    """Convert a name into the name of its directory (or file, without the extension).

    Different names get different directories, even on file systems that ignore case or normalize
    Unicode. The result has at most 73 ASCII characters and is never hidden, `.` or `..`. A plain
    name (lower-case ASCII letters, digits, dots, dashes and underscores, at most 64) is used as it
    is; any other becomes its readable part, a tilde, which no plain name contains, and a hash of
    the full name.
    """
    if _PLAIN.fullmatch(name):
        return name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:MAX_READABLE].lstrip(".-")
    return f"{readable or '_'}~{_hash(name)}"


def readable_name(label: str) -> str:
    """Convert a user's label into a readable directory name.

    Everything but ASCII letters, digits and dots becomes `-`; a long label is truncated and gets a
    hash. Two labels may have the same result; the caller must reject that.
    """
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.") or "-"
    if len(readable) <= MAX_READABLE_LABEL:
        return readable
    return f"{readable[:MAX_READABLE_LABEL]}~{_hash(label)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
