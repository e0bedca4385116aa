"""Tokenizes examples: the prompt as in generation, the answer, and its end token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fedmomentum.data.chat_text import chat_text
from fedmomentum.data.continuation import continuation_ids
from fedmomentum.data.encoding import encode_texts
from fedmomentum.data.examples import TextPair
from fedmomentum.data.tokenized import Span, TokenizedExamples
from fedmomentum.data.truncation import TokenIds, UntruncatedExamples, refuse_lost_answers
from fedmomentum.data.turns import has_generation_marks, marked_turns, prefix_turns
from fedmomentum.errors import DataError
from fedmomentum.utils.text import first_few, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedmomentum.data.examples import Example, Prompt

MAX_OWNERS = 3
"""The most parts of the examples that an error message names."""


class _Text(NamedTuple):
    """An example as text: the prompt, the prompt with the answer, and whether it is a chat."""

    prompt: str
    full: str
    is_chat: bool

    @property
    def answer(self) -> str:
        return self.full[len(self.prompt) :]


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_truncated_fraction: float,
    owner: str,
    loss_on: str = "last",
) -> TokenizedExamples:
    """Convert examples into token ids, truncated on the right at ``max_length`` tokens.

    Chats are rendered by the tokenizer's chat template, plain text as prompt + completion. Each
    ends with the token at which generation stops, so that the model learns to stop. In a text
    without a prompt, every token but the first is learned.

    Args:
        examples: The examples to tokenize.
        tokenizer: The base model's tokenizer.
        max_length: The maximum number of tokens per row.
        max_truncated_fraction: The fraction of the examples, 0 to 1, that may lose their entire
            answer to truncation; those examples are dropped.
        owner: Whose examples these are, for error messages: ``"client-3 (train)"``.
        loss_on: ``"last"`` to learn a chat's last turn; ``"all-assistant"`` to learn all assistant
            turns except those that the data excludes (`Example.learned_turns`).

    Returns:
        The tokenized examples.

    Raises:
        DataError: If there are no examples, too many lose their answer, only some have a rejected
            answer, or the chat template cannot be used.
    """
    if not examples:
        raise DataError(f"{owner}: no examples; give at least one, or leave this client out")
    (rows,) = tokenize_parts(
        {owner: examples},
        tokenizer,
        max_length=max_length,
        max_truncated_fraction=max_truncated_fraction,
        loss_on=loss_on,
    )
    return rows


def tokenize_parts(
    parts: Mapping[str, Sequence[Example]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_truncated_fraction: float,
    loss_on: str = "last",
    trains: bool = True,
) -> tuple[TokenizedExamples, ...]:
    """Tokenize the parts of a client's examples; those that lose their answer are counted together.

    So whether they are too many does not depend on which of them are held out.

    Args:
        parts: Each part's name, for error messages, and its examples; parts may be empty.
        tokenizer: See `tokenize`, as for the other arguments.
        max_length: The maximum number of tokens per row.
        max_truncated_fraction: The fraction of all examples that may lose their entire answer.
        loss_on: Which turns of a chat are learned.
        trains: Whether the first part is trained on, and must not lose all of its examples; if not,
            one example of any part is enough.

    Raises:
        DataError: See `tokenize`.
    """
    untruncated = []
    for owner, examples in parts.items():
        rows = _token_ids(examples, tokenizer, owner, loss_on)
        untruncated.append(
            UntruncatedExamples(examples, rows, _rejected_ids(examples, tokenizer, owner))
        )
    refuse_lost_answers(
        untruncated,
        max_length=max_length,
        max_truncated_fraction=max_truncated_fraction,
        owner=next(iter(parts)) if trains else first_few(list(parts), MAX_OWNERS),
        trains=trains,
    )
    return tuple(part.truncate(max_length) for part in untruncated)


def _title(owner: str, row: int, example: Example) -> str:
    """Return how error messages refer to an example."""
    source = f" (row {example.source_row} of its source)" if example.source_row else ""
    return f"{owner}, example {row}{source}"


def _token_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, owner: str, loss_on: str
) -> list[TokenIds]:
    """Return the token ids of each example."""
    if loss_on == "last":
        for row, example in enumerate(examples):
            if example.learned_turns:
                raise DataError(
                    f"{_title(owner, row, example)}: {_unlearned_turns_message(example)}"
                )
        return _last_answers(dict(enumerate(examples)), tokenizer, owner)
    # Plain text has one answer; a chat may have several.
    plain = {}
    for row, example in enumerate(examples):
        if example.prompt is None or isinstance(example.prompt, str):
            plain[row] = example
    plain_ids = dict(zip(plain, _last_answers(plain, tokenizer, owner), strict=True))
    result = []
    for row, example in enumerate(examples):
        if row in plain:
            result.append(plain_ids[row])
            continue
        try:
            result.append(TokenIds(*_chat_turns(example, tokenizer)))
        except DataError as error:
            raise DataError(f"{_title(owner, row, example)}: {error}") from error
    return result


def _unlearned_turns_message(example: Example) -> str:
    """Return the error message for a row that wants more turns learned than the settings do."""
    turns = ", ".join(str(position + 1) for position in example.learned_turns or ())
    return (
        f"by its weights the messages {turns} are to be learned as well as the last, and "
        'training.loss-on = "last" learns the last alone; set training.loss-on = "all-assistant", '
        "give those messages the weight 0, or remove the weights"
    )


def _chat_turns(
    example: Example, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[Span]]:
    """Return an entire chat's token ids, and the ranges of the assistant turns to learn."""
    prompt = example.prompt
    assert isinstance(prompt, tuple)  # a chat
    messages: list[dict[str, Any]] = [
        *prompt,
        {"role": "assistant", "content": example.completion},
    ]
    end_id = end_token_id(prompt, tokenizer)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learned = turns
    if example.learned_turns is not None:
        learned = [*example.learned_turns, len(prompt)]
    # Raises if there is no template, or if the template does not accept these messages.
    chat_text(messages, tokenizer, ends_with_answer=True)
    if has_generation_marks(tokenizer):
        return marked_turns(messages, tokenizer, end_id, learned)
    texts = []
    for position in learned:
        header = ""
        if position:
            header = chat_text(messages[:position], tokenizer, ends_with_answer=False)
        turn = chat_text(messages[: position + 1], tokenizer, ends_with_answer=True)
        texts.append((position, header, turn))
    return prefix_turns(texts, tokenizer, end_id)


def _rejected_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, owner: str
) -> list[list[int]]:
    """Return the token ids of each prompt with its rejected answer; empty if there is none."""
    others = {}
    for row, example in enumerate(examples):
        if example.rejected is not None:
            others[row] = replace(example, completion=example.rejected, rejected=None)
    if not others:
        return [[] for _ in examples]
    if len(others) < len(examples):
        row = next(row for row in range(len(examples)) if row not in others)
        raise DataError(
            f"{_title(owner, row, examples[row])}: no rejected answer, and {len(others)} of its "
            "examples have one; give all of them `chosen` and `rejected`, or none"
        )
    return [row.ids for row in _last_answers(others, tokenizer, owner)]


def _last_answers(
    examples: Mapping[int, Example], tokenizer: PreTrainedTokenizerBase, owner: str
) -> list[TokenIds]:
    """Return the token ids of prompts and their answers, in the order of the examples."""
    # Render every example as text, and find the end token of each kind of prompt.
    texts: list[_Text] = []
    end_ids: dict[bool, int] = {}
    for row, example in examples.items():
        try:
            text = _example_text(example, tokenizer)
            if text.is_chat not in end_ids:
                end_ids[text.is_chat] = end_token_id(example.prompt or "", tokenizer)
        except DataError as error:
            raise DataError(f"{_title(owner, row, example)}: {error}") from error
        texts.append(text)

    # Tokenize prompts and full texts in batches, then find where each answer begins.
    prompts = encode_texts([(text.prompt, text.is_chat) for text in texts], tokenizer)
    full_texts = encode_texts([(text.full, text.is_chat) for text in texts], tokenizer)
    result = []
    parts = zip(examples.items(), texts, prompts, full_texts, strict=True)
    for (row, example), text, prompt, full in parts:
        try:
            answer = _answer_ids(prompt, full, text, end_ids[text.is_chat], tokenizer)
        except DataError as error:
            raise DataError(f"{_title(owner, row, example)}: {error}") from error
        # The first token of a text has no context, so it is not learned.
        if example.prompt is None:
            answer = _without_second_start(prompt, answer)
        ids = prompt + answer
        result.append(TokenIds(ids, [(max(1, len(prompt)), len(ids))]))
    return result


def _without_second_start(start: list[int], ids: list[int]) -> list[int]:
    """Return a text's token ids without its own start token, if the tokenizer added one."""
    return ids[len(start) :] if start and ids[: len(start)] == start else ids


def prompt_token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a prompt's token ids, as used in training, evaluation and generation.

    Raises:
        DataError: If the prompt is a chat and the tokenizer has no chat template.
    """
    is_chat = not isinstance(prompt, str)
    (ids,) = encode_texts([(_prompt_text(prompt, tokenizer), is_chat)], tokenizer)
    return ids


def end_token_id(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends an answer to this kind of prompt.

    For a chat, it is the first special token that the template puts after an assistant's text
    (``<|im_end|>``, ``<|eot_id|>``, ``<end_of_turn>``, ...); for plain text, or if the template
    puts none there, it is the tokenizer's end token.

    Raises:
        DataError: If there is no such token, or the template does not render the answer.
    """
    if not isinstance(prompt, str):
        # See what the template puts after the last assistant text.
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": "yes"}
        text = chat_text((question, answer), tokenizer, ends_with_answer=True)
        _, found, closing_text = text.rpartition("yes")
        if not found:
            raise DataError(
                "the chat template does not write the text of a message; it may be made for "
                f"messages of several parts, such as images. It writes {printable(text, 100)!r}"
            )
        closing_ids = tokenizer(closing_text, add_special_tokens=False)["input_ids"]
        special_ids = set(tokenizer.all_special_ids)
        for index, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                special_ids.add(index)
        for index in closing_ids:
            if index in special_ids:
                return int(index)
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token (eos_token), so the model could not learn to stop; add "
            "one to the tokenizer's configuration"
        )
    return int(tokenizer.eos_token_id)


def answer_prefix(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the chat template inserts between a prompt and the text of its answer.

    Templates of reasoning models insert an empty reasoning block or the name of the answer's
    channel, which a model that has learned the answer generates too. Empty for plain text.

    Raises:
        DataError: If the prompt is a chat and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return ""
    start = _prompt_text(prompt, tokenizer)
    answer = {"role": "assistant", "content": "yes"}
    full = chat_text((*prompt, answer), tokenizer, ends_with_answer=True)
    written = full[len(start) :] if full.startswith(start) else ""
    return written[: max(written.rfind("yes"), 0)]


# ── text ──────────────────────────────────────────────────────────────────────────────────────────


def _prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt as the model sees it."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, TextPair):
        raise DataError("a pair of texts is classified, not answered; give a prompt instead")
    return chat_text(prompt, tokenizer, ends_with_answer=False)


def _example_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> _Text:
    """Return an example as text.

    Raises:
        DataError: If the chat template cannot be used, or the rendered conversation does not begin
            with the rendered prompt.
    """
    if example.prompt is None:
        return _Text("", example.completion, is_chat=False)
    prompt = _prompt_text(example.prompt, tokenizer)
    if isinstance(example.prompt, str):
        return _Text(prompt, prompt + example.completion, is_chat=False)
    answer = {"role": "assistant", "content": example.completion}
    full = chat_text((*example.prompt, answer), tokenizer, ends_with_answer=True)
    if not full.startswith(prompt):
        raise DataError(
            "the chat template writes the conversation with the answer differently from the "
            "prompt that generation would see, so training would not match use; give plain "
            f"`prompt` and `completion` text instead. Prompt: {prompt!r}. Conversation: {full!r}"
        )
    return _Text(prompt, full, is_chat=True)


# ── token ids ─────────────────────────────────────────────────────────────────────────────────────


def _answer_ids(
    prompt_ids: list[int],
    full_ids: list[int],
    text: _Text,
    end_id: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """Return the token ids of an answer that follows the prompt's, including the end token.

    Raises:
        DataError: If the tokenizer cannot represent the answer right after the prompt.
    """
    if full_ids[: len(prompt_ids)] == prompt_ids:
        answer = full_ids[len(prompt_ids) :]
    else:
        # The tokenizer merged the end of the prompt with the beginning of the answer.
        answer = continuation_ids(prompt_ids, full_ids, text.answer, tokenizer)
    if text.is_chat and end_id in answer:
        # The template may add more after the end token (a newline), which generation never reaches.
        num_after = answer[::-1].index(end_id)
        return answer[: len(answer) - num_after]
    return answer if answer[-1:] == [end_id] else [*answer, end_id]
