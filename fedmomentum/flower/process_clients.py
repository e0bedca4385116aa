"""Clients played within a process of Flower's simulation engine, whose processes stay alive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.run.client_setup import prepare_client

if TYPE_CHECKING:
    from fedmomentum.client.client import Client
    from fedmomentum.config.schema import Config

_CLIENTS: dict[str, Client] = {}
"""The clients of this process, which share one base model and live as long as the run."""


def answer_here(config: Config, name: str, store: Path, payload: bytes) -> bytes:
    """Answer a task as a client, loading its data and model on first use.

    Args:
        config: The run's configuration.
        name: The client.
        store: The client's directory.
        payload: The encoded task.
    """
    if name not in _CLIENTS:
        # All clients of a process share one base model and one object cache.
        first = next(iter(_CLIENTS.values()), None)
        shared = None if first is None else first.model
        client = prepare_client(config, name, store, local=shared)
        if first is not None:
            client.store.cache = first.store.cache
        _CLIENTS[name] = client
    return _CLIENTS[name].handle(payload)
