"""Chats as rendered by the tokenizer's chat template.

Messages are adapted to templates in two ways, identically in training, evaluation and generation:
tool call arguments given as JSON text (OpenAI's format) become objects, as templates expect, and
if a template does not support system messages, the system text is prepended to the first user turn.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmomentum.errors import DataError
from fedmomentum.utils.chat_date import date_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SYSTEM_MARK = "fedmomentumsystem"
"""A system message for testing whether a template renders system messages."""

_log = logging.getLogger(__name__)
# Tokenizer -> its template, and whether that renders system messages.
_known: weakref.WeakKeyDictionary[Any, tuple[Any, bool]] = weakref.WeakKeyDictionary()


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
        DataError: If there is no template, or it rejects the messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the examples are chats (`messages`), but this model's tokenizer has no chat template: "
            "give plain `prompt` and `completion` text instead, or use an instruction-tuned model"
        )
    try:
        text = tokenizer.apply_chat_template(
            template_messages(messages, tokenizer),
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
    template = tokenizer.chat_template
    known = _known.get(tokenizer)
    if known is not None and known[0] == template:
        return known[1]
    chat = [{"role": "system", "content": SYSTEM_MARK}, {"role": "user", "content": "?"}]
    try:
        text = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, **date_arguments(tokenizer)
        )
        is_written = SYSTEM_MARK in str(text)
    except Exception:
        is_written = False
    if not is_written:
        _log.warning(
            "the chat template has no turn of the system; such messages begin the user's first"
        )
    _known[tokenizer] = (template, is_written)
    return is_written
