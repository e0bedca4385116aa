"""What a client trains and is tested on: a prompt, its answer, and the client they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fedmomentum.errors import DataError
from fedmomentum.utils.names import check_client_name
from fedmomentum.utils.text import printable

MAX_LABEL = 256
"""The most characters of a category: as many as `schema.Label` accepts where names are received."""

MAX_CATEGORIES = 10_000
"""The most categories of a data set: as many as a client may report its scores by."""


class TextPair(NamedTuple):
    """Two texts that are classified together."""

    first: str
    second: str


Prompt = str | tuple[dict[str, str], ...] | TextPair
"""Plain text, the chat messages (``{"role": ..., "content": ...}``) before the answer, or a pair of
texts to classify."""


def label_problem(text: str) -> str | None:
    """Return what is wrong with the name of a category or client, None where nothing is.

    The text completes a sentence of which the name is the subject.
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
        prompt: Plain text, or the chat messages before the answer, each with exactly ``role`` and
            ``content``; what is classified, a text or a pair of them.
        completion: The text of the answer (the assistant's last turn), or the label; never empty.
        category: The label or task by which examples are partitioned and results reported: a short
            name.
        scoring: JSON that the task's own scorer needs; empty for an exact match of the stripped
            text.

    Raises:
        DataError: If the completion is empty; the prompt has no text, a message of another shape,
            or an empty message that is not the system's; or the category is too long or cannot be
            shown.
    """

    prompt: Prompt
    completion: str
    category: str = ""
    scoring: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained on."""
        if not isinstance(self.completion, str):
            raise DataError(f"the completion is {type(self.completion).__name__}; it must be text")
        if not self.completion.strip():
            raise DataError(
                "the completion is empty; every example needs an answer to learn: fill it in or "
                "drop it"
            )
        problem = label_problem(self.category)
        if problem is not None:
            raise DataError(
                f"the category {problem}; it must be a short name of at most {MAX_LABEL} characters"
            )
        _check_prompt(self.prompt)


def _check_prompt(prompt: object) -> None:
    """Refuse a prompt that holds no text, or messages of another shape."""
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
    """Refuse a message of another shape, or an empty one that is not the system's."""
    where = f"message {position} of the prompt"
    shown = printable(repr(message), 100)
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise DataError(f"{where} must have exactly role and content; got {shown}")
    if not all(isinstance(value, str) for value in message.values()):
        raise DataError(f"{where}: role and content must be text; got {shown}")
    # An empty system message is common, and means what it says: no instruction.
    if not message["content"].strip() and message["role"] != "system":
        role = printable(message["role"], 40)
        raise DataError(f"{where}, the {role}'s, is empty; fill it in or drop the row")


@dataclass(frozen=True)
class ClientData:
    """The examples of one client.

    Attributes:
        client_id: The client's name, one that `check_client_name` accepts.
        train: The examples it trains on.
        test: The examples it holds out; they share no prompt with ``train``.

    Raises:
        DataError: If the client's name cannot be used, or it has nothing to train on.
    """

    client_id: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        """Refuse a client that could not take part."""
        check_client_name(self.client_id, "the data", DataError)
        if not self.train:
            raise DataError(
                f"client {self.client_id}: no training examples; give it some or leave it out"
            )
