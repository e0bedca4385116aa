"""Chats as rendered by the tokenizer's chat template.

Messages are adapted to templates in two ways, identically in training, evaluation and generation:
tool call arguments given as JSON text (OpenAI's format) become objects, as templates expect, and
if a template does not support system messages, the system text is prepended to the first user turn.
Messages that a template would drop are refused: tool calls, tool messages, roles that it does not
know, and system messages where it expects none.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmomentum.errors import DataError
from fedmomentum.utils.chat_date import date_arguments
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SYSTEM_MARK = "fedmomentumsystem"
"""A system message for testing whether a template renders system messages."""

CALL_MARK = "fedmomentumcall"
RESULT_MARK = "fedmomentumresult"
"""The name of a tool and what it returns, for testing whether a template renders them."""

MESSAGE_MARK = "fedmomentummessage"
"""The text of a message, for testing whether a template renders it in its place."""

_log = logging.getLogger(__name__)
# Tokenizer -> its template, and whether that renders the message with each mark tried so far.
_known: weakref.WeakKeyDictionary[Any, tuple[Any, dict[str, bool]]] = weakref.WeakKeyDictionary()


def chat_text(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends_with_answer: bool,
) -> str:
    """Return a chat as rendered by the tokenizer's template.

    Args:
        messages: The messages.
        tokenizer: The base model's tokenizer.
        ends_with_answer: Whether the last message is the answer; otherwise the prefix of an
            answer is appended.

    Raises:
        DataError: If there is no template, or it rejects the messages or would drop one of them or
            a tool call.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the examples are chats (`messages`), but this model's tokenizer has no chat template: "
            "give plain `prompt` and `completion` text instead, or use an instruction-tuned model"
        )
    written = template_messages(messages, tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            written,
            add_generation_prompt=not ends_with_answer,
            tokenize=False,
            **date_arguments(tokenizer),
        )
    # Templates raise all kinds of errors for roles or orders that they do not support.
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses messages with the roles {roles}: {error}"
        ) from error
    assert isinstance(text, str)  # tokenize=False
    _refuse_unwritten_tools(messages, tokenizer)
    _refuse_unwritten_roles(written, len(messages) - len(written), tokenizer)
    return text


def template_messages(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Return messages in the form that the tokenizer's template accepts; the input is unchanged."""
    changed = [_with_objects(message) for message in messages]
    if changed and changed[0]["role"] == "system" and not writes_system(tokenizer):
        return _without_system(changed)
    return changed


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the JSON arguments of its tool calls parsed into objects."""
    if "tool_calls" not in message:
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        # Text that is not a JSON object stays as it is.
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                arguments = None
            if isinstance(arguments, dict):
                call = {**call, "function": {**function, "arguments": arguments}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the leading system message merged into the first user message."""
    system, *others = messages
    for position, message in enumerate(others):
        if message["role"] == "user":
            texts = [text for text in (system["content"], message["content"]) if text.strip()]
            others[position] = {**message, "content": "\n\n".join(texts)}
            return others
    # There is no user message to merge into; the template will report what it does not accept.
    return messages


def writes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template renders system messages.

    Some reject them (Gemma's), some drop them.
    """
    known = _known_kinds(tokenizer)
    if SYSTEM_MARK not in known:
        chat = [{"role": "system", "content": SYSTEM_MARK}, {"role": "user", "content": "?"}]
        known[SYSTEM_MARK] = bool(_writes(chat, SYSTEM_MARK, tokenizer))
        if not known[SYSTEM_MARK]:
            _log.warning(
                "the chat template has no turn of the system; such messages begin the user's first"
            )
    return known[SYSTEM_MARK]


def writes_tool_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template renders the assistant's tool calls.

    True as well for a template that rejects them, since it says so itself.
    """
    asked, call, result = _tool_chat()
    return _writes_any([[asked, call, result], [asked, call]], CALL_MARK, tokenizer)


def writes_tool_results(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template renders messages of the role `tool`.

    True as well for a template that rejects them, since it says so itself.
    """
    asked, call, result = _tool_chat()
    return _writes_any([[asked, call, result], [asked, result]], RESULT_MARK, tokenizer)


def _refuse_unwritten_tools(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Reject tool calls and tool messages that the template would leave out."""
    for position, message in enumerate(messages, start=1):
        if "tool_calls" in message and not writes_tool_calls(tokenizer):
            what = "holds tool_calls, which"
        elif message["role"] == "tool" and not writes_tool_results(tokenizer):
            what = "is of the role tool, which"
        else:
            continue
        raise DataError(
            f"message {position} {what} this model's chat template does not write, so the model "
            "would not see it: write it as the content of a user's or an assistant's message, drop "
            "the row, or use a model whose template writes tool calls and their results"
        )


def _refuse_unwritten_roles(
    messages: Sequence[dict[str, Any]], num_merged: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Reject messages of uncommon roles, or of the system in odd places, that would be left out.

    Args:
        messages: The messages as the template gets them.
        num_merged: How many messages before them were merged into these.
        tokenizer: The tokenizer.
    """
    for position, message in enumerate(messages):
        role = message["role"]
        is_common = role in ("user", "assistant", "tool")
        if role == "system" and not position:
            is_common = writes_system(tokenizer)
        if is_common or not message["content"].strip():
            continue
        # The same chat with a mark in place of this message's text.
        marked = [*messages[:position], {**message, "content": MESSAGE_MARK}]
        marked += messages[position + 1 :]
        if _writes(marked, MESSAGE_MARK, tokenizer) is False:
            raise DataError(
                f"message {position + num_merged + 1} is of the role {printable(role, 40)}, which "
                "this model's chat template does not write in this place, so the model would not "
                "see it: write it in a role that the template knows (system at the start, user or "
                "assistant), drop the row, or use a model whose template writes it"
            )


# ── trying a template ─────────────────────────────────────────────────────────────────────────────


def _known_kinds(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return what is known so far of the template that a tokenizer now has."""
    template = tokenizer.chat_template
    known = _known.get(tokenizer)
    if known is None or known[0] != template:
        known = (template, {})
        _known[tokenizer] = known
    return known[1]


def _tool_chat() -> list[dict[str, Any]]:
    """Return a question, a tool call and its result."""
    function = {"name": CALL_MARK, "arguments": {"value": "?"}}
    # Some templates accept only ids of nine letters and digits.
    call = {"id": "call00001", "type": "function", "function": function}
    return [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": RESULT_MARK, "tool_call_id": "call00001"},
    ]


def _writes_any(
    chats: Sequence[list[dict[str, Any]]], mark: str, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Return whether the first chat that a template accepts is written with its mark.

    True if it accepts none. The template is tried once for each mark.
    """
    known = _known_kinds(tokenizer)
    if mark not in known:
        tried = (_writes(chat, mark, tokenizer) for chat in chats)
        known[mark] = next((is_written for is_written in tried if is_written is not None), True)
    return known[mark]


def _writes(
    chat: list[dict[str, Any]], mark: str, tokenizer: PreTrainedTokenizerBase
) -> bool | None:
    """Return whether a template writes the mark in a chat; None if it rejects the chat."""
    try:
        text = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, **date_arguments(tokenizer)
        )
    except Exception:
        return None
    return mark in str(text)
