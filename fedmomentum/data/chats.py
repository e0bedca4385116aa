"""Chat messages as data sets have them, as one form: role and content.

ShareGPT's `from` and `value`, OpenAI's content in parts, names and weights of messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmomentum.data.examples import Message, keys_problem
from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's form, and the role that chat templates know them by."""


@dataclass(frozen=True)
class Chat:
    """The messages of a row.

    Attributes:
        messages: Each with role and content.
        weights: Of each message, what the row says of learning it: 0, 1, or None for nothing.
    """

    messages: list[Message]
    weights: list[int | None]

    @property
    def is_weighted(self) -> bool:
        """Whether the row says which messages are learned."""
        return any(weight is not None for weight in self.weights)

    def learned_turns(self) -> tuple[int, ...] | None:
        """Return the positions of the assistant's messages to learn; None: the row does not say.

        A message without a weight among others that have one is learned, as OpenAI has it.
        """
        if not self.is_weighted:
            return None
        turns = []
        for position, (message, weight) in enumerate(zip(self.messages, self.weights)):
            if message["role"] == "assistant" and weight != 0:
                turns.append(position)
        return tuple(turns)


def parse_chat(value: Any, column: str, *, may_be_text: bool = False) -> Chat:
    """Return a column's messages.

    Args:
        value: The value of a row.
        column: The column, for messages.
        may_be_text: Whether the messages may be written as JSON, as tables without lists have them.

    Raises:
        DataError: If they are no messages.
    """
    if may_be_text and isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_json(value, column)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"column {column!r} must be a list of messages (role, content); got {shown(value)}"
        )
    messages = []
    weights = []
    for position, item in enumerate(value, start=1):
        message, weight = _parse_message(item, f"column {column!r}, message {position}")
        messages.append(message)
        weights.append(weight)
    return Chat(messages, weights)


def _parse_json(text: str, column: str) -> Any:
    """Return a list that is written as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"column {column!r} begins like a list and is not JSON ({error}); write it by "
            "json.dumps, or save the rows as JSON Lines"
        ) from None


def _parse_message(item: Any, place: str) -> tuple[Message, int | None]:
    """Return one message in our form, and its weight."""
    if not isinstance(item, Mapping):
        raise DataError(f"{place}: {keys_problem(item)}")
    # Arrow fills the keys that only other rows' messages have with None.
    message: Message = {key: value for key, value in item.items() if value is not None}
    if "from" in message or "value" in message:
        message = _from_sharegpt(message, place)
    weight = _pop_weight(message, place)
    # Who calls a tool need not say anything.
    if "tool_calls" in message:
        message.setdefault("content", "")
    problem = keys_problem(message)
    if problem is not None:
        raise DataError(f"{place}: {problem}")
    if isinstance(message["content"], list):
        message["content"] = _join_parts(message["content"], place)
    return message, weight


def _from_sharegpt(message: Message, place: str) -> Message:
    """Return a message of ShareGPT's form in ours."""
    if not {"from", "value"} <= message.keys() or not message.keys().isdisjoint(
        ("role", "content")
    ):
        raise DataError(
            f"{place}: must have from and value, or role and content; got {shown(message)}"
        )
    # Who speaks decides the role; whatever else the message has is checked with its role.
    sender = message["from"]
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise DataError(
            f"{place}: from is {shown(sender)}; known: {', '.join(SHAREGPT_ROLES)}. Calls of tools "
            "are written as tool_calls of a message with role and content"
        )
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message["value"], **others}


def _pop_weight(message: Message, place: str) -> int | None:
    """Take OpenAI's `weight` out of a message, and return it."""
    if "weight" not in message:
        return None
    weight = message.pop("weight")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or weight not in (0, 1):
        raise DataError(f"{place}: weight is {shown(weight)}; it must be 0 or 1")
    if message.get("role") != "assistant" and weight == 1:
        raise DataError(
            f"{place}: weight is 1 in a message of {shown(message.get('role'))}; only what the "
            "assistant says is learned: remove the weight"
        )
    return int(weight)


def _join_parts(parts: list[Any], place: str) -> str:
    """Return the text of a content in parts, as chat templates write it: one after the other."""
    texts = []
    for number, part in enumerate(parts, start=1):
        fields = dict(part) if isinstance(part, Mapping) else {}
        fields = {key: value for key, value in fields.items() if value is not None}
        is_text = fields.keys() == {"type", "text"} and fields["type"] == "text"
        if not is_text or not isinstance(fields["text"], str):
            raise DataError(
                f"{place}: part {number} of its content is {shown(part)}; only parts of text "
                '({"type": "text", "text": "..."}) can be learned: remove it, or drop the row'
            )
        texts.append(fields["text"])
    return "".join(texts)


def shown(value: Any) -> str:
    """Return a value of the data for a message: one line, and cut where it is long."""
    return printable(repr(value), 100)
