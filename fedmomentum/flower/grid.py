"""Flower's grid over the fleet service: push tasks, pull replies."""

from __future__ import annotations

import time
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run

from fedmomentum.errors import FedMomentumError, PayloadError
from fedmomentum.flower.records import check_objects, tree_names
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.flower.guard import TaskLedger


POLL_SECONDS = 0.1
"""How often `send_and_receive` polls for replies."""


class SuperLinkGrid(Grid):
    """Implements Flower's `Grid` over a link state in this process.

    A problem with one reply is reported as an error in place of that reply; the other replies
    arrive as usual.

    Args:
        state: Flower's link state, whose object store holds the messages' objects.
        ledger: What each node has done since its last task.
    """

    def __init__(self, state: Any, ledger: TaskLedger) -> None:
        self._state = state
        self._ledger = ledger
        self._arriving: dict[str, tuple[Message, ObjectTree]] = {}  # replies by task id

    def set_run(self, run: Run) -> None:
        """Do nothing: the run is the SuperLink's."""

    @property
    def run(self) -> Run:
        """The SuperLink's run."""
        run: Run = deepcopy(self._state.get_run_info(run_ids=[self._ledger.run_id])[0])
        return run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return sorted(self._state.get_nodes(self._ledger.run_id))

    # ── sending ──

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Store messages for their nodes to fetch.

        Returns:
            The messages' ids; an empty one if Flower refused the message.
        """
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        """Store a message, and return its id; an empty id if the link state does not accept it."""
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            # store the message without its content, which follows object by object
            objects = get_all_nested_objects(message)
            tree = get_object_tree(message)
            session = self._state.start_session(self._ledger.run_id)
            is_stored, missing = self._state.store_message_and_object_tree(
                remove_content_from_message(message), tree, session
            )
            if is_stored:
                self._ledger.open(message.metadata.dst_node_id, message.metadata.message_id)
            for object_id in missing:
                content = objects.pop(object_id).deflate()
                self._state.store_object(self._ledger.run_id, session, object_id, content)
        return message.metadata.message_id if is_stored else ""

    # ── receiving ──

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the complete replies, and Flower's errors for nodes that are gone."""
        replies = []
        for task_id in dict.fromkeys(message_ids):
            try:
                reply = self._reply_to(task_id)
            except Exception as error:
                # an error only affects this reply; delete what is left of it in Flower's stores
                kind = "" if isinstance(error, FedMomentumError) else f"{type(error).__name__}: "
                text = f"{kind}{printable(str(error), 300)}"
                reply = self._discard(task_id, f"its answer could not be read: {text}")
            if reply is not None:
                self._ledger.close(task_id)
                replies.append(reply)
        return replies

    def _reply_to(self, task_id: str) -> Message | None:
        """Return the complete reply to a task, or None if it has not arrived."""
        state = self._state
        if task_id in self._ledger.refusals:
            return self._discard(task_id, self._ledger.refusals.pop(task_id))
        # the envelope comes first
        if task_id not in self._arriving:
            replies = state.get_message_res(message_ids={task_id}, run_id=self._ledger.run_id)
            for reply in replies:
                state.delete_messages(message_ins_ids={task_id})
                tree = state.object_store.get_object_tree(reply.metadata.message_id)
                self._arriving[task_id] = reply, tree
        if task_id not in self._arriving:
            return None

        # then its objects, which may still be arriving
        message, tree = self._arriving[task_id]
        contents = {name: state.get_object(self._ledger.run_id, name) for name in tree_names(tree)}
        if b"" in contents.values():
            return None
        del self._arriving[task_id]
        state.object_store.delete(message.metadata.message_id)
        if message.has_error():
            return message
        if None in contents.values():
            return self._discard(task_id, "its answer stopped half-way")
        check_objects(message.metadata.message_id, contents)
        return _inflate(message, contents)

    def discard(self, task_id: str) -> None:
        """Delete a task and whatever has arrived in reply to it."""
        self._discard(task_id, "")
        self._ledger.close(task_id)

    def _discard(self, task_id: str, reason: str) -> Message:
        """Delete what has arrived for a task, and return an error in place of its reply."""
        state = self._state
        # the task, the reply known to Flower, and the one that is arriving
        message_ids = [task_id, state.message_ins_id_to_message_res_id.get(task_id)]
        if task_id in self._arriving:
            message, _ = self._arriving.pop(task_id)
            message_ids.append(message.metadata.message_id)
        state.delete_messages(message_ins_ids={task_id})
        for message_id in message_ids:
            if message_id is not None:
                state.object_store.delete(message_id)
        metadata = Metadata(
            run_id=self._ledger.run_id,
            message_id="",
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=SUPERLINK_NODE_ID,
            reply_to_message_id=task_id,
            group_id="",
            created_at=time.time(),
            ttl=1.0,
            message_type="train",
        )
        return make_message(metadata, error=Error(ErrorCode.MOD_FAILED_PRECONDITION, reason))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages, then pull until all are answered or time is up."""
        waiting = set(self.push_messages(messages))
        replies = []
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting and time.monotonic() < end:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            time.sleep(POLL_SECONDS)
        return replies


def _inflate(message: Message, contents: dict[str, bytes]) -> Message:
    """Return a message with its content.

    Args:
        message: The message without its content, as checked by Flower.
        contents: The bytes of all objects in its tree, by name.

    Raises:
        PayloadError: If the objects do not form a message.
        Exception: Whatever Flower raises if they cannot be combined.
    """
    inflated = inflate_object_from_contents(message.metadata.message_id, contents)
    if not isinstance(inflated, Message):
        raise PayloadError(f"it is a {type(inflated).__name__}, not a message")
    inflated.metadata.__dict__["_message_id"] = message.metadata.message_id
    # keep the envelope that Flower checked, not the one inside
    inflated.metadata.__dict__["_reply_to_message_id"] = message.metadata.reply_to_message_id
    return inflated
