"""What a client trains and is tested on: a prompt, its answer, and the client that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmomentum.errors import DataError
from fedmomentum.names import check_client_name

Prompt = str | tuple[dict[str, str], ...]
"""Plain text, or the chat messages (``{"role": ..., "content": ...}``) that stand before the answer."""


@dataclass(frozen=True)
class Example:
    """One prompt and the answer to learn.

    Attributes:
        prompt: Plain text, or chat messages before the answer, each with exactly ``role`` and ``content``.
        completion: The answer's text (the last turn of the assistant), never empty.
        category: The label or task by which examples are partitioned and results reported.
        scoring: JSON which the task's own scorer needs; empty means an exact match of the stripped text.

    Raises:
        DataError: The completion is empty, or the prompt has no text or a message of another shape.
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
                raise DataError(f"message {position} of the prompt must have exactly role and content; got {message!r}")
            if not all(isinstance(value, str) for value in message.values()):
                raise DataError(f"message {position} of the prompt: role and content must be text; got {message!r}")


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
