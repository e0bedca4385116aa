"""The second door before Flower's fleet service: an admitted node sends what a node of ours sends, and nothing else.

It looks at a request after its bytes were parsed and its signature was checked, and before Flower's handlers see it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, Request, Response
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from starlette.middleware.base import RequestResponseEndpoint

from fedmomentum.errors import PayloadError
from fedmomentum.flower.gate import Notices
from fedmomentum.flower.records import check_envelope, check_metadata, is_hash, tree_names
from fedmomentum.flower.transport import MAX_PAYLOAD_BYTES
from fedmomentum.schema import printable

HEARTBEAT_SECONDS = 10
PROBE_SECONDS = 1
"""The heartbeat interval of a node that only looks in (`join --check`); Flower refuses it, so it joins nothing."""
PUSHES_PER_QUESTION = 16
"""How often one question may be answered; more than once only where a connection broke in between."""


@dataclass
class Ledger:
    """What is known of each node's doings since it was last asked something.

    Attributes:
        run_id: Flower's number of the run.
        open: Node to the message that it was asked last, while that has no answer.
        pushed: Node to the bytes that it has sent since.
        pushes: Node to how often it has begun an answer since.
        refused: Message to why its answer was refused; whoever waits for the answer is told.
    """

    run_id: int = 0
    open: dict[int, str] = field(default_factory=dict)
    pushed: Counter[int] = field(default_factory=Counter)
    pushes: Counter[int] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)

    def asked(self, node_id: int, message_id: str) -> None:
        """Note that a node is asked something: that allows one answer's bytes."""
        self.open[node_id] = message_id
        self.pushed[node_id] = self.pushes[node_id] = 0

    def close(self, message_id: str) -> None:
        """Note that a question is over; called from another thread than `refuse`."""
        for node_id in [node_id for node_id, asked in list(self.open.items()) if asked == message_id]:
            self.open.pop(node_id, None)
        self.refused.pop(message_id, None)

    def refuse(self, node_id: int, reason: str) -> None:
        """End the part of a node in what it was asked, if anything: it has shown that it does not keep to the rules."""
        if message_id := self.open.pop(node_id, ""):
            self.refused[message_id] = reason


class Guard:
    """Pass on what a node of ours sends, in its own name, and nothing else; a middleware's dispatch.

    Flower checks who makes a request. It does not check whose message is in it, whose message is confirmed, nor that
    the parts of a message are those of a message.

    Args:
        state: Flower's link state.
        ledger: Of the nodes' doings.
        name_of: The name of the node with this number.
        notices: Takes what the operator should know.
    """

    def __init__(self, state: Any, ledger: Ledger, name_of: Callable[[int], str], notices: Notices) -> None:
        self._state = state
        self._ledger = ledger
        self._name_of = name_of
        self._notices = notices

    async def __call__(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Check a request, and pass it on."""
        asked = request.state.protobuf_request
        try:
            answer = self._check(asked)
        except PayloadError as error:
            self._refuse(_sender(asked), str(error))
            raise HTTPException(403, "no node of this federation's sends that") from error
        if answer is not None:
            request.state.protobuf_response = answer
            return Response(status_code=200)
        return await call_next(request)

    def _refuse(self, node_id: int, reason: str) -> None:
        self._notices.tell(logging.WARNING, self._name_of(node_id), f"sent what no node of ours sends: {reason}")
        self._ledger.refuse(node_id, f"its answer was refused: {printable(reason, 300)}")

    def _check(self, asked: Any) -> PushMessagesResponse | None:
        """Refuse a request that no node of ours makes; return the answer if Flower need not be asked for it.

        Raises:
            PayloadError: If it is refused.
            HTTPException: If it is only too much, or too late.
        """
        if isinstance(asked, ActivateNodeRequest):
            self._check_activation(asked)
        elif isinstance(asked, SendNodeHeartbeatRequest):
            if asked.heartbeat_interval != HEARTBEAT_SECONDS:
                raise PayloadError(f"heartbeat_interval is {asked.heartbeat_interval!r}; wanted {HEARTBEAT_SECONDS}")
        elif isinstance(asked, PullMessagesRequest):
            if asked.message_ids:
                raise PayloadError("a node does not ask for messages by name")
        elif isinstance(asked, PushMessagesRequest):
            return self._check_answer(asked)
        elif isinstance(asked, PushObjectRequest):
            self._check_part(asked)
        elif isinstance(asked, PullObjectRequest):
            self._check_run(asked.run_id)
            if not is_hash(asked.object_id):
                raise PayloadError(f"object_id is {printable(repr(asked.object_id), 80)}; wanted a SHA-256")
        elif isinstance(asked, ConfirmMessageReceivedRequest):
            self._check_run(asked.run_id)
            known = self._state.message_ins_store.get(asked.message_object_id)
            if known is None or known.metadata.dst_node_id != asked.node.node_id:
                raise HTTPException(404, "no such message for this node")
        return None

    def _check_run(self, run_id: int) -> None:
        if run_id != self._ledger.run_id:
            raise PayloadError(f"run_id is {run_id}; wanted {self._ledger.run_id}")

    def _check_activation(self, asked: ActivateNodeRequest) -> None:
        if asked.heartbeat_interval == PROBE_SECONDS:
            if (node_id := self._state.get_node_id_by_public_key(asked.public_key)) is not None:
                self._notices.tell(logging.INFO, self._name_of(node_id), "looked in: ok (join --check)")
        elif asked.heartbeat_interval != HEARTBEAT_SECONDS:
            raise PayloadError(f"heartbeat_interval is {asked.heartbeat_interval!r}; wanted {HEARTBEAT_SECONDS}")

    def _check_answer(self, asked: PushMessagesRequest) -> PushMessagesResponse | None:
        """Check that this is one answer, of this node, to a question of this node's."""
        state, node_id = self._state, asked.node.node_id
        if any(message.metadata.src_node_id != node_id for message in asked.messages_list):
            # not an answer of this node's: it is refused, and the node's own may still come
            self._notices.tell(logging.WARNING, self._name_of(node_id), "spoke for another node, which was refused")
            raise HTTPException(403, "a node speaks for itself")
        if len(asked.messages_list) != 1 or len(asked.message_object_trees) != 1:
            raise PayloadError("a node sends one message at a time")
        if len(asked.clientapp_runtime_list) > 1 or not all(0 <= s < 1e9 for s in asked.clientapp_runtime_list):
            raise PayloadError("clientapp_runtime_list is no duration")
        message, tree = asked.messages_list[0], asked.message_object_trees[0]
        metadata = message.metadata
        check_metadata(
            metadata, run_id=self._ledger.run_id, source=node_id, destination=SUPERLINK_NODE_ID, is_reply=True
        )
        check_envelope(message, tree)
        question = state.message_ins_store.get(metadata.reply_to_message_id)
        if question is None or question.metadata.dst_node_id != node_id:
            # another's question, or one that is over: nothing is taken, and Flower's store grows by nothing
            return PushMessagesResponse(results={metadata.message_id: 0})
        self._ledger.pushes[node_id] += 1
        if self._ledger.pushes[node_id] > PUSHES_PER_QUESTION:
            raise HTTPException(429, "this question was answered too often")
        # No object of the answer may stand for a message: its end would be the other's end.
        messages = {*state.message_ins_store, *state.message_res_store}
        repeated = state.message_res_store.get(metadata.message_id)
        if repeated is not None and repeated.metadata.src_node_id == node_id:
            messages.discard(metadata.message_id)
        elif metadata.message_id in state.object_store:
            raise PayloadError("metadata.message_id is that of another object")
        if not message.HasField("error") and messages.intersection(tree_names(tree)):
            raise PayloadError("the object tree names another message")
        return None

    def _check_part(self, asked: PushObjectRequest) -> None:
        self._check_run(asked.run_id)
        if not is_hash(asked.object_id) or not 0 < len(asked.session_id) <= 64:
            raise PayloadError("an object comes under its SHA-256, in a session")
        self._ledger.pushed[asked.node.node_id] += len(asked.object_content)
        if self._ledger.pushed[asked.node.node_id] > MAX_PAYLOAD_BYTES:
            reason = f"a reply has at most {MAX_PAYLOAD_BYTES} bytes; more came"
            self._refuse(asked.node.node_id, reason)
            raise HTTPException(413, reason)


def _sender(asked: Any) -> int:
    """Return the node that made a request; Flower has checked that it is the signer's."""
    return int(asked.node.node_id if hasattr(asked, "node") else getattr(asked, "node_id", 0))
