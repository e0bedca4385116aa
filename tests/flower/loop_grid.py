"""Flower's `Grid` within one process: stock apps answer one another without a SuperLink, Ray or a network."""

from collections.abc import Callable, Iterable
from uuid import uuid4

import fedmomentum.flower  # noqa: F401

# after fedmomentum.flower, which sets what flwr reads when it is imported
from flwr.app import Error, Message, RecordDict  # isort: skip
from flwr.common.serde import message_from_proto, message_to_proto  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.supercore.task_identity import TaskIdentity  # isort: skip

Node = Callable[[Message], Message]


class LoopGrid(Grid):
    """Calls each node's function with a copy of its message that went through Flower's protobuf.

    Args:
        nodes: Node id to its function, which may raise, or return None for a node that is gone.
    """

    def __init__(self, nodes: dict[int, Node]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = nodes
        self.sent: list[Message] = []

    def set_run(self, run) -> None:
        pass

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content: RecordDict, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None) -> list[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self.sent.append(message)
            arrived = _copy(message)
            try:
                reply = self.nodes[message.metadata.dst_node_id](arrived)
            except Exception as error:
                reply = Message(Error(2, f"{type(error)}:<{error}>"), reply_to=arrived)
            if reply is not None:
                replies.append(_copy(reply))
        return replies


def _copy(message: Message) -> Message:
    message_id = message.metadata.message_id
    copied = message_from_proto(message_to_proto(message))
    copied.metadata.__dict__["_message_id"] = message_id
    return copied
