"""A ClientApp for existing SuperNodes, which answers the tasks of `app_server`.

Flower starts a process for each message, so this module and its imports must load within a second:
torch and the base model live in a worker that outlives the message (`warm_worker`).
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
"""The record of the node state (kept by Flower between messages) that holds the client's name."""


def make_client_app() -> ClientApp:
    """Return a ClientApp that plays one client, chosen by the node config and run config.

    ::

        app = make_client_app()
    """
    # before torch is loaded in this process or in one that it starts
    wait_briefly()
    return client_app(_answer, _name)


def _name(context: Context) -> str:
    """Return the client's name; meanwhile its worker starts to load the base model."""
    node = read_node(context.run_config, context.node_config)
    name = _client_name(node, context)
    if node.keep_warm > 0 and not _process_lives_on():
        worker = _worker(node, name)
        worker.start()
        worker.stop()
    return name


def _answer(payload: bytes, timeout: float, context: Context) -> bytes:
    """Answer a task: in this process if it stays alive, else in the node's warm worker."""
    node = read_node(context.run_config, context.node_config)
    name = _client_name(node, context)
    if _process_lives_on():
        # Imported only if this process holds the model itself.
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
    """Return whether this process belongs to Flower's simulation engine and answers many tasks."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _client_name(node: AppNode, context: Context) -> str:
    """Return which client a node plays.

    Raises:
        ConfigError: If the run's data has too few clients for this partition.
    """
    if node.name is not None:
        return node.name
    # The names come from the run's data, which is read only once for them.
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
    """Forwards a worker's reports to the node's log."""

    def on_warning(self, text: str) -> None:
        """Log a warning that concerns this node's data."""
        LOG.warning(text)
