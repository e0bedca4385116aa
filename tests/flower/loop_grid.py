"""Flower's `Grid` within one process: stock apps answer one another without a SuperLink, Ray or a network."""

from collections.abc import Callable, Iterable
from uuid import uuid4

import fedmomentum.flower  # noqa: F401

# after fedmomentum.flower, which sets what flwr reads when it is imported
from flwr.app import Error, Message, RecordDict  # isort: skip
from flwr.common.serde import message_from_proto, message_to_proto  # isort: skip
from flwr.proto.node_pb2 import NodeInfo  # isort: skip
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
        self.activated: dict[int, str] = {}
        self.sent: list[Message] = []
        self._waiting: dict[str, Message] = {}

    def set_run(self, run) -> None:
        pass

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content: RecordDict, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> list[NodeInfo]:
        return [
            NodeInfo(node_id=number, last_activated_at=self.activated.get(number, ""))
            for number in self.nodes
        ]

    def push_messages(self, messages) -> list[str]:
        """A node answers when its message is pushed; the reply waits until it is pulled."""
        names = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            names.append(message.metadata.message_id)
            self.sent.append(message)
            arrived = _copy(message)
            try:
                reply = self.nodes[message.metadata.dst_node_id](arrived)
            except Exception as error:
                reply = Message(Error(2, f"{type(error)}:<{error}>"), reply_to=arrived)
            if reply is not None:
                self._waiting[names[-1]] = _copy(reply)
        return names

    def pull_messages(self, message_ids) -> list[Message]:
        return [self._waiting.pop(name) for name in message_ids if name in self._waiting]

    def send_and_receive(self, messages, *, timeout=None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def _copy(message: Message) -> Message:
    message_id = message.metadata.message_id
    copied = message_from_proto(message_to_proto(message))
    copied.metadata.__dict__["_message_id"] = message_id
    return copied
