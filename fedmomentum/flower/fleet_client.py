"""A node's side of the network: Flower's fleet protocol over TLS, without Flower's node process.

Flower's own node would fetch the app's code from the server and run it in a new process for every
message. Here, messages are handled by the code installed on the node, and no code is requested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedmomentum.errors import FedMomentumError, PayloadError
from fedmomentum.flower.records import (
    HEARTBEAT_SECONDS,
    PROBE_SECONDS,
    check_envelope,
    check_objects,
    check_task,
    tree_names,
)
from fedmomentum.utils.text import printable

RETRY_DELAYS = (1.0, 3.0, None)
"""Seconds to wait before each retry of a request; None means to give up."""
ONCE = (None,)
"""The same for a request that is not retried."""
CLOSE_SECONDS = 5.0
"""How long closing a connection waits for requests in progress."""
MAX_REFUSAL_LENGTH = 4096
"""The longest refusal body that is parsed, in characters; Flower's have a few hundred."""


class ConnectionLost(Exception):
    """The connection is no longer usable, for the reason in the text; a new one is needed."""


class FleetClient:
    """An authenticated connection of one node to the server; a context manager.

    Every method raises ConnectionLost if the server cannot be reached, is not the expected one, or
    does not know this node.

    Args:
        server: The server's `host:port`.
        authority: The PEM certificate of the server's authority, the only one that is trusted.
        key: The node's private key.
    """

    def __init__(self, server: str, authority: bytes, key: ec.EllipticCurvePrivateKey) -> None:
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            server, False, authority, [NodeAuthHttpInterceptor(key, key.public_key())]
        )
        # signed requests must go to this server only
        self._client._client.follow_redirects = False
        self._stop = threading.Event()
        self._lost: str | None = None
        # Flower's helpers make requests in threads and, if one fails, do not wait for the rest.
        self._num_requests = 0
        self._requests_change = threading.Condition()

    def __enter__(self) -> FleetClient:
        try:
            self._node = self._call(self._activate, HEARTBEAT_SECONDS)
        except BaseException:
            self._client.close()
            raise
        self._heartbeat = threading.Thread(
            target=self._send_heartbeats, name="heartbeat", daemon=True
        )
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        # a heartbeat after the deactivation would reactivate the node
        self._heartbeat.join(HEARTBEAT_SECONDS)
        is_idle = self._wait_for_requests()
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except Exception:
            # the server will notice the missing heartbeats
            self._lost = self._lost or "closed"
        if is_idle:
            self._client.close()

    def _wait_for_requests(self) -> bool:
        """Wait for the requests of other threads, and return whether all have ended.

        None is retried from now on. If a socket were closed while a thread still writes to it, the
        next connection of this process could get the same file descriptor, and with it the rest of
        the data. Slower requests end by their own timeouts and then close their sockets.
        """
        with self._requests_change:
            return self._requests_change.wait_for(lambda: self._num_requests == 0, CLOSE_SECONDS)

    def _activate(self, heartbeat_interval: float) -> Node:
        """Tell the server that this node is connected, and return its name for it."""
        request = ActivateNodeRequest(
            public_key=self._public_key, heartbeat_interval=heartbeat_interval
        )
        return Node(node_id=self._client.ActivateNode(request).node_id)

    def _call(
        self, method: Callable[[Any], Any], request: Any, *, is_repeatable: bool = True
    ) -> Any:
        """Make a request; if the network fails, repeat it unless it may be made only once.

        Raises:
            ConnectionLost: If there is no usable answer, or the connection is being closed.
        """
        with self._requests_change:
            self._num_requests += 1
        try:
            return self._call_repeatedly(method, request, RETRY_DELAYS if is_repeatable else ONCE)
        finally:
            with self._requests_change:
                self._num_requests -= 1
                self._requests_change.notify_all()

    def _call_repeatedly(
        self, method: Callable[[Any], Any], request: Any, delays: Sequence[float | None]
    ) -> Any:
        """Make a request; after a network error, wait for the next delay and try again."""
        for delay in delays:
            if self._lost or self._stop.is_set():
                raise ConnectionLost(self._lost or "closed")
            try:
                return method(request)
            except httpx.HTTPStatusError as error:
                raise ConnectionLost(_refusal(error)) from error
            except (httpx.HTTPError, OSError, ValueError) as error:
                if delay is None or "CERTIFICATE" in str(error):
                    raise ConnectionLost(_network_error(error)) from error
                self._stop.wait(delay)
            except Exception as error:
                # whatever the server's answer causes, the node carries on
                text = f"the server's answer cannot be used ({_shown(error)})"
                raise ConnectionLost(text) from error
        raise AssertionError("the last delay is None")

    def probe(self) -> None:
        """Check that the server can be reached and admits this node, without joining.

        The activation request is refused because of its heartbeat interval, but only after the
        name and signature have been verified.

        Raises:
            ConnectionLost: If the server cannot be reached or does not admit this node.
        """
        try:
            self._activate(PROBE_SECONDS)
        except httpx.HTTPStatusError as error:
            refusal = _flower_error(error)
            expected = ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL
            if refusal is None or refusal.code != expected:
                raise ConnectionLost(_refusal(error)) from error
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise ConnectionLost(_network_error(error)) from error
        finally:
            self._client.close()

    def _send_heartbeats(self) -> None:
        """Tell the server that this node is alive; runs in its own thread.

        A task may run for long, and no other thread reconnects meanwhile. So if the server does not
        know this node any more, because it restarted, this thread connects it again. What belongs
        to the old connection is not sent over the new one: `_lost` is set before that.
        """
        is_known = True
        # three per interval, so that two may be lost
        while not self._stop.wait(HEARTBEAT_SECONDS / 3):
            try:
                if is_known:
                    self._client.SendNodeHeartbeat(
                        SendNodeHeartbeatRequest(
                            node=self._node, heartbeat_interval=HEARTBEAT_SECONDS
                        )
                    )
                else:
                    self._node = self._activate(HEARTBEAT_SECONDS)
                    is_known = True
            except httpx.HTTPStatusError as error:
                if not _is_transient(error):
                    self._lost = _refusal(error)
                    is_known = False
            except (httpx.HTTPError, OSError, ValueError, RuntimeError):
                continue  # the next one may get through

    # ── messages ──

    def pull(self) -> Message | None:
        """Return the next message for this node, if there is one.

        Raises:
            ConnectionLost: If it cannot be fetched.
        """
        # the server hands out a message once: if the answer is lost, only a new connection makes
        # it send the task again
        request = PullMessagesRequest(node=self._node)
        response = self._call(self._client.PullMessages, request, is_repeatable=False)
        if not len(response.messages_list):
            return None
        try:
            return self._fetch(response)
        except ConnectionLost:
            raise
        except Exception as error:
            # not one of our messages, or its parts are gone
            raise ConnectionLost(f"a message could not be fetched: {_shown(error)}") from error

    def _fetch(self, response: PullMessagesResponse) -> Message:
        """Fetch the parts of the message that a response announces, and return it.

        Raises:
            PayloadError: If it is not a well-formed task.
            ConnectionLost: If its parts cannot be fetched.
            Exception: Whatever Flower raises if they cannot be combined.
        """
        if len(response.messages_list) != 1 or len(response.message_object_trees) != 1:
            raise PayloadError("expected one message and its tree")
        envelope = response.messages_list[0]
        tree = response.message_object_trees[0]
        # check envelope and tree before anything is fetched
        check_task(envelope.metadata, node_id=self._node.node_id)
        check_envelope(envelope, tree)
        if envelope.HasField("error"):
            raise PayloadError("it is an error, not a task")

        # fetch the objects, and check their form before Flower combines them
        contents = self._pull_objects(tree, envelope.metadata.run_id)
        check_objects(tree.object_id, contents)
        message = inflate_object_from_contents(tree.object_id, contents)
        if not isinstance(message, Message) or not message.has_content():
            raise PayloadError("it is not a task")
        # reply to the outer envelope, which was checked, not the one inside
        message.__dict__["_metadata"] = metadata_from_proto(envelope.metadata)
        return message

    def _pull_objects(self, tree: ObjectTree, run_id: int) -> dict[str, bytes]:
        """Fetch a message's objects and confirm that they have arrived."""
        TaskIdentity.run_id = run_id
        TaskIdentity.node_id = self._node.node_id
        TaskIdentity.task_id = 0
        # Flower's helpers make each request through `_call`
        pull = make_pull_object_fn_protobuf(
            partial(self._call, self._client.PullObject), self._node, run_id
        )
        confirm = make_confirm_message_received_fn_protobuf(
            partial(self._call, self._client.ConfirmMessageReceived), self._node, run_id
        )
        contents: dict[str, bytes] = pull_objects(list(dict.fromkeys(tree_names(tree))), pull)
        confirm(tree.object_id)
        return contents

    def push(self, reply: Message) -> None:
        """Send a reply.

        Raises:
            ConnectionLost: If it cannot be sent in full.
        """
        try:
            self._push(reply)
        except ConnectionLost:
            raise
        except Exception as error:
            raise ConnectionLost(f"a reply could not be sent: {_shown(error)}") from error

    def _push(self, reply: Message) -> None:
        """Send a reply as Flower does: first its envelope, then its content, object by object."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[0.0],
            )
            response = self._call(self._client.PushMessages, request)
            push = make_push_object_fn_protobuf(
                partial(self._call, self._client.PushObject),
                self._node,
                reply.metadata.run_id,
                response.session_id,
            )
            push_objects(objects, push, object_ids_to_push=set(response.objects_to_push))


# ── errors ──


def _is_transient(error: httpx.HTTPStatusError) -> bool:
    """Return whether the same request may succeed later, such as when a proxy restarts."""
    status = error.response.status_code
    return status >= 500 or status in (408, 429)


def _flower_error(error: httpx.HTTPStatusError) -> FlowerError | None:
    """Return the Flower error in the body of a refusal, if there is one."""
    try:
        return FlowerError.from_json(error.response.text[:MAX_REFUSAL_LENGTH])
    except (ValueError, RecursionError):
        return None


def _shown(error: Exception) -> str:
    """Return an error caused by the server's answer, sanitized for display."""
    if isinstance(error, FedMomentumError):
        return printable(str(error), 300)
    return printable(f"{type(error).__name__}: {error}", 300)


def _refusal(error: httpx.HTTPStatusError) -> str:
    """Explain the server's refusal to the node's operator."""
    status = error.response.status_code
    refusal = _flower_error(error)
    if refusal is not None and refusal.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return (
            "the server does not admit this node: its public key is not admitted there, another "
            "process uses the same key, or this node ended less than half a minute ago"
        )
    if status == 401:
        return (
            "the server does not accept this node's signature: it restarted, or this machine's "
            "clock is more than 5 s ahead of it or 5 min behind"
        )
    message = f": {printable(refusal.message, 200)}" if refusal else ""
    return f"the server answered {status}{message}"


def _network_error(error: Exception) -> str:
    """Explain a failed request to the node's operator."""
    text = printable(str(error), 300)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"the server's certificate is not one that --ca vouches for, for this name ({text})"
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        return f"the server does not speak TLS ({text})"
    return f"the server cannot be reached ({type(error).__name__}: {text})"
