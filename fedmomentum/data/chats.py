"""Converts the chat message formats found in data sets to one: role and content.

Handles ShareGPT's `from` and `value`, OpenAI's content parts, and message names and weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmomentum.data.examples import Message, keys_problem
from fedmomentum.errors import DataError
from fedmomentum.utils.text import short_repr

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
"""ShareGPT speaker -> the role that chat templates use."""
MESSAGE_KEYS = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
"""The keys by which messages written as JSON text are recognized."""


@dataclass(frozen=True)
class Chat:
    """The messages of a row.

    Attributes:
        messages: The messages, each with role and content.
        weights: The training weight of each message: 0, 1, or None if the row gives none.
    """

    messages: list[Message]
    weights: list[int | None]

    @property
    def is_weighted(self) -> bool:
        """Whether the row says which messages to learn."""
        return any(weight is not None for weight in self.weights)

    def learned_turns(self) -> tuple[int, ...] | None:
        """Return the positions of the assistant messages to learn; None if the row does not say.

        If only some messages have weights, those without are learned, as in OpenAI's format.
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
        value: The column's value in a row.
        column: The column, for error messages.
        may_be_text: Whether the messages may be JSON text, as in tables that cannot hold lists.

    Raises:
        DataError: If the value is not a list of messages.
    """
    if may_be_text and isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse_json(value, column)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"column {column!r} must be a list of messages (role, content); got {short_repr(value)}"
        )
    messages = []
    weights = []
    for position, item in enumerate(value, start=1):
        message, weight = _parse_message(item, f"column {column!r}, message {position}")
        messages.append(message)
        weights.append(weight)
    return Chat(messages, weights)


def unpack_messages(value: Any) -> Any:
    """Return the messages that a text holds as JSON; anything else is returned unchanged.

    A text is taken for messages only if it is a JSON list of nothing but messages: an answer may
    itself be a list.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    are_messages = bool(found) and all(map(_looks_like_message, found))
    return found if are_messages else value


def _looks_like_message(item: Any) -> bool:
    """Return whether a value has the keys of a message."""
    keys = item.keys() if isinstance(item, dict) else set()
    return any(keys >= needed for needed in MESSAGE_KEYS)


def _parse_json(text: str, column: str) -> Any:
    """Parse a list from JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"column {column!r} begins like a list and is not JSON ({error}); write it by "
            "json.dumps, or save the rows as JSON Lines"
        ) from None


def _parse_message(item: Any, place: str) -> tuple[Message, int | None]:
    """Convert one message to role and content, and return its weight."""
    if not isinstance(item, Mapping):
        raise DataError(f"{place}: {keys_problem(item)}")
    # Arrow fills in None for keys that occur only in other rows' messages.
    message: Message = {key: value for key, value in item.items() if value is not None}
    if "from" in message or "value" in message:
        message = _from_sharegpt(message, place)
    weight = _pop_weight(message, place)
    # A message that calls a tool may have no content.
    if "tool_calls" in message:
        message.setdefault("content", "")
    problem = keys_problem(message)
    if problem is not None:
        raise DataError(f"{place}: {problem}")
    if isinstance(message["content"], list):
        message["content"] = _join_parts(message["content"], place)
    return message, weight


def _from_sharegpt(message: Message, place: str) -> Message:
    """Convert a message from ShareGPT's format."""
    if not {"from", "value"} <= message.keys() or not message.keys().isdisjoint(
        ("role", "content")
    ):
        raise DataError(
            f"{place}: must have from and value, or role and content; got {short_repr(message)}"
        )
    # The speaker determines the role; the remaining keys are checked along with the role.
    sender = message["from"]
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise DataError(
            f"{place}: from is {short_repr(sender)}; known: {', '.join(SHAREGPT_ROLES)}. Calls of "
            "tools are written as tool_calls of a message with role and content"
        )
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": role, "content": message["value"], **others}


def _pop_weight(message: Message, place: str) -> int | None:
    """Remove OpenAI's `weight` from a message and return it."""
    if "weight" not in message:
        return None
    weight = message.pop("weight")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or weight not in (0, 1):
        raise DataError(f"{place}: weight is {short_repr(weight)}; it must be 0 or 1")
    if message.get("role") != "assistant" and weight == 1:
        raise DataError(
            f"{place}: weight is 1 in a message of {short_repr(message.get('role'))}; only what "
            "the assistant says is learned: remove the weight"
        )
    return int(weight)


def _join_parts(parts: list[Any], place: str) -> str:
    """Concatenate the text of content parts, as chat templates do."""
    texts = []
    for number, part in enumerate(parts, start=1):
        fields = dict(part) if isinstance(part, Mapping) else {}
        fields = {key: value for key, value in fields.items() if value is not None}
        is_text = fields.keys() == {"type", "text"} and fields["type"] == "text"
        if not is_text or not isinstance(fields["text"], str):
            raise DataError(
                f"{place}: part {number} of its content is {short_repr(part)}; only parts of text "
                '({"type": "text", "text": "..."}) can be learned: remove it, or drop the row'
            )
        texts.append(fields["text"])
    return "".join(texts)
