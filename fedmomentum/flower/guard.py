"""The inner check in front of Flower's fleet service: admits only what our nodes send.

It checks requests after they are parsed and their signatures verified, and before Flower's handlers
see them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException, Request, Response
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Metadata,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.message_pb2 import Message as MessageProto
from starlette.middleware.base import RequestResponseEndpoint

from fedmomentum.errors import PayloadError
from fedmomentum.flower.payloads import MAX_PAYLOAD_BYTES
from fedmomentum.flower.records import (
    HEARTBEAT_SECONDS,
    PROBE_SECONDS,
    check_envelope,
    check_metadata,
    is_hash,
    tree_names,
)
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.flower.gate import ThrottledLog


MAX_PUSHES_PER_TASK = 16
"""The maximum number of answers to one task; several are only needed if a connection breaks."""
MAX_RUNTIME_SECONDS = 1e9
"""The longest runtime that a node may report: thirty years, so that sums cannot overflow."""
MAX_SESSION_ID_LENGTH = 64
"""The longest id of an upload session; Flower's have 32 characters."""


@dataclass
class TaskLedger:
    """What each node has done since it was last sent a task.

    Attributes:
        run_id: Flower's id of the run.
        open_tasks: The last message sent to each node, while it is unanswered.
        pushed_bytes: Bytes that each node has sent since.
        num_pushes: How often each node has begun an answer since.
        refusals: Why the answer to a message was refused, reported in place of the answer.
    """

    run_id: int = 0
    open_tasks: dict[int, str] = field(default_factory=dict)
    pushed_bytes: Counter[int] = field(default_factory=Counter)
    num_pushes: Counter[int] = field(default_factory=Counter)
    refusals: dict[str, str] = field(default_factory=dict)

    def open(self, node_id: int, message_id: str) -> None:
        """Record that a node was sent a task, which allows it to send one answer."""
        self.open_tasks[node_id] = message_id
        self.pushed_bytes[node_id] = 0
        self.num_pushes[node_id] = 0

    def close(self, message_id: str) -> None:
        """Record that a task is over; may be called from a different thread than `refuse`."""
        for node_id, open_id in list(self.open_tasks.items()):
            if open_id == message_id:
                self.open_tasks.pop(node_id, None)
        self.refusals.pop(message_id, None)

    def refuse(self, node_id: int, reason: str) -> None:
        """End a node's open task, if any, because the node has broken the rules."""
        message_id = self.open_tasks.pop(node_id, "")
        if message_id:
            self.refusals[message_id] = reason


class Guard:
    """Middleware dispatch that only forwards what our nodes send, each in its own name.

    Flower checks who makes a request. It does not check whose message it contains or confirms, or
    that the parts of a message form a valid message.

    Args:
        state: Flower's link state.
        ledger: What each node has done since its last task.
        name_of: Returns the name of the node with this id.
        notices: Log for the operator.
    """

    def __init__(
        self, state: Any, ledger: TaskLedger, name_of: Callable[[int], str], notices: ThrottledLog
    ) -> None:
        self._state = state
        self._ledger = ledger
        self._name_of = name_of
        self._notices = notices

    async def __call__(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Refuse a request, answer it, or forward it."""
        body = request.state.protobuf_request
        try:
            answer = self._check(body)
        except PayloadError as error:
            self._refuse(_sender(body), str(error))
            raise HTTPException(403, "no node of this federation sends that") from error
        if answer is not None:
            request.state.protobuf_response = answer
            return Response(status_code=200)
        return await call_next(request)

    def _refuse(self, node_id: int, reason: str) -> None:
        """Log that a node has broken the rules and end its open task."""
        text = f"sent what no node of ours sends: {reason}"
        self._notices.log(logging.WARNING, self._name_of(node_id), text)
        self._ledger.refuse(node_id, f"its answer was refused: {printable(reason, 300)}")

    def _check(self, body: Any) -> PushMessagesResponse | None:
        """Refuse a request that our nodes never make.

        Returns:
            The answer, if Flower does not need to handle the request; otherwise None.

        Raises:
            PayloadError: If our nodes never make such a request.
            HTTPException: If it is legitimate but too large or too late.
        """
        if isinstance(body, ActivateNodeRequest):
            self._check_activation(body)
        elif isinstance(body, SendNodeHeartbeatRequest):
            _check_heartbeat(body.heartbeat_interval)
        elif isinstance(body, PullMessagesRequest):
            if body.message_ids:
                raise PayloadError("a node does not ask for messages by id")
        elif isinstance(body, PushMessagesRequest):
            return self._check_answer(body)
        elif isinstance(body, PushObjectRequest):
            self._check_pushed_object(body)
        elif isinstance(body, PullObjectRequest):
            self._check_run(body.run_id)
            if not is_hash(body.object_id):
                shown = printable(repr(body.object_id), 80)
                raise PayloadError(f"object_id is {shown}; expected a SHA-256")
        elif isinstance(body, ConfirmMessageReceivedRequest):
            self._check_run(body.run_id)
            message = self._state.message_ins_store.get(body.message_object_id)
            if message is None or message.metadata.dst_node_id != body.node.node_id:
                raise HTTPException(404, "no such message for this node")
        return None

    def _check_run(self, run_id: int) -> None:
        if run_id != self._ledger.run_id:
            raise PayloadError(f"run_id is {run_id}; expected {self._ledger.run_id}")

    def _check_activation(self, body: ActivateNodeRequest) -> None:
        """Check a node's request to join or to probe (`join --check`); log probes."""
        if body.heartbeat_interval != PROBE_SECONDS:
            _check_heartbeat(body.heartbeat_interval)
            return
        node_id = self._state.get_node_id_by_public_key(body.public_key)
        if node_id is not None:
            name = self._name_of(node_id)
            self._notices.log(logging.INFO, name, "looked in: ok (join --check)")

    # ── answers ──

    def _check_answer(self, body: PushMessagesRequest) -> PushMessagesResponse | None:
        """Check that this is a single answer from this node to a task that it was sent."""
        node_id = body.node.node_id
        # check its form
        message, tree = self._single_message(body)
        check_metadata(
            message.metadata,
            run_id=self._ledger.run_id,
            source=node_id,
            destination=SUPERLINK_NODE_ID,
            is_reply=True,
        )
        check_envelope(message, tree)
        # find the task that it answers
        task = self._state.message_ins_store.get(message.metadata.reply_to_message_id)
        if task is None or task.metadata.dst_node_id != node_id:
            # another node's task, or one that is over: accept nothing, to keep Flower's store small
            return PushMessagesResponse(results={message.metadata.message_id: 0})
        # an honest node only repeats an answer if its connection broke
        self._ledger.num_pushes[node_id] += 1
        if self._ledger.num_pushes[node_id] > MAX_PUSHES_PER_TASK:
            raise HTTPException(429, "this task was answered too often")
        self._check_object_names(message, tree, node_id)
        return None

    def _single_message(self, body: PushMessagesRequest) -> tuple[MessageProto, ObjectTree]:
        """Return the only message of a request and its object tree, if it is the sender's own."""
        node_id = body.node.node_id
        if any(message.metadata.src_node_id != node_id for message in body.messages_list):
            # not this node's answer: refuse it; the node's own may still arrive
            text = "spoke for another node, which was refused"
            self._notices.log(logging.WARNING, self._name_of(node_id), text)
            raise HTTPException(403, "a node speaks for itself")
        if len(body.messages_list) != 1 or len(body.message_object_trees) != 1:
            raise PayloadError("a node sends one message at a time")
        # Flower adds up the runtimes
        runtimes = body.clientapp_runtime_list
        are_durations = all(0 <= seconds < MAX_RUNTIME_SECONDS for seconds in runtimes)
        if len(runtimes) > 1 or not are_durations:
            raise PayloadError("clientapp_runtime_list is not a duration")
        return body.messages_list[0], body.message_object_trees[0]

    def _check_object_names(self, message: MessageProto, tree: ObjectTree, node_id: int) -> None:
        """Refuse an answer if one of its objects has the name of a message.

        Deleting either would delete the other as well.
        """
        metadata: Metadata = message.metadata
        message_ids = {*self._state.message_ins_store, *self._state.message_res_store}
        previous = self._state.message_res_store.get(metadata.message_id)
        if previous is not None and previous.metadata.src_node_id == node_id:
            message_ids.discard(metadata.message_id)  # the node repeats its answer
        elif metadata.message_id in self._state.object_store:
            raise PayloadError("metadata.message_id is that of another object")
        if not message.HasField("error") and message_ids.intersection(tree_names(tree)):
            raise PayloadError("the object tree names another message")

    def _check_pushed_object(self, body: PushObjectRequest) -> None:
        """Check one part of an answer and count its bytes."""
        self._check_run(body.run_id)
        has_session = 0 < len(body.session_id) <= MAX_SESSION_ID_LENGTH
        if not is_hash(body.object_id) or not has_session:
            raise PayloadError("an object comes under its SHA-256, in a session")
        # the parts of an answer may add up to the largest payload
        node_id = body.node.node_id
        self._ledger.pushed_bytes[node_id] += len(body.object_content)
        if self._ledger.pushed_bytes[node_id] > MAX_PAYLOAD_BYTES:
            reason = f"a reply has at most {MAX_PAYLOAD_BYTES} bytes; more came"
            self._refuse(node_id, reason)
            raise HTTPException(413, reason)


def _check_heartbeat(interval: float) -> None:
    if interval != HEARTBEAT_SECONDS:
        raise PayloadError(f"heartbeat_interval is {interval!r}; expected {HEARTBEAT_SECONDS}")


def _sender(body: Any) -> int:
    """Return the node that made a request, which Flower has verified to be the signer."""
    node_id = body.node.node_id if hasattr(body, "node") else getattr(body, "node_id", 0)
    return int(node_id)
