"""Clients that a process plays itself: in Flower's simulation engine, whose processes live on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.run.client_setup import prepare_client

if TYPE_CHECKING:
    from fedmomentum.client.client import Client
    from fedmomentum.config.schema import Config

_CLIENTS: dict[str, Client] = {}
"""The clients of this process, which lives as long as the run; they share one base model."""


def answer_here(config: Config, name: str, store: Path, payload: bytes) -> bytes:
    """Answer a task as a client, whose data and model are loaded when it is first asked.

    Args:
        config: The run's configuration.
        name: The client.
        store: The client's directory.
        payload: The encoded task.
    """
    if name not in _CLIENTS:
        # One base model, and one cache of objects, serve all clients of a process.
        first = next(iter(_CLIENTS.values()), None)
        shared = None if first is None else first.model
        client = prepare_client(config, name, store, local=shared)
        if first is not None:
            client.store.cache = first.store.cache
        _CLIENTS[name] = client
    return _CLIENTS[name].handle(payload)
