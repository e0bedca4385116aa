"""Converts the cells of a row into a prompt and its answer, for each format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedmomentum.data.chats import Chat, parse_chat, unpack_messages
from fedmomentum.data.examples import Message, Prompt
from fedmomentum.errors import DataError
from fedmomentum.utils.text import short_repr

USER_COLUMNS = {
    "instruction+output": ("instruction", ("output", "answer")),
    "instruction+response": ("instruction", ("response",)),
    "question+answer": ("question", ("answer",)),
}
"""Single-question formats -> the columns of the question and the answer."""
CONTEXT_COLUMNS = ("input", "context")
"""The columns whose text follows the question."""
EMPTY_COLUMNS = {
    "messages": ("history",),
    "conversations": ("history",),
    "prompt+completion": ("history", *CONTEXT_COLUMNS),
    "chosen+rejected": ("history", *CONTEXT_COLUMNS),
    "instruction+output": ("history",),
    "instruction+response": ("history",),
    "question+answer": ("history", "input"),
}
"""Format -> columns that belong to the prompt and cannot be a part of it, so they must be empty."""
EMPTY_TEXTS = ("[]", "{}", "null", "None")
"""How text tables represent an empty list."""
TEXTS_OR_CHATS = ("prompt", "completion", "chosen", "rejected")
"""The columns that hold text or messages."""


@dataclass(frozen=True)
class Cells:
    """The cells of a row that are used.

    Attributes:
        values: Our name of each column -> the row's value.
        names: Our name of each column -> the file's, for error messages.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str]

    def get(self, column: str) -> Any:
        """Return a column's value; None if there is none."""
        return self.values.get(column)

    def text(self, column: str, *, may_be_empty: bool = False) -> str:
        """Return a column's text.

        Raises:
            DataError: If it is not text, or is empty where that is not allowed.
        """
        value = self.values[column]
        name = self.names[column]
        if not isinstance(value, str):
            # A column that may be empty may be left out too.
            remedy = f', or be left out: [data.columns] {column} = ""' if may_be_empty else ""
            raise DataError(f"column {name!r} is {short_repr(value)}; it must be text{remedy}")
        if not value.strip() and not may_be_empty:
            raise DataError(f"column {name!r} is empty; fill it in or drop the row")
        return value

    def chat(self, column: str, *, may_be_text: bool = False) -> Chat:
        """Return a column's messages.

        Raises:
            DataError: If the value is not a list of messages.
        """
        return parse_chat(self.values[column], self.names[column], may_be_text=may_be_text)


@dataclass(frozen=True)
class ParsedRow:
    """The contents of a row; see `Example`."""

    prompt: Prompt | None
    completion: str
    rejected: str | None = None
    learned_turns: tuple[int, ...] | None = field(default=None)


def parse_row(kind: str, cells: Cells) -> ParsedRow:
    """Return the prompt and the answer of a row.

    Args:
        kind: The format, one of `columns.FORMATS`.
        cells: The row.

    Raises:
        DataError: If the row is malformed; the message names the column.
    """
    if kind == "text":
        return ParsedRow(None, cells.text("text"))
    for column in EMPTY_COLUMNS[kind]:
        _refuse_text(column, kind, cells)
    if kind in ("messages", "conversations"):
        chat = _with_system(cells.chat(kind, may_be_text=True), cells)
        return _parse_turns(chat, cells.names[kind])
    if kind == "prompt+completion":
        return _parse_completion(_unpacked(cells))
    if kind == "chosen+rejected":
        return _parse_pair(_unpacked(cells))
    return _parse_question(kind, cells)


def is_empty(value: Any) -> bool:
    """Return whether a cell holds nothing, or the text by which tables represent that."""
    if isinstance(value, str):
        return not value.strip() or value.strip() in EMPTY_TEXTS
    return value is None or value in ([], {})


def _refuse_text(column: str, kind: str, cells: Cells) -> None:
    """Reject a cell that must be empty, since the model would not see it.

    Raises:
        DataError: If it is not empty.
    """
    value = cells.get(column)
    if is_empty(value):
        return
    if column == "history":
        reason = "earlier turns are read from messages only"
        remedy = "write the row as messages"
    elif kind == "question+answer":
        reason = "next to a question, only the text in 'context' is read"
        remedy = f'read it as that: [data.columns] context = "{cells.names[column]}"'
    else:
        reason = "next to a prompt, no further text is read"
        remedy = "write it into the prompt"
    raise DataError(
        f"column {cells.names[column]!r} holds {short_repr(value)}; {reason}, and left out it "
        f"would be missing from the prompt: {remedy}, or leave the column out: [data.columns] "
        f'{column} = ""'
    )


def _unpacked(cells: Cells) -> Cells:
    """Return cells with the messages that tables hold as JSON text as lists."""
    values = {
        column: unpack_messages(value) if column in TEXTS_OR_CHATS else value
        for column, value in cells.values.items()
    }
    return replace(cells, values=values)


def _parse_question(kind: str, cells: Cells) -> ParsedRow:
    """Return a user message and its answer."""
    # The question, followed by its context.
    question_column, answer_columns = USER_COLUMNS[kind]
    question = "\n\n".join([cells.text(question_column), *_contexts(cells)])
    answer_column = next(column for column in answer_columns if column in cells.values)
    asked = _with_system(Chat([{"role": "user", "content": question}], [None]), cells)
    return ParsedRow(tuple(asked.messages), cells.text(answer_column))


def _contexts(cells: Cells) -> list[str]:
    """Return the text that follows the question, if there is any."""
    texts = {}
    for column in CONTEXT_COLUMNS:
        if cells.get(column) is not None:
            text = cells.text(column, may_be_empty=True)
            if text.strip():
                texts[column] = text
    if len(texts) > 1:
        names = " and ".join(repr(cells.names[column]) for column in texts)
        raise DataError(
            f"the columns {names} both hold text, and one of them can follow the instruction; "
            'join them in one column, or leave one out: [data.columns] context = ""'
        )
    return list(texts.values())


def _with_system(chat: Chat, cells: Cells) -> Chat:
    """Return a chat that begins with the system message from the `system` column, if any."""
    text = _system_text(cells)
    if text is None:
        return chat
    # The chat may already begin with the same message.
    first = chat.messages[0]
    if first["role"] != "system":
        message: Message = {"role": "system", "content": text}
        return Chat([message, *chat.messages], [None, *chat.weights])
    if first["content"] == text:
        return chat
    raise DataError(
        f"column {cells.names['system']!r} is {short_repr(text)}, and the chat begins with another "
        "message of the system; remove one of them, or leave the column out: [data.columns] system "
        '= ""'
    )


def _system_text(cells: Cells) -> str | None:
    """Return the text of the `system` column; None if there is none."""
    if cells.get("system") is None:
        return None
    text = cells.text("system", may_be_empty=True)
    return text if text.strip() else None


# ── chats ─────────────────────────────────────────────────────────────────────────────────────────


def _parse_turns(chat: Chat, column: str) -> ParsedRow:
    """Split a chat into the messages before its last answer, and that answer."""
    learned = chat.learned_turns()
    messages = chat.messages
    if learned is not None:
        if not learned:
            raise DataError(
                f"column {column!r}: all messages of the assistant have weight 0, so nothing would "
                "be learned; drop the row"
            )
        # Messages after the last one to learn carry no loss and do not affect it.
        messages = messages[: learned[-1] + 1]
        learned = learned[:-1]
    answer = _assistant_text(messages[-1])
    return ParsedRow(_prompt_messages(messages[:-1]), answer, learned_turns=learned)


def _parse_completion(cells: Cells) -> ParsedRow:
    """Return a prompt and its completion, each given as text or messages."""
    value = cells.get("prompt")
    learned: tuple[int, ...] | None = None
    prompt: Prompt
    if isinstance(value, str):
        prompt = _plain_prompt(value, cells)
    else:
        chat = _with_system(cells.chat("prompt"), cells)
        prompt = _prompt_messages(chat.messages)
        learned = chat.learned_turns()
        # Without weights, the assistant's turns in the prompt are context, such as worked examples.
        has_turns = any(message["role"] == "assistant" for message in chat.messages)
        if learned is None and has_turns:
            learned = ()
    return ParsedRow(prompt, _parse_answer(cells, "completion"), learned_turns=learned)


def _plain_prompt(text: str, cells: Cells) -> str:
    """Return a prompt given as text, to which no system message can be added."""
    system = _system_text(cells)
    if system is not None:
        raise DataError(
            f"column {cells.names['system']!r} is {short_repr(system)}, and the prompt is plain "
            "text, which has no system message: write the prompt as a list of messages, put the "
            "system "
            'text into the prompt, or leave the column out: [data.columns] system = ""'
        )
    return text


def _parse_answer(cells: Cells, column: str) -> str:
    """Return the answer in a column: text, or a single assistant message."""
    value = cells.get(column)
    if isinstance(value, str):
        return value
    name = cells.names[column]
    chat = cells.chat(column)
    if len(chat.messages) != 1:
        raise DataError(
            f"column {name!r} must hold one message, the assistant's; it holds "
            f"{len(chat.messages)}: move those before the answer to the column 'prompt'"
        )
    if chat.weights == [0]:
        raise DataError(
            f"column {name!r}: the answer has weight 0, so nothing would be learned; drop the row"
        )
    return _assistant_text(chat.messages[0])


# ── preferences ───────────────────────────────────────────────────────────────────────────────────


def _parse_pair(cells: Cells) -> ParsedRow:
    """Return the prompt and both answers of a preference pair."""
    answers = [cells.get("chosen"), cells.get("rejected")]
    are_chats = all(isinstance(answer, list) and len(answer) > 1 for answer in answers)
    if are_chats:
        return _parse_pair_of_chats(cells)
    # Two answers with a separate prompt.
    value = cells.get("prompt")
    if value is None:
        raise DataError(
            "there is no prompt: name it in the column 'prompt', or give 'chosen' and 'rejected' "
            "as whole chats, lists of messages that differ in the last one"
        )
    prompt: Prompt
    if isinstance(value, str):
        prompt = _plain_prompt(value, cells)
    else:
        chat = _with_system(cells.chat("prompt"), cells)
        prompt = _prompt_messages(_unweighted(chat, cells.names["prompt"]))
    return ParsedRow(prompt, _parse_answer(cells, "chosen"), _parse_answer(cells, "rejected"))


def _parse_pair_of_chats(cells: Cells) -> ParsedRow:
    """Return the messages that two chats share, and their final answers."""
    chosen = _unweighted(cells.chat("chosen"), cells.names["chosen"])
    rejected = _unweighted(cells.chat("rejected"), cells.names["rejected"])
    context = chosen[:-1]
    if context != rejected[:-1]:
        raise DataError(
            "the chats in 'chosen' and 'rejected' differ before their last message; a preference "
            "is between two answers to the same prompt"
        )
    # A prompt column must agree with the chats: as messages, or as the text of a single one.
    prompt = cells.get("prompt")
    if prompt is not None:
        texts = [message["content"] for message in context]
        if isinstance(prompt, str):
            is_same = prompt in texts
        else:
            is_same = cells.chat("prompt").messages == context
        if not is_same:
            raise DataError(
                f"column {cells.names['prompt']!r} is {short_repr(prompt)}, which the chats in "
                "'chosen' and 'rejected' do not hold before their last message; remove the column, "
                "or correct it"
            )
    asked = context
    if context:
        asked = _with_system(Chat(context, [None] * len(context)), cells).messages
    return ParsedRow(
        _prompt_messages(asked), _assistant_text(chosen[-1]), _assistant_text(rejected[-1])
    )


def _unweighted(chat: Chat, column: str) -> list[Message]:
    """Return the messages of a preference pair, where weights have no meaning."""
    if chat.is_weighted:
        raise DataError(
            f"column {column!r}: a message has a weight, and of preferences only the last answers "
            "are compared; remove the weights"
        )
    return chat.messages


# ── messages ──────────────────────────────────────────────────────────────────────────────────────


def _prompt_messages(messages: list[Message]) -> Prompt:
    """Return the messages before the answer as a prompt."""
    if not messages:
        raise DataError(
            "nothing stands before the answer; a chat needs at least one message before the "
            "assistant's last"
        )
    return tuple(messages)


def _assistant_text(message: Message) -> str:
    """Return the text of the message that is the answer."""
    if message["role"] != "assistant":
        raise DataError(
            "the last message must be the assistant's, the answer to learn; its role is "
            f"{short_repr(message['role'])}"
        )
    others = sorted(message.keys() - {"role", "content"})
    if others:
        raise DataError(
            f"the last message, the answer to learn, holds {', '.join(others)}; it must be text "
            "alone: end the chat with the assistant's answer"
        )
    return str(message["content"])
