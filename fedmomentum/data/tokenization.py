"""From examples to token ids: the prompt as generation sees it, the answer, its end token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from fedmomentum.data.continuation import continuation_ids
from fedmomentum.data.examples import TextPair
from fedmomentum.errors import DataError
from fedmomentum.utils.chat_date import date_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedmomentum.data.examples import Example, Prompt


# Texts in a call of the tokenizer: a call costs more than what it does to a short text, and keeps
# several times the size of each text in memory.
TEXTS_PER_CALL = 256


@dataclass(frozen=True)
class TokenizedExamples:
    """Examples ready to train or evaluate on; the fields are parallel, one entry an example.

    Attributes:
        input_ids: Token ids of prompt, completion and end token of each example; for a classifier
            those of the text, and then the index of its label.
        num_prompt_tokens: How many of those belong to the prompt; no loss is taken on them. For a
            classifier the tokens of the first text of a pair.
        categories: The category of each example.
        is_truncated: Whether ``max_length`` cut off part of the completion (or its end token).
        num_lost: How many further examples were dropped because nothing of their completion was
            left.
    """

    input_ids: tuple[tuple[int, ...], ...]
    num_prompt_tokens: tuple[int, ...]
    categories: tuple[str, ...]
    is_truncated: tuple[bool, ...]
    num_lost: int

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> TokenizedExamples:
        """Return some of the examples; `num_lost` is kept."""
        return TokenizedExamples(
            self.input_ids[rows],
            self.num_prompt_tokens[rows],
            self.categories[rows],
            self.is_truncated[rows],
            self.num_lost,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[TokenizedExamples]) -> TokenizedExamples:
        """Return the examples of all parts, one after the other."""
        return cls(
            tuple(chain.from_iterable(part.input_ids for part in parts)),
            tuple(chain.from_iterable(part.num_prompt_tokens for part in parts)),
            tuple(chain.from_iterable(part.categories for part in parts)),
            tuple(chain.from_iterable(part.is_truncated for part in parts)),
            sum(part.num_lost for part in parts),
        )

    @property
    def num_truncated(self) -> int:
        """How many of the examples have lost part of their completion."""
        return sum(self.is_truncated)


EMPTY_EXAMPLES = TokenizedExamples((), (), (), (), 0)


class _Text(NamedTuple):
    """An example as text: its prompt, the prompt with the answer, and whether it is a chat."""

    prompt: str
    full: str
    is_chat: bool

    @property
    def answer(self) -> str:
        return self.full[len(self.prompt) :]


class _TokenIds(NamedTuple):
    """The token ids of an example, not truncated."""

    prompt: list[int]
    answer: list[int]


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_truncated_fraction: float,
    owner: str,
) -> TokenizedExamples:
    """Convert examples into token ids, truncated on the right at ``max_length`` tokens.

    A chat is written by the tokenizer's own template, plain text as prompt + completion. Each ends
    with the token at which generation stops, so that the model learns to stop.

    Args:
        examples: The examples to tokenize.
        tokenizer: The base model's tokenizer.
        max_length: The most tokens an example may have.
        max_truncated_fraction: The fraction of the examples, 0 to 1, that may lose their complete
            answer; those are dropped.
        owner: Whose examples these are, for error messages: ``"client-3 (train)"``.

    Returns:
        The tokenized examples.

    Raises:
        DataError: If there are no examples, too many lose their answer, or the chat template cannot
            be used.
    """
    if not examples:
        raise DataError(f"{owner}: no examples; give at least one, or leave this client out")
    rows = _token_ids(examples, tokenizer, owner)

    # Drop the examples whose prompt alone fills the length; truncate the others.
    retained = [row for row, ids in enumerate(rows) if len(ids.prompt) < max_length]
    num_lost = len(rows) - len(retained)
    if not retained or num_lost > max_truncated_fraction * len(rows):
        lengths = sorted(len(ids.prompt) + len(ids.answer) for ids in rows)
        raise DataError(
            f"{owner}: {num_lost} of {len(rows)} examples lose their complete answer, because "
            f"their prompt alone fills max-length = {max_length} tokens (allowed fraction: "
            f"{max_truncated_fraction:g}). The longest example has {lengths[-1]} tokens, half have "
            f"at most {lengths[len(lengths) // 2]}: raise max-length, shorten the prompts, or "
            "raise max-truncated-fraction to train without those examples"
        )
    # Prompt and answer in one row, at most as long as allowed.
    input_ids = []
    is_truncated = []
    for row in retained:
        ids = rows[row].prompt + rows[row].answer
        input_ids.append(tuple(ids[:max_length]))
        is_truncated.append(len(ids) > max_length)
    return TokenizedExamples(
        tuple(input_ids),
        tuple(len(rows[row].prompt) for row in retained),
        tuple(examples[row].category for row in retained),
        tuple(is_truncated),
        num_lost,
    )


def _token_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, owner: str
) -> list[_TokenIds]:
    """Return the token ids of each example."""
    # Write every example as text, and find the end token of each kind.
    texts: list[_Text] = []
    end_ids: dict[bool, int] = {}
    for row, example in enumerate(examples):
        try:
            text = _example_text(example, tokenizer)
            if text.is_chat not in end_ids:
                end_ids[text.is_chat] = end_token_id(example.prompt, tokenizer)
        except DataError as error:
            raise DataError(f"{owner}, example {row}: {error}") from error
        texts.append(text)

    # Tokenize prompts and full texts in batches, then find where each answer begins.
    prompts = _encode([(text.prompt, text.is_chat) for text in texts], tokenizer)
    full_texts = _encode([(text.full, text.is_chat) for text in texts], tokenizer)
    result = []
    for row, text in enumerate(texts):
        try:
            answer = _answer_ids(
                prompts[row], full_texts[row], text, end_ids[text.is_chat], tokenizer
            )
        except DataError as error:
            raise DataError(f"{owner}, example {row}: {error}") from error
        result.append(_TokenIds(prompts[row], answer))
    return result


def prompt_token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids after which the model answers, in training, evaluation and generation.

    Raises:
        DataError: If the prompt is a chat and the tokenizer has no chat template.
    """
    is_chat = not isinstance(prompt, str)
    (ids,) = _encode([(_prompt_text(prompt, tokenizer), is_chat)], tokenizer)
    return ids


def end_token_id(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that ends an answer to this kind of prompt.

    For a chat it is the first special token that the template writes after an assistant's text
    (``<|im_end|>``, ``<|eot_id|>``, ``<end_of_turn>``, ...); for plain text, or a template that
    writes none, the tokenizer's end token.

    Raises:
        DataError: If there is no such token.
    """
    if not isinstance(prompt, str):
        # What the template writes after the last assistant's text.
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": "yes"}
        text = _chat_text((question, answer), tokenizer, ends_with_answer=True)
        closing_text = text[text.rindex("yes") + len("yes") :]
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


# ── text ──────────────────────────────────────────────────────────────────────────────────────────


def _prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a prompt as the model sees it."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, TextPair):
        raise DataError("a pair of texts is classified, not answered; give a prompt instead")
    return _chat_text(prompt, tokenizer, ends_with_answer=False)


def _example_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> _Text:
    """Return an example as text.

    Raises:
        DataError: If the chat template cannot be used, or does not begin the conversation with the
            prompt.
    """
    prompt = _prompt_text(example.prompt, tokenizer)
    if isinstance(example.prompt, str):
        return _Text(prompt, prompt + example.completion, is_chat=False)
    answer = {"role": "assistant", "content": example.completion}
    full = _chat_text((*example.prompt, answer), tokenizer, ends_with_answer=True)
    if not full.startswith(prompt):
        raise DataError(
            "the chat template writes the conversation with the answer differently from the "
            "prompt that generation would see, so training would not match use; give plain "
            f"`prompt` and `completion` text instead. Prompt: {prompt!r}. Conversation: {full!r}"
        )
    return _Text(prompt, full, is_chat=True)


def _chat_text(
    messages: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    ends_with_answer: bool,
) -> str:
    """Return a chat as the tokenizer's template writes it.

    Raises:
        DataError: If there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the examples are chats (`messages`), but this model's tokenizer has no chat template: "
            "give plain `prompt` and `completion` text instead, or use an instruction-tuned model"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=not ends_with_answer,
            tokenize=False,
            **date_arguments(tokenizer),
        )
    # Templates raise errors of any kind on a role or an order that they do not support.
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses messages with the roles {roles}: {error}"
        ) from error
    assert isinstance(text, str)  # tokenize=False
    return text


# ── token ids ─────────────────────────────────────────────────────────────────────────────────────


def _encode(
    texts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Return the token ids of texts, without the special tokens that close a text.

    Args:
        texts: Texts, each with whether it is a chat's: its template has written the special tokens
            already.
        tokenizer: The base model's tokenizer.
    """
    rows_of_kind: dict[bool, list[int]] = defaultdict(list)
    for row, (_, is_chat) in enumerate(texts):
        rows_of_kind[is_chat].append(row)
    result: list[list[int]] = [[] for _ in texts]
    for is_chat, rows in rows_of_kind.items():
        closing_ids = [] if is_chat else _closing_ids(tokenizer)
        for start in range(0, len(rows), TEXTS_PER_CALL):
            batch = rows[start : start + TEXTS_PER_CALL]
            batch_texts = [texts[row][0] for row in batch]
            encoded = tokenizer(batch_texts, add_special_tokens=not is_chat)["input_ids"]
            for row, ids in zip(batch, encoded, strict=True):
                result[row] = _without_closing(ids, closing_ids)
    return result


def _closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens with which the tokenizer closes each plain text.

    An end token, a separator, or none.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    closed: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(closed) - len(plain) + 1):
        end = start + len(plain)
        if closed[start:end] == plain:
            return closed[end:]
    return []


def _without_closing(ids: list[int], closing_ids: Sequence[int]) -> list[int]:
    """Return a text's token ids without those that close it: the answer comes before them."""
    is_closed = closing_ids and ids[-len(closing_ids) :] == closing_ids
    return ids[: -len(closing_ids)] if is_closed else ids


def _answer_ids(
    prompt_ids: list[int],
    full_ids: list[int],
    text: _Text,
    end_id: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """Return the token ids of an answer after the prompt's own, with the token that ends it.

    Raises:
        DataError: If the tokenizer cannot write the answer right after the prompt.
    """
    if full_ids[: len(prompt_ids)] == prompt_ids:
        answer = full_ids[len(prompt_ids) :]
    else:
        # The tokenizer merges the end of the prompt with the beginning of the answer.
        answer = continuation_ids(prompt_ids, full_ids, text.answer, tokenizer)
    if text.is_chat and end_id in answer:
        # The template may write more after the end token (a newline), which generation never
        # reaches.
        num_after = answer[::-1].index(end_id)
        return answer[: len(answer) - num_after]
    return answer if answer[-1:] == [end_id] else [*answer, end_id]
