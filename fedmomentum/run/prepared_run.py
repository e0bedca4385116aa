"""A run in this process that is ready to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmomentum.data.client_data import partition_table

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.client.client import Client
    from fedmomentum.client.local_model import LocalModel
    from fedmomentum.config.schema import Config
    from fedmomentum.formats.manifest import Fingerprint
    from fedmomentum.formats.plan import Plan
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.run.devices import DeviceTransport
    from fedmomentum.run.outline import ModelOutline
    from fedmomentum.run.setup import RunOutline
    from fedmomentum.server.checkpoint import RunDirectory
    from fedmomentum.server.state import ServerState


@dataclass
class PreparedRun:
    """A run that is ready to train: everything is loaded and checked, nothing is trained yet.

    Attributes:
        config: The run's settings.
        outline: The shapes of the model, from which the plan was made.
        method: Combines the clients' adapters.
        directory: The run's directory, locked by this process.
        local: The base model with a live adapter, shared by all clients with equal settings; None
            if `workers` hold it.
        clients: The clients with their tokenized data; empty if `workers` run them.
        workers: The processes of `run.devices`, if set.
        environment: What the last bits of a result depend on.
        model: The global model to start from.
        state: What the server remembers.
        plan: What the run will cost.
        partition: Client to `train` and `test`, to category, to number of examples.
        data: Client to the fingerprint of its data.
    """

    config: Config
    outline: ModelOutline
    method: Method
    directory: RunDirectory
    local: LocalModel | None
    clients: list[Client]
    workers: DeviceTransport | None
    environment: dict[str, Any]
    model: GlobalModel
    state: ServerState
    plan: Plan
    partition: dict[str, dict[str, dict[str, int]]]
    data: dict[str, Fingerprint]


def known_partition(
    outline: RunOutline, clients: Sequence[Client]
) -> dict[str, dict[str, dict[str, int]]]:
    """Count each client's examples by category; with differential privacy, only public numbers."""
    if outline.config.privacy.dp is None:
        return partition_table(outline.client_data)
    partition = {}
    for client in clients:
        partition[client.client_id] = {"train": {"": client.num_examples}, "test": {"": 0}}
    return partition
