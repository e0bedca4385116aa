"""How many connections there may be, and for how long; and how many files a process may open."""

from __future__ import annotations

import resource
from dataclasses import dataclass

MAX_OPEN_FILES = 65536
"""The limit of open files that is requested; more connections than this are never needed."""
MAX_CONNECTIONS = 4096
"""Connections in total, where the limit of open files allows it."""


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections there may be, and for how long.

    Attributes:
        max_connections: Connections in total, nodes' and strangers'.
        max_strangers: Connections over which no signed request has come.
        max_per_address: Strangers' connections from one address.
        max_per_node: Connections over which the last request was one node's.
        stranger_seconds: How long a stranger's connection lives.
        handshake_seconds: How long a TLS handshake may take; at most as long as a stranger's
            connection lives.
        idle_seconds: How long a node's connection may go without a complete request.
    """

    max_connections: int
    max_strangers: int = 128
    max_per_address: int = 32
    max_per_node: int = 32
    stranger_seconds: float = 15.0
    handshake_seconds: float = 10.0
    idle_seconds: float = 60.0


def raise_file_limit() -> int:
    """Raise the process's limit of open files as far as the process may; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    # a process may raise its soft limit up to the hard one
    if soft != resource.RLIM_INFINITY and soft < target:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        except (OSError, ValueError):
            return soft
        return target
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def default_limits() -> ConnectionLimits:
    """Return limits that leave half of the files that may be open to the run."""
    max_connections = min(MAX_CONNECTIONS, raise_file_limit() // 2)
    return ConnectionLimits(
        max_connections=max_connections,
        max_strangers=min(128, max_connections // 2),
        max_per_address=min(32, max_connections // 4),
    )
