"""What a client trains and is tested on: a prompt, its answer, and the client that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmomentum.errors import DataError
from fedmomentum.names import check_client_name
from fedmomentum.schema import printable

MAX_LABEL = 256
"""The most characters of a category: as many as `schema.Label` lets through where names arrive."""

MAX_CATEGORIES = 10_000
"""The most categories of a data set: as many as a client may report its scores by."""

Prompt = str | tuple[dict[str, str], ...]
"""Plain text, or the chat messages (``{"role": ..., "content": ...}``) that stand before the answer."""


def label_problem(text: str) -> str | None:
    """Return what is wrong with the name of a category or client, in words that follow on it; None: nothing."""
    if len(text) > MAX_LABEL:
        return f"is a text of {len(text)} characters"
    if printable(text, MAX_LABEL) != text:
        bad = next(c for c in text if printable(c) != c)
        return f"holds {bad!r}, a character that cannot be shown"
    return None


@dataclass(frozen=True)
class Example:
    """One prompt and the answer to learn.

    Attributes:
        prompt: Plain text, or chat messages before the answer, each with exactly ``role`` and ``content``.
        completion: The answer's text (the last turn of the assistant), never empty.
        category: The label or task by which examples are partitioned and results reported: a short name.
        scoring: JSON which the task's own scorer needs; empty means an exact match of the stripped text.

    Raises:
        DataError: The completion is empty; the prompt has no text, a message of another shape, or an empty message
            that is not the system's; the category is too long, or cannot be shown.
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
            raise DataError("the completion is empty; every example needs an answer to learn: fill it in or drop it")
        if (problem := label_problem(self.category)) is not None:
            raise DataError(f"the category {problem}; it must be a short name of at most {MAX_LABEL} characters")
        if isinstance(self.prompt, str):
            if not self.prompt.strip():
                raise DataError("the prompt is empty; every example needs a prompt: fill it in or drop it")
            return
        if not isinstance(self.prompt, tuple):
            raise DataError(f"the prompt is {type(self.prompt).__name__}; it must be text or a tuple of messages")
        if not self.prompt:
            raise DataError("the prompt holds no message; at least one must stand before the answer")
        for position, message in enumerate(self.prompt, start=1):
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise DataError(
                    f"message {position} of the prompt must have exactly role and content; got {_shown(message)}"
                )
            if not all(isinstance(value, str) for value in message.values()):
                raise DataError(
                    f"message {position} of the prompt: role and content must be text; got {_shown(message)}"
                )
            # An empty system message is common, and says what it means: no instruction.
            if not message["content"].strip() and message["role"] != "system":
                raise DataError(
                    f"message {position} of the prompt, the {printable(message['role'], 40)}'s, is empty; fill it in "
                    "or drop the row"
                )
        if not any(message["content"].strip() for message in self.prompt):
            raise DataError("the prompt is empty; every example needs a prompt: fill it in or drop it")


def _shown(value: object) -> str:
    return printable(repr(value), 100)


@dataclass(frozen=True)
class ClientData:
    """The examples which one client holds.

    Attributes:
        client_id: The client's name, one that `check_client_name` takes.
        train: What it trains on.
        test: What it keeps aside; shares no prompt with ``train``.

    Raises:
        DataError: The client has no name that can be used, or nothing to train on.
    """

    client_id: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        """Refuse a client which could not take part."""
        check_client_name(self.client_id, "the data", DataError)
        if not self.train:
            raise DataError(f"client {self.client_id}: no training examples; give it some or leave it out")
