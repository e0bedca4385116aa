"""The server's side of the network: Flower's fleet service over TLS, for admitted nodes only.

Only the fleet service of Flower's SuperLink runs, in this process, on top of Flower's link state.
The control service, which would accept commands without a login on the same port, and the runtime
service do not exist here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fedmomentum.errors import ConfigError
from fedmomentum.flower.certificates import server_context
from fedmomentum.flower.gate import Gate, ThrottledLog
from fedmomentum.flower.grid import SuperLinkGrid
from fedmomentum.flower.guard import Guard, TaskLedger
from fedmomentum.flower.keys import check_private_file, read_admitted_nodes
from fedmomentum.flower.records import HEARTBEAT_SECONDS
from fedmomentum.flower.transport import Session
from fedmomentum.utils.text import printable
from fedmomentum.web.limits import ConnectionLimits
from fedmomentum.web.listener import Listener

LOG = logging.getLogger("fedmomentum")
ADMIT_SECONDS = 2.0
"""How often the files in `keys/nodes` are read while nothing asks who is admitted."""


@dataclass(frozen=True)
class _Node:
    """An admitted node: its id in Flower's link state, and its public key (PEM)."""

    node_id: int
    key: bytes


class SuperLink:
    """The running fleet service, which is a context manager and the `Roster` of its nodes.

    Nodes are admitted and removed by their files in `keys/nodes`, even while it runs.

    Args:
        keys: Directory written by `fedmomentum keys server`.
        host: Address to listen on.
        port: Port to listen on; 0 for any free one.
        limits: Limits on the number of connections; by default those of `default_limits`.

    Raises:
        ConfigError: If keys are missing or accessible to others, or the port cannot be opened.
    """

    def __init__(
        self, keys: Path, host: str, port: int, limits: ConnectionLimits | None = None
    ) -> None:
        # the keys
        for name in ("server.pem", "ca.pem"):
            if not (keys / name).is_file():
                raise ConfigError(
                    f"{keys} has no {name}; make the keys with: fedmomentum keys server"
                )
        check_private_file(keys / "server.key")
        self._keys = keys
        # Flower's link state, in memory
        self._factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME,
            NoOpFederationManager(),
            ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME),
        )
        self._state: Any = self._factory.state()
        # the admitted nodes, by name, by key and by id
        self._nodes: dict[str, _Node] = {}
        self._names_by_key: dict[bytes, str] = {}
        self._names_by_id: dict[int, str] = {}
        self._admit_lock = threading.Lock()
        self._reported_problems: dict[str, str] = {}  # by file in keys/nodes
        self._notices = ThrottledLog()
        self.ledger = TaskLedger()
        self.admit()

        self.ledger.run_id, self._task_id = self._start_run()
        self.grid = SuperLinkGrid(self._state, self.ledger)
        # the service: gate, guard and Flower's handlers behind a TLS port
        gate = Gate(self._app(), self._names_by_key.get, self._refuse_answer, self._notices)
        self._listener = Listener(gate, host, port, tls=server_context(keys), limits=limits)
        self._stop = threading.Event()
        self._upkeep = threading.Thread(target=self._keep_up, name="superlink upkeep", daemon=True)

    def _start_run(self) -> tuple[int, int]:
        """Start the run and task that Flower requires messages to belong to.

        They last as long as this process.

        Returns:
            Flower's ids of the run and the task.
        """
        state = self._state
        run_id: int = state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task_id: int = state.get_run_info(run_ids=[run_id])[0].primary_task_id
        state.claim_task(task_id)
        state.activate_task(task_id)
        TaskIdentity.run_id = run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        TaskIdentity.task_id = task_id
        return run_id, task_id

    def _app(self) -> FastAPI:
        """Return Flower's fleet service, with its own checks and ours in front of it."""
        guard = Guard(self._state, self.ledger, self._name_of, self._notices)
        app = FastAPI(
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
                Middleware(BaseHTTPMiddleware, dispatch=guard),
            ],
        )
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = True
        app.include_router(fleet_router)
        return app

    def _name_of(self, node_id: int) -> str:
        return self._names_by_id.get(node_id, "a node")

    def _refuse_answer(self, name: str, reason: str) -> None:
        """End the open task of a node whose request was too large."""
        if name in self._nodes:
            node_id = self._nodes[name].node_id
            self.ledger.refuse(node_id, f"its answer was refused: {printable(reason, 300)}")

    def __enter__(self) -> SuperLink:
        self._listener.__enter__()
        self._upkeep.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._listener.__exit__()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._listener.port

    def num_connections(self) -> int:
        """Return the number of open connections, including strangers'."""
        return self._listener.num_connections()

    def _keep_up(self) -> None:
        """Keep the run's task alive and the admitted nodes up to date; runs in its own thread."""
        while not self._stop.wait(ADMIT_SECONDS):
            self._state.acknowledge_task_heartbeat(self._task_id)
            # a removed node must not wait for the run to ask who is admitted
            self.admit()

    # ── the nodes ──

    def admit(self) -> Mapping[str, _Node]:
        """Synchronize the admitted nodes with the files in `keys/nodes`, and return them by name.

        A file that admits nobody (half copied, no key, invalid name, same key as another file) is
        an operator's mistake: it is reported once and does not affect the other nodes.
        """
        with self._admit_lock:
            self._read_admitted()
            return dict(self._nodes)

    def _read_admitted(self) -> None:
        """Add newly admitted nodes, and remove those that are no longer admitted."""
        admitted = read_admitted_nodes(self._keys)
        for file, problem in admitted.problems.items():
            if self._reported_problems.get(file) != problem:
                LOG.warning("%s admits nobody: %s", printable(file, 200), printable(problem))
        self._reported_problems = dict(admitted.problems)
        if admitted.keys is None:
            return
        # remove nodes whose file is gone or has a different key
        for name, node in list(self._nodes.items()):
            if admitted.keys.get(name) != node.key:
                self._remove(name)
        # add new nodes
        for name, key in admitted.keys.items():
            if name not in self._nodes:
                node_id = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
                self._nodes[name] = _Node(node_id, key)
                self._names_by_key[key] = name
                self._names_by_id[node_id] = name

    def _remove(self, name: str) -> None:
        """Remove a node that is no longer admitted from Flower's link state."""
        node = self._nodes.pop(name)
        info = self._state.get_node_info(node_ids=[node.node_id])[0]
        if info.online_until is None:
            # Flower does not delete nodes that were never online
            self._state.activate_node(node.node_id, HEARTBEAT_SECONDS)
        self._state.delete_node(NOOP_FLWR_AID, node.node_id)
        # Flower keeps the keys of deleted nodes and would not accept this one again
        self._state.node_public_key_to_node_id.pop(node.key, None)
        del self._names_by_key[node.key]
        del self._names_by_id[node.node_id]
        LOG.warning("%s is no longer admitted", name)

    def registered(self) -> list[str]:
        """Return the names of all admitted nodes, sorted."""
        return sorted(self.admit())

    def online(self) -> dict[str, Session]:
        """Return the connected nodes by name, sorted."""
        online_ids = set(self.grid.get_node_ids())
        ids_by_name = {
            name: node.node_id
            for name, node in sorted(self.admit().items())
            if node.node_id in online_ids
        }
        infos = self._state.get_node_info(node_ids=list(ids_by_name.values()))
        connected_at = {info.node_id: str(info.last_activated_at) for info in infos}
        return {
            name: Session(node_id, connected_at[node_id]) for name, node_id in ids_by_name.items()
        }

    def withdraw(self, message_ids: Iterable[str]) -> None:
        """Take back those of the messages that nobody has fetched yet."""
        state = self._state
        for message_id in message_ids:
            message = state.message_ins_store.get(message_id)
            self.ledger.close(message_id)
            if message is not None and message.metadata.delivered_at == "":
                state.delete_messages(message_ins_ids={message_id})
                state.object_store.delete(message_id)

    def discard(self, message_id: str) -> None:
        """Delete a message and whatever has arrived in reply to it."""
        self.grid.discard(message_id)
