"""A ClientApp for existing SuperNodes: it answers the tasks of `app_server`.

Flower starts a process for each message, so this module and what it imports load in a second:
torch and the base model are in a worker that outlives the message (`warm_worker`).
"""

from __future__ import annotations

import logging
import sys
from typing import cast

from flwr.app import ConfigRecord, Context
from flwr.clientapp import ClientApp

from fedmomentum.errors import ConfigError
from fedmomentum.flower.app_settings import AppNode, read_node
from fedmomentum.flower.apps import client_app
from fedmomentum.flower.node_callback import NodeCallback
from fedmomentum.flower.warm_worker import WarmProcess
from fedmomentum.flower.worker import Worker
from fedmomentum.utils.process import wait_briefly

LOG = logging.getLogger("fedmomentum")
STATE = "fedmomentum"
"""The record of the node's state, which Flower keeps between messages, with the client's name."""


def make_client_app() -> ClientApp:
    """Return a ClientApp that plays one client; node config and run config say which.

    ::

        app = make_client_app()
    """
    # before torch is loaded, here or in a process that this one starts
    wait_briefly()
    return client_app(_answer, _name)


def _name(context: Context) -> str:
    """Return the client's name; its worker begins to load the base model meanwhile."""
    node = read_node(context.run_config, context.node_config)
    name = _client_name(node, context)
    if node.keep_warm > 0 and not _process_lives_on():
        worker = _worker(node, name)
        worker.start()
        worker.stop()
    return name


def _answer(payload: bytes, timeout: float, context: Context) -> bytes:
    node = read_node(context.run_config, context.node_config)
    name = _client_name(node, context)
    if _process_lives_on():
        # Imported where this process holds the model itself.
        from fedmomentum.flower.process_clients import answer_here

        return answer_here(node.config, name, node.store(name), payload)
    worker = _worker(node, name)
    try:
        return worker.run_task(payload, timeout)
    finally:
        worker.stop()


def _worker(node: AppNode, name: str) -> Worker:
    store = node.store(name)
    return Worker(node.config, name, store, _NodeLog(), process=WarmProcess(store, node.keep_warm))


def _process_lives_on() -> bool:
    """Return whether this is a process of Flower's simulation engine, which answers many tasks."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _client_name(node: AppNode, context: Context) -> str:
    """Return which client a node plays.

    Raises:
        ConfigError: If the run's data has not so many clients.
    """
    if node.name is not None:
        return node.name
    # The run's data has the names, and is read once for them.
    if STATE in context.state:
        return cast(str, context.state.config_records[STATE]["name"])
    from fedmomentum.run.client_setup import client_names

    names = client_names(node.config)
    if node.partition_id >= len(names):
        raise ConfigError(
            f"partition-id is {node.partition_id}, and the run's data has the clients "
            f"{', '.join(names)}, numbered from 0; start as many nodes as there are clients"
        )
    name = names[node.partition_id]
    context.state[STATE] = ConfigRecord({"name": name})
    return name


class _NodeLog(NodeCallback):
    """Passes what a worker reports on to the node's log."""

    def on_warning(self, text: str) -> None:
        """Log a warning that concerns this node's data."""
        LOG.warning(text)
