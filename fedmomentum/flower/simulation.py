"""The same two apps under Flower's simulation engine, which runs the clients in Ray's processes.

It is for clusters that Ray runs on; on one machine `fedmomentum run` does the same without it. Ray
pickles what it moves between its own processes: only this installation's code and messages, not
across a trust boundary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid

from fedmomentum.errors import ConfigError
from fedmomentum.flower.apps import client_app, server_app
from fedmomentum.flower.transport import FlowerTransport, Session, pack_payload, unpack_payload
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.networked import run_federation
from fedmomentum.run.origin import fingerprints, follow, refuse_missing
from fedmomentum.run.setup import load_data
from fedmomentum.server.callbacks import Callback, CallbackList
from fedmomentum.utils.names import directory_name

if TYPE_CHECKING:
    from fedmomentum.client.client import Client
    from fedmomentum.config.schema import Config


NAME_QUERY = b"who are you?"
"""The payload that asks a node which client it simulates."""
NAME_QUERY_SECONDS = 120.0
"""How long Ray may take to start a process that answers the query."""
_CLIENTS: dict[str, Client] = {}
"""The clients that this process simulates; it lives as long as the run, with one base model."""


def simulate(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    server_round: int | None = None,
    callbacks: Iterable[Callback] = (),
) -> None:
    """Run a federation under Flower's simulation engine.

    Args:
        config: The run's configuration, data included.
        out: The run's directory; the clients' stores are in `out/clients`.
        resume: Continue the run in `out`.
        server_round: Resume from this round instead of the last; later rounds are repeated.
        callbacks: Receive progress.

    Raises:
        ConfigError: If Ray is not installed.
        Exception: Whatever ended the run; Flower's engine would hide it.
    """
    # no telemetry; Ray reads this when it starts
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise ConfigError(
            "the simulation engine needs Ray; install it with: pip install "
            "'fedmomentum[simulation]'"
        ) from error
    # the data is read here for its names and fingerprints; each Ray process reads it again
    if resume:
        config = follow(config, out)
        refuse_missing(config)
    clients = load_data(config)
    names = [client.client_id for client in clients]
    data = fingerprints(clients)
    federation = config.federation
    errors: list[BaseException] = []
    callback_list = CallbackList(callbacks)

    def run(grid: Grid) -> None:
        try:
            transport = FlowerTransport(
                grid,
                _SimulatedRoster(grid, names),
                round_timeout=federation.round_timeout,
                join_timeout=federation.join_timeout,
                min_valid_fraction=federation.min_valid_fraction,
                callback=callback_list,
            )
            run_federation(
                transport,
                config,
                out,
                resume=resume,
                server_round=server_round,
                callbacks=[callback_list],
                data=data,
            )
        except BaseException as error:
            errors.append(error)
            raise

    # one node for each client; Ray starts as many processes as the machine has cores
    simulated = _SimulatedClients(config, names, (out / "clients").resolve())
    resources = {"num_cpus": 1.0, "num_gpus": 0.0}
    try:
        run_simulation(
            server_app(run),
            client_app(simulated.answer),
            num_supernodes=len(names),
            backend_config={
                "client_resources": resources,  # type: ignore[dict-item]
                "init_args": {"include_dashboard": False},
            },
        )
    except BaseException as error:
        if not errors:
            raise
        raise errors[0] from error
    finally:
        ray.shutdown()
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class _SimulatedClients:
    """Answers messages in a Ray process, each as the client of the message's node.

    Attributes:
        config: The run's configuration.
        names: The clients' names; a node's partition is an index into them.
        store: Directory of the clients' stores.
    """

    config: Config
    names: list[str]
    store: Path

    def answer(self, payload: bytes, timeout: float, context: Context) -> bytes:
        name = self.names[int(context.node_config["partition-id"])]
        if payload == NAME_QUERY:
            return name.encode()
        if name not in _CLIENTS:
            # One base model, and one cache of objects, serve all clients of a process.
            first = next(iter(_CLIENTS.values()), None)
            shared = None if first is None else first.model
            store = self.store / directory_name(name)
            client = prepare_client(self.config, name, store, local=shared)
            if first is not None:
                client.store.cache = first.store.cache
            _CLIENTS[name] = client
        return _CLIENTS[name].handle(payload)


class _SimulatedRoster:
    """The roster; node ids are random, so each node is asked once which client it simulates."""

    def __init__(self, grid: Grid, names: list[str]) -> None:
        self._grid = grid
        self._names = names
        self._nodes: dict[str, Session] = {}

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Do nothing: Ray's processes fetch their messages at once."""

    def registered(self) -> list[str]:
        """Return the names of all clients."""
        return self._names

    def online(self) -> dict[str, Session]:
        """Return the clients whose nodes have answered, sorted."""
        known_ids = {session.node_id for session in self._nodes.values()}
        queries = [
            Message(pack_payload(NAME_QUERY), node_id, MessageType.TRAIN)
            for node_id in self._grid.get_node_ids()
            if node_id not in known_ids
        ]
        if queries:
            for reply in self._grid.send_and_receive(queries, timeout=NAME_QUERY_SECONDS):
                if reply.has_content():
                    name = unpack_payload(reply.content).payload.decode()
                    self._nodes[name] = Session(reply.metadata.src_node_id, "")
        return dict(sorted(self._nodes.items()))
