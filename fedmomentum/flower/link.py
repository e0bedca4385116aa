"""The coordinator's end of the network: Flower's fleet service over TLS, for admitted nodes and nobody else.

Of Flower's SuperLink only the fleet service runs, in this process, over Flower's own link state. Its control service,
which would take commands without a login on the same port, and its runtime service are not there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fedmomentum.errors import ConfigError, FedMomentumError, PayloadError
from fedmomentum.flower.gate import Gate, Notices
from fedmomentum.flower.guard import HEARTBEAT_SECONDS, Guard, Ledger
from fedmomentum.flower.keys import check_private, read_nodes
from fedmomentum.flower.listener import Limits, Listener
from fedmomentum.flower.records import check_objects, tree_names
from fedmomentum.flower.transport import Session
from fedmomentum.schema import printable

LOG = logging.getLogger("fedmomentum")


class Link:
    """The running service. Nodes are admitted and turned away by their files in `keys/nodes`, also while it runs.

    Args:
        keys: folder of `fedmomentum keys server`.
        host: address to listen on.
        port: port to listen on; 0 for a free one.
        limits: of connections.

    Raises:
        ConfigError: keys that are missing or readable by others, or a port that cannot be had.
    """

    def __init__(self, keys: Path, host: str, port: int, limits: Limits | None = None) -> None:
        for name in ("server.pem", "ca.pem"):
            if not (keys / name).is_file():
                raise ConfigError(f"{keys} lacks {name}; make the keys with: fedmomentum keys server")
        check_private(keys / "server.key")
        self._keys = keys
        self._factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        )
        self._state: Any = self._factory.state()
        self._nodes: dict[str, tuple[int, bytes]] = {}  # name to node id and public key
        self._names_by_key: dict[bytes, str] = {}
        self._names_by_id: dict[int, str] = {}
        self._warned: dict[str, str] = {}  # file in keys/nodes to what is wrong with it
        self._notices = Notices()
        self.ledger = Ledger()
        self.admit()
        self._task_id = self._start_run()
        self.ledger.run_id = self._run_id
        self.grid = LinkGrid(self._state, self.ledger)
        self._listener = Listener(
            Gate(self._app(), self._names_by_key.get, self._refuse, self._notices), host, port,
            certificate=keys / "server.pem", key=keys / "server.key", limits=limits,
        )  # fmt: skip
        self._stop = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="link heartbeat", daemon=True)

    def _start_run(self) -> int:
        """Flower wants messages to belong to a run with a live task; ours is the life of this process."""
        state = self._state
        self._run_id: int = state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task_id: int = state.get_run_info(run_ids=[self._run_id])[0].primary_task_id
        state.claim_task(task_id)
        state.activate_task(task_id)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self._run_id, SUPERLINK_NODE_ID, task_id
        return task_id

    def _app(self) -> FastAPI:
        guard = Guard(self._state, self.ledger, lambda node_id: self._names_by_id.get(node_id, "a node"), self._notices)
        app = FastAPI(
            docs_url=None, redoc_url=None, openapi_url=None,
            middleware=[
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
                Middleware(BaseHTTPMiddleware, dispatch=guard),
            ],
        )  # fmt: skip
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = True
        app.include_router(fleet_router)
        return app

    def _refuse(self, name: str, reason: str) -> None:
        if name in self._nodes:
            self.ledger.refuse(self._nodes[name][0], f"its answer was refused: {printable(reason, 300)}")

    def __enter__(self) -> Link:
        self._listener.__enter__()
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._listener.__exit__()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._listener.port

    def num_connections(self) -> int:
        """Return how many connections are open, nodes' and strangers'."""
        return self._listener.num_connections()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self._state.acknowledge_task_heartbeat(self._task_id)

    # ── who is there ──

    def admit(self) -> None:
        """Bring the admitted nodes in line with the files in `keys/nodes`.

        A file that admits nobody (half copied, no key, a name that is none, a key that another file has) is a slip of
        the operator: it is told once, and the others go on.
        """
        found = read_nodes(self._keys)
        for file, problem in found.problems.items():
            if self._warned.get(file) != problem:
                LOG.warning("%s admits nobody: %s", printable(file, 200), printable(problem))
        self._warned = dict(found.problems)
        if found.keys is None:
            return
        for name in [n for n, (_, key) in self._nodes.items() if found.keys.get(n) != key]:
            node_id, key = self._nodes.pop(name)
            if self._state.get_node_info(node_ids=[node_id])[0].online_until is None:
                self._state.activate_node(node_id, HEARTBEAT_SECONDS)  # Flower deletes no node that never was online
            self._state.delete_node(NOOP_FLWR_AID, node_id)
            # Flower keeps the keys of deleted nodes, and would not take this one again
            self._state.node_public_key_to_node_id.pop(key, None)
            del self._names_by_key[key], self._names_by_id[node_id]
            LOG.warning("%s is no longer admitted", name)
        for name, key in found.keys.items():
            if name not in self._nodes:
                node_id = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)
                self._nodes[name] = node_id, key
                self._names_by_key[key] = self._names_by_id[node_id] = name

    def withdraw(self, names: Iterable[str]) -> None:
        """Take back the messages of these names that nobody has fetched yet."""
        state = self._state
        for name in names:
            message = state.message_ins_store.get(name)
            self.ledger.close(name)
            if message is not None and message.metadata.delivered_at == "":
                state.delete_messages(message_ins_ids={name})
                state.object_store.delete(name)

    def registered(self) -> list[str]:
        """The names of all admitted nodes, sorted."""
        self.admit()
        return sorted(self._nodes)

    def online(self) -> dict[str, Session]:
        """The nodes that are connected, by name."""
        here = set(self.grid.get_node_ids())
        found = {name: node_id for name, (node_id, _) in sorted(self._nodes.items()) if node_id in here}
        infos = {info.node_id: info for info in self._state.get_node_info(node_ids=list(found.values()))}
        return {name: Session(node_id, str(infos[node_id].last_activated_at)) for name, node_id in found.items()}


class LinkGrid(Grid):
    """Flower's `Grid` over a link state in this process, with the messages' objects in its object store.

    Whatever goes wrong with one answer is an error in that answer's place: whoever waits for it is told, and the
    other answers come as they would.
    """

    def __init__(self, state: Any, ledger: Ledger) -> None:
        self._state, self._ledger = state, ledger
        self._arriving: dict[str, tuple[Message, ObjectTree]] = {}  # by the question's name

    def set_run(self, run: Run) -> None:
        """Not used: the run is the link's."""

    @property
    def run(self) -> Run:
        """The link's run."""
        found: Run = deepcopy(self._state.get_run_info(run_ids=[self._ledger.run_id])[0])
        return found

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are connected."""
        return sorted(self._state.get_nodes(self._ledger.run_id))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put messages up for their nodes; an empty name stands for one that was refused."""
        names = []
        for message in messages:
            with no_object_id_recompute():
                message.metadata.__dict__["_message_id"] = message.object_id
                objects, tree = get_all_nested_objects(message), get_object_tree(message)
                session = self._state.start_session(self._ledger.run_id)
                stored, missing = self._state.store_message_and_object_tree(
                    remove_content_from_message(message), tree, session
                )
                if stored:
                    self._ledger.asked(message.metadata.dst_node_id, message.metadata.message_id)
                for name in missing:
                    self._state.store_object(self._ledger.run_id, session, name, objects.pop(name).deflate())
            names.append(message.metadata.message_id if stored else "")
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are complete, and Flower's own errors for nodes that are gone."""
        replies = []
        for question in dict.fromkeys(message_ids):
            try:
                reply = self._reply_to(question)
            except Exception as error:
                # whatever an answer causes ends that answer; what of it is left in Flower's stores goes
                kind = "" if isinstance(error, FedMomentumError) else f"{type(error).__name__}: "
                reason = f"its answer could not be read: {kind}{printable(str(error), 300)}"
                reply = self._failed(question, reason)
            if reply is not None:
                self._ledger.close(question)
                replies.append(reply)
        return replies

    def _reply_to(self, question: str) -> Message | None:
        """Return the complete answer to a question, if it is there."""
        state = self._state
        if question in self._ledger.refused:
            return self._failed(question, self._ledger.refused.pop(question))
        if question not in self._arriving:
            for message in state.get_message_res(message_ids={question}, run_id=self._ledger.run_id):
                state.delete_messages(message_ins_ids={question})
                tree = state.object_store.get_object_tree(message.metadata.message_id)
                self._arriving[question] = message, tree
        if question not in self._arriving:
            return None
        message, tree = self._arriving[question]
        contents = {name: state.get_object(self._ledger.run_id, name) for name in tree_names(tree)}
        if b"" in contents.values():
            return None  # still arriving
        del self._arriving[question]
        state.object_store.delete(message.metadata.message_id)
        if message.has_error():
            return message
        if None in contents.values():
            return self._failed(question, "its answer stopped half-way")
        check_objects(message.metadata.message_id, contents)
        return _inflated(message, contents)

    def _failed(self, question: str, reason: str) -> Message:
        """Forget what came for a question; return the error that stands for its answer."""
        state = self._state
        arriving = self._arriving.pop(question, None)
        name = state.message_ins_id_to_message_res_id.get(question)
        state.delete_messages(message_ins_ids={question})
        for message_id in (question, name, arriving[0].metadata.message_id if arriving else None):
            if message_id is not None:
                state.object_store.delete(message_id)
        metadata = Metadata(
            run_id=self._ledger.run_id, message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id=question, group_id="", created_at=time.time(), ttl=1.0, message_type="train",
        )  # fmt: skip
        return make_message(metadata, error=Error(ErrorCode.MOD_FAILED_PRECONDITION, reason))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, and pull until all have answered or the time is over."""
        waiting, replies = set(self.push_messages(messages)), []
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting and time.monotonic() < end:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(0.1)
        return replies


def _inflated(message: Message, contents: dict[str, bytes]) -> Message:
    """The message with its content.

    Raises:
        PayloadError: If the objects are no message.
        Exception: Whatever Flower raises where they cannot be put together.
    """
    whole = inflate_object_from_contents(message.metadata.message_id, contents)
    if not isinstance(whole, Message):
        raise PayloadError(f"it is a {type(whole).__name__}, no message")
    whole.metadata.__dict__["_message_id"] = message.metadata.message_id
    # the envelope that Flower checked counts, not the one inside
    whole.metadata.__dict__["_reply_to_message_id"] = message.metadata.reply_to_message_id
    return whole
