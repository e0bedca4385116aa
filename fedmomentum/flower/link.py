"""The coordinator's end of the network: Flower's fleet service over TLS, for admitted nodes and nobody else.

Of Flower's SuperLink only the fleet service runs, in this process, over Flower's own link state. Its control service,
which would take commands without a login on the same port, and its runtime service are not there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
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
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from fedmomentum.errors import ConfigError
from fedmomentum.flower.keys import admitted, check_private
from fedmomentum.flower.transport import MAX_PAYLOAD_BYTES, Session

LOG = logging.getLogger("fedmomentum")
PATHS = frozenset(
    "/v1/fleet/" + name
    for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "push-object",
        "pull-object", "confirm-message-received",
    )
)  # fmt: skip
"""All that a node needs. What else Flower's router offers (nodes that register themselves, runs, code) is not found."""
MAX_REQUEST_BYTES = 16 * 2**20
"""Flower cuts what it sends into parts of 5 MB."""
HEARTBEAT_SECONDS = 10

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Link:
    """The running service. Nodes are admitted and turned away by their files in `keys/nodes`, also while it runs.

    Args:
        keys: folder of `fedmomentum keys server`.
        host: address to listen on.
        port: port to listen on; 0 for a free one.

    Raises:
        ConfigError: keys that are missing or readable by others, or a port that cannot be had.
    """

    def __init__(self, keys: Path, host: str, port: int) -> None:
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
        self.admit()
        self._task_id = self._start_run()
        self.pushed: Counter[int] = Counter()
        self.grid = LinkGrid(self._state, self._run_id, self.pushed)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app(), host=host, port=port, log_config=None, access_log=False, lifespan="off",
                ssl_certfile=keys / "server.pem", ssl_keyfile=keys / "server.key", timeout_keep_alive=30,
                server_header=False,
            )
        )  # fmt: skip
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, name="link", daemon=True),
            threading.Thread(target=self._beat, name="link heartbeat", daemon=True),
        ]

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
        app = FastAPI(
            docs_url=None, redoc_url=None, openapi_url=None,
            middleware=[
                Middleware(_Limits),
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
                Middleware(BaseHTTPMiddleware, dispatch=_Senders(self.pushed)),
            ],
        )  # fmt: skip
        app.state.linkstate_factory = self._factory
        app.state.enable_supernode_auth = True
        app.include_router(fleet_router)
        return app

    def __enter__(self) -> Link:
        for thread in self._threads:
            thread.start()
        while not self._server.started:
            if not self._threads[0].is_alive():
                raise ConfigError(
                    f"cannot listen on {self._server.config.host}:{self._server.config.port}; is the port in use?"
                )
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.should_exit = True
        self._threads[0].join(10)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    def _serve(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # uvicorn's way to say that it could not start; __enter__ tells the user
            LOG.debug("the service ended")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self._state.acknowledge_task_heartbeat(self._task_id)

    # ── who is there ──

    def admit(self) -> None:
        """Bring the admitted nodes in line with the files in `keys/nodes`."""
        wanted = admitted(self._keys)
        for name in [n for n, (_, key) in self._nodes.items() if wanted.get(n) != key]:
            node_id, _ = self._nodes.pop(name)
            if self._state.get_node_info(node_ids=[node_id])[0].online_until is None:
                self._state.activate_node(node_id, HEARTBEAT_SECONDS)  # Flower deletes no node that never was online
            self._state.delete_node(NOOP_FLWR_AID, node_id)
            LOG.warning("%s is no longer admitted", name)
        for name, key in wanted.items():
            if name not in self._nodes:
                self._nodes[name] = self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0), key

    def withdraw(self, names: Iterable[str]) -> None:
        """Take back the messages of these names that nobody has fetched yet."""
        state = self._state
        for name in names:
            message = state.message_ins_store.get(name)
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
    """Flower's `Grid` over a link state in this process, with the messages' objects in its object store."""

    def __init__(self, state: Any, run_id: int, pushed: Counter[int]) -> None:
        self._state, self._run_id, self._pushed = state, run_id, pushed
        self._arriving: dict[str, tuple[Message, ObjectTree]] = {}

    def set_run(self, run: Run) -> None:
        """Not used: the run is the link's."""

    @property
    def run(self) -> Run:
        """The link's run."""
        found: Run = deepcopy(self._state.get_run_info(run_ids=[self._run_id])[0])
        return found

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are connected."""
        return sorted(self._state.get_nodes(self._run_id))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put messages up for their nodes; an empty name stands for one that was refused."""
        names = []
        for message in messages:
            self._pushed[message.metadata.dst_node_id] = 0  # each question allows one answer's bytes
            with no_object_id_recompute():
                message.metadata.__dict__["_message_id"] = message.object_id
                objects, tree = get_all_nested_objects(message), get_object_tree(message)
                session = self._state.start_session(self._run_id)
                stored, missing = self._state.store_message_and_object_tree(
                    remove_content_from_message(message), tree, session
                )
                for name in missing:
                    self._state.store_object(self._run_id, session, name, objects.pop(name).deflate())
            names.append(message.metadata.message_id if stored else "")
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are complete, and Flower's own errors for nodes that are gone."""
        state, wanted = self._state, set(message_ids)
        started = {message.metadata.reply_to_message_id for message, _ in self._arriving.values()}
        for message in state.get_message_res(message_ids=wanted - started, run_id=self._run_id):
            state.delete_messages(message_ins_ids={message.metadata.reply_to_message_id})
            tree = state.object_store.get_object_tree(message.metadata.message_id)
            self._arriving[message.metadata.message_id] = message, tree
        complete = []
        for message_id, (message, tree) in list(self._arriving.items()):
            if message.metadata.reply_to_message_id not in wanted:
                continue
            names = [part.object_id for part in iterate_object_tree(tree)]
            contents = {name: state.get_object(self._run_id, name) for name in names}
            if b"" in contents.values():
                continue  # still arriving
            del self._arriving[message_id]
            state.object_store.delete(message_id)
            given_up = None in contents.values()
            complete.append(message if given_up else _inflated(message, contents))
        return complete

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
    """The message with its content; what cannot be read stays without."""
    try:
        whole = inflate_object_from_contents(message.metadata.message_id, contents)
    except Exception as error:  # whatever a node sends, the service goes on
        LOG.warning("a reply could not be read: %s", type(error).__name__)
        return message
    if not isinstance(whole, Message):
        return message
    whole.metadata.__dict__["_message_id"] = message.metadata.message_id
    # the envelope that Flower checked counts, not the one inside
    whole.metadata.__dict__["_reply_to_message_id"] = message.metadata.reply_to_message_id
    return whole


class _Limits:
    """Only the paths that nodes need, and requests of a size that they make."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in PATHS or scope["method"] != "POST":
            await Response(status_code=404)(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or int(length) > MAX_REQUEST_BYTES:  # the server holds a body to its stated length
            await Response(status_code=413)(scope, receive, send)
            return
        await self.app(scope, receive, send)


@dataclass
class _Senders:
    """After a node's signature was checked: it speaks for itself only, and sends no more than a reply can have.

    Flower checks who makes a request, not whose message is in it.

    Attributes:
        pushed: bytes that a node has sent since it was last asked something.
    """

    pushed: Counter[int]

    async def __call__(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        asked = request.state.protobuf_request
        if isinstance(asked, PushMessagesRequest):
            senders = {message.metadata.src_node_id for message in asked.messages_list}
            if len(asked.messages_list) != 1 or senders != {asked.node.node_id}:
                raise HTTPException(403, "a node sends its own messages, one at a time")
        elif isinstance(asked, PushObjectRequest):
            self.pushed[asked.node.node_id] += len(asked.object_content)
            if self.pushed[asked.node.node_id] > MAX_PAYLOAD_BYTES:
                raise HTTPException(413, f"a reply has at most {MAX_PAYLOAD_BYTES} bytes")
        return await call_next(request)
