"""A node's end of the network: Flower's fleet protocol over TLS, without Flower's node process.

Flower's own node would fetch the app's code from the server and run it, in a new process for every message. Here a
message is handed to what is installed on the node, and no code is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
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
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedmomentum.errors import FedMomentumError, PayloadError
from fedmomentum.flower.records import check_envelope, check_objects, check_task, tree_names
from fedmomentum.schema import printable

HEARTBEAT_SECONDS = 10
"""Flower's shortest; a node that is silent for twice that counts as gone."""
PROBE_SECONDS = 1
"""The heartbeat interval of a look; the server refuses it once it has found name and signature good."""
RETRY_SECONDS = (1.0, 3.0, None)
"""Pauses before a request is made again."""


class ConnectionLost(Exception):
    """The connection is of no use any more; the text says why. Connect anew."""


class Connection:
    """An authenticated connection of one node; a context manager.

    Args:
        server: `host:port`.
        authority: the server's authority, PEM; no other is trusted.
        key: the node's private key.

    Raises (also from every method):
        ConnectionLost: the server cannot be reached, is not who it should be, or does not know this node.
    """

    def __init__(self, server: str, authority: bytes, key: ec.EllipticCurvePrivateKey) -> None:
        self._public = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            server, False, authority, [NodeAuthHttpInterceptor(key, key.public_key())]
        )
        self._client._client.follow_redirects = False  # signed requests go to this server and to no other
        self._stop = threading.Event()
        self._lost: str | None = None

    def __enter__(self) -> Connection:
        try:
            request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
            self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        except BaseException:
            self._client.close()
            raise
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heartbeat.join(HEARTBEAT_SECONDS)  # one that came after the farewell would bring the node back
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except Exception:  # it will notice by the missing heartbeat
            self._lost = self._lost or "closed"
        self._client.close()

    def _call(self, method: Callable[[Any], Any], request: Any) -> Any:
        for pause in RETRY_SECONDS:
            if self._lost:
                raise ConnectionLost(self._lost)
            try:
                return method(request)
            except httpx.HTTPStatusError as error:
                raise ConnectionLost(_refusal(error)) from error
            except (httpx.HTTPError, OSError, ValueError) as error:
                if pause is None or "CERTIFICATE" in str(error):
                    raise ConnectionLost(_trouble(error)) from error
                self._stop.wait(pause)
            except Exception as error:  # whatever an answer of the server's causes, the node goes on
                raise ConnectionLost(f"the server's answer cannot be used ({_short(error)})") from error
        raise AssertionError("the last pause is None")

    def probe(self) -> None:
        """See whether the server is there and admits this node, without joining: nobody counts on it yet.

        A request to activate is refused for its heartbeat interval only after name and signature were found good.
        """
        try:
            self._client.ActivateNode(ActivateNodeRequest(public_key=self._public, heartbeat_interval=PROBE_SECONDS))
        except httpx.HTTPStatusError as error:
            told = _told(error)
            if told is None or told.code != ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
                raise ConnectionLost(_refusal(error)) from error
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise ConnectionLost(_trouble(error)) from error
        finally:
            self._client.close()

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
        while not self._stop.wait(HEARTBEAT_SECONDS / 3):
            try:
                self._client.SendNodeHeartbeat(request)
            except httpx.HTTPStatusError as error:
                self._lost = _refusal(error)
                return
            except (httpx.HTTPError, OSError, ValueError, RuntimeError):
                continue  # the next one may get through

    def pull(self) -> Message | None:
        """The next message for this node, if there is one."""
        response = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not len(response.messages_list):
            return None
        try:
            return self._fetched(response)
        except ConnectionLost:
            raise
        except Exception as error:  # a message that is none, or whose parts are gone
            raise ConnectionLost(f"a message could not be fetched: {_short(error)}") from error

    def _fetched(self, response: PullMessagesResponse) -> Message:
        """Return the message that a response announces, with its parts.

        Raises:
            PayloadError: If it is not of the form that tasks have.
            ConnectionLost: If its parts cannot be had.
            Exception: Whatever Flower raises where they cannot be put together.
        """
        if len(response.messages_list) != 1 or len(response.message_object_trees) != 1:
            raise PayloadError("not one message and its tree came")
        envelope, tree = response.messages_list[0], response.message_object_trees[0]
        check_task(envelope.metadata, node_id=self._node.node_id)
        check_envelope(envelope, tree)
        if envelope.HasField("error"):
            raise PayloadError("a task is no error")
        run_id = envelope.metadata.run_id
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, self._node.node_id, 0
        pull = make_pull_object_fn_protobuf(partial(self._call, self._client.PullObject), self._node, run_id)
        contents = pull_objects(list(dict.fromkeys(tree_names(tree))), pull)
        make_confirm_message_received_fn_protobuf(
            partial(self._call, self._client.ConfirmMessageReceived), self._node, run_id
        )(tree.object_id)
        check_objects(tree.object_id, contents)
        message = inflate_object_from_contents(tree.object_id, contents)
        if not isinstance(message, Message) or not message.has_content():
            raise PayloadError("it is no task")
        # the envelope, which was checked, counts for the answer, and not what is inside
        message.__dict__["_metadata"] = metadata_from_proto(envelope.metadata)
        return message

    def push(self, reply: Message) -> None:
        """Send a reply."""
        try:
            self._push(reply)
        except ConnectionLost:
            raise
        except Exception as error:
            raise ConnectionLost(f"a reply could not be sent whole: {_short(error)}") from error

    def _push(self, reply: Message) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            response = self._call(
                self._client.PushMessages,
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.0],
                ),
            )
            push = partial(self._call, self._client.PushObject)
            push_objects(
                objects,
                make_push_object_fn_protobuf(push, self._node, reply.metadata.run_id, response.session_id),
                object_ids_to_push=set(response.objects_to_push),
            )


def _told(error: httpx.HTTPStatusError) -> FlowerError | None:
    """Return the error in the body of a refusal, if there is one."""
    try:
        return FlowerError.from_json(error.response.text[:4096])
    except (ValueError, RecursionError):
        return None


def _short(error: Exception) -> str:
    """Return what may be shown of an error that the server's answer caused."""
    own = isinstance(error, FedMomentumError)
    return printable(str(error) if own else f"{type(error).__name__}: {error}", 300)


def _refusal(error: httpx.HTTPStatusError) -> str:
    """What the server's refusal means for whoever runs the node."""
    status = error.response.status_code
    told = _told(error)
    if told is not None and told.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return (
            "the server does not admit this node: its public key is not admitted there, another process uses the "
            "same key, or this node ended less than half a minute ago"
        )
    if status == 401:
        return (
            "the server does not accept this node's signature: it restarted, or this machine's clock is more than 5 s "
            "ahead of it or 5 min behind"
        )
    return f"the server answered {status}{': ' + printable(told.message, 200) if told else ''}"


def _trouble(error: Exception) -> str:
    """A transport error, in words."""
    text = printable(str(error), 300)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"the server's certificate is not one that --ca vouches for, for this name ({text})"
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        return f"the server does not speak TLS ({text})"
    return f"the server cannot be reached ({type(error).__name__}: {text})"
