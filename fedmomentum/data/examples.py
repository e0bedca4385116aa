"""Training and test examples: prompts with answers, and the clients that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedmomentum.errors import DataError
from fedmomentum.utils.names import check_client_name
from fedmomentum.utils.text import printable, short_repr

MAX_LABEL = 256
"""The maximum length of a category in characters, the same as `schema.Label` accepts."""

MAX_CATEGORIES = 10_000
"""The maximum number of categories in a data set: as many as a client may report scores for."""

Message = dict[str, Any]
"""A chat message: `role`, `content`, optionally `name` and the `TOOL_KEYS` of its role."""


class TextPair(NamedTuple):
    """Two texts to classify together."""

    first: str
    second: str


Prompt = str | tuple[Message, ...] | TextPair
"""Plain text, the chat messages before the answer, or a pair of texts to classify."""

TOOL_KEYS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}
"""Role -> additional keys that its messages may have in chats with tool calls."""

MAX_NESTING = 16
"""The maximum nesting depth of a tool call's arguments."""


def label_problem(text: str) -> str | None:
    """Return what is wrong with the name of a category or client, or None.

    The text completes a sentence whose subject is the name.
    """
    if len(text) > MAX_LABEL:
        return f"is a text of {len(text)} characters"
    if printable(text, MAX_LABEL) != text:
        bad = next(character for character in text if printable(character) != character)
        return f"holds {bad!r}, a character that cannot be shown"
    return None


@dataclass(frozen=True)
class Example:
    """One prompt and the answer to learn.

    Attributes:
        prompt: Plain text, or the chat messages before the answer, each with ``role`` and
            ``content``, some also with `TOOL_KEYS`. For a classifier, the text or pair of texts to
            classify. None if there is no prompt and the entire text is learned.
        completion: The text of the answer (the assistant's last turn), or the label; never empty.
        category: The label or task by which examples are partitioned and results reported: a short
            name.
        scoring: JSON for the task's own scorer; empty for an exact match of the stripped text.
        rejected: The text of the rejected answer, in preference data; None if there is only one
            answer.
        unit: Whose example it is, such as a patient's: differentially private training protects
            all examples of a unit together; empty if each example is its own unit.
        source_row: The row in its file, counted from 1, for error messages; 0 if there is none.
        learned_turns: Positions of the assistant messages in the prompt that are learned in
            addition to the answer, if the data says so; None if only `training.loss-on` decides.

    Raises:
        DataError: If an answer is empty or both are the same; the prompt has no text, a malformed
            message, or an empty message where that is not allowed; or the category is too long or
            not printable.
    """

    prompt: Prompt | None
    completion: str
    category: str = ""
    scoring: str = ""
    rejected: str | None = None
    unit: str = field(default="", compare=False, repr=False)
    source_row: int = field(default=0, compare=False, repr=False)
    learned_turns: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Reject examples that cannot be trained on."""
        if not isinstance(self.completion, str):
            raise DataError(f"the completion is {type(self.completion).__name__}; it must be text")
        if not self.completion.strip():
            raise DataError(
                "the completion is empty; every example needs an answer to learn: fill it in or "
                "drop it"
            )
        self._check_rejected()
        problem = label_problem(self.category)
        if problem is not None:
            raise DataError(
                f"the category {problem}; it must be a short name of at most {MAX_LABEL} characters"
            )
        if self.prompt is not None:
            _check_prompt(self.prompt)

    def _check_rejected(self) -> None:
        """Validate the rejected answer."""
        if self.rejected is None:
            return
        if not isinstance(self.rejected, str):
            raise DataError(
                f"the rejected answer is {type(self.rejected).__name__}; it must be text"
            )
        if not self.rejected.strip():
            raise DataError("the rejected answer is empty; fill it in or drop the row")
        if self.rejected == self.completion:
            raise DataError(
                "the chosen and the rejected answer are the same, so nothing is preferred; drop "
                "the row"
            )


def _check_prompt(prompt: object) -> None:
    """Reject a prompt without text or with malformed messages."""
    if isinstance(prompt, str):
        has_text = bool(prompt.strip())
    elif isinstance(prompt, TextPair):
        has_text = bool(prompt.first.strip() and prompt.second.strip())
    elif isinstance(prompt, tuple):
        if not prompt:
            raise DataError(
                "the prompt holds no message; at least one must stand before the answer"
            )
        for position, message in enumerate(prompt, start=1):
            _check_message(message, position)
        has_text = any(message["content"].strip() for message in prompt)
    else:
        raise DataError(
            f"the prompt is {type(prompt).__name__}; it must be text or a tuple of messages"
        )
    if not has_text:
        raise DataError("the prompt is empty; every example needs a prompt: fill it in or drop it")


def _check_message(message: object, position: int) -> None:
    """Reject a malformed message, or an empty one where that is not allowed."""
    where = f"message {position} of the prompt"
    problem = _message_problem(message)
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    assert isinstance(message, Mapping)  # or there were a problem
    # An empty system message is common and means: no instruction. Messages that call a tool may be
    # empty, and so may a tool's result.
    may_be_empty = message["role"] in ("system", "tool") or "tool_calls" in message
    if not message["content"].strip() and not may_be_empty:
        role = printable(message["role"], 40)
        raise DataError(f"{where}, the {role}'s, is empty; fill it in or drop the row")


def keys_problem(message: object) -> str | None:
    """Return what is wrong with the keys of a chat message, or None."""
    shown = short_repr(message)
    keys = set(message) if isinstance(message, Mapping) else set()
    if not isinstance(message, Mapping) or not {"role", "content"} <= keys:
        return f"must have exactly role and content; got {shown}"
    allowed = [*sorted(TOOL_KEYS.get(str(message["role"]), ())), "name"]
    if keys.difference(("role", "content"), allowed):
        more = " and ".join(allowed)
        return f"must have exactly role and content, and perhaps {more}; got {shown}"
    return None


def _message_problem(message: object) -> str | None:
    """Return what is wrong with the structure of a chat message, or None."""
    problem = keys_problem(message)
    if problem is not None:
        return problem
    assert isinstance(message, Mapping)  # or there were a problem
    shown = short_repr(message)
    if not isinstance(message["role"], str) or not isinstance(message["content"], str):
        return f"role and content must be text; got {shown}"
    for key in ("tool_call_id", "name"):
        if not isinstance(message.get(key, ""), str):
            return f"{key} must be text; got {shown}"
    calls = message.get("tool_calls", [{}])
    if not isinstance(calls, list) or not calls or not all(isinstance(c, Mapping) for c in calls):
        return f"tool_calls must be a list of objects; got {shown}"
    if not _is_plain(calls, MAX_NESTING):
        return (
            "tool_calls hold a null, something that is no JSON, or are nested deeper than "
            f"{MAX_NESTING} levels. Tables fill the keys that other rows have with null: write "
            f"the arguments as a JSON text there; got {shown}"
        )
    return None


def _is_plain(value: object, depth: int) -> bool:
    """Return whether a value is JSON without null and nested no deeper than ``depth``."""
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, list):
        items = value
    else:
        return isinstance(value, (str, int, float))
    return depth > 0 and all(_is_plain(item, depth - 1) for item in items)


@dataclass(frozen=True)
class ClientData:
    """The examples of one client.

    Attributes:
        client_id: The client's name, valid according to `check_client_name`.
        train: The examples it trains on.
        test: The examples it holds out; they share no prompt with ``train``.

    Raises:
        DataError: If the client's name cannot be used, or it has nothing to train on.
    """

    client_id: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        """Reject a client that could not take part."""
        check_client_name(self.client_id, "the data", DataError)
        if not self.train:
            raise DataError(
                f"client {self.client_id}: no training examples; give it some or leave it out"
            )
