"""From examples to token ids: the prompt as generation will see it, then the answer and the token that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedmomentum.chat_date import date_arguments
from fedmomentum.data.continuation import continuation_ids
from fedmomentum.data.examples import Example, Prompt
from fedmomentum.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 256
"""Texts a call of the tokenizer: a call costs more than what it does to a short text, and keeps much of each text."""


@dataclass(frozen=True)
class TokenisedExamples:
    """Examples ready to train or evaluate on; the fields run in parallel, one entry an example.

    Attributes:
        input_ids: Prompt, completion and end token of each example.
        num_prompt_tokens: How many of those belong to the prompt; no loss is taken on them.
        categories: The category of each example.
        is_truncated: Whether ``max_length`` cut off part of the completion (or its end token).
        num_lost: How many further examples were dropped because nothing of their completion was left.
    """

    input_ids: tuple[tuple[int, ...], ...]
    num_prompt_tokens: tuple[int, ...]
    categories: tuple[str, ...]
    is_truncated: tuple[bool, ...]
    num_lost: int

    def __len__(self) -> int:
        """Return the number of examples kept."""
        return len(self.input_ids)

    def first(self, count: int | None) -> TokenisedExamples:
        """Return the first so many examples; None: all."""
        return replace(
            self,
            input_ids=self.input_ids[:count],
            num_prompt_tokens=self.num_prompt_tokens[:count],
            categories=self.categories[:count],
            is_truncated=self.is_truncated[:count],
        )

    @property
    def num_truncated(self) -> int:
        """How many of the examples kept have lost part of their completion."""
        return sum(self.is_truncated)


def tokenise(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_lost_share: float,
    owner: str,
) -> TokenisedExamples:
    """Turn examples into token ids, cut on the right at ``max_length`` tokens.

    A chat is written by the tokenizer's own template, plain text as prompt + completion. Each ends with the token
    at which generation stops, so that the model learns to stop.

    Args:
        examples: What to tokenise.
        tokenizer: The base model's tokenizer.
        max_length: The most tokens an example may have.
        max_lost_share: The share of examples, 0 to 1, which may lose their whole completion; those are dropped.
        owner: Whose examples these are, for error messages: ``"client-3 (train)"``.

    Raises:
        DataError: There are no examples, too many lose their completion, or the template cannot be used.
    """
    if not examples:
        raise DataError(f"{owner}: no examples; give at least one, or leave this client out")
    texts, ends = [], dict[bool, int]()
    for row, example in enumerate(examples):
        is_chat = not isinstance(example.prompt, str)
        try:
            texts.append(_texts(example, tokenizer))
            if is_chat not in ends:
                ends[is_chat] = end_token_id(example.prompt, tokenizer)
        except DataError as error:
            raise DataError(f"{owner}, example {row}: {error}") from error
    prompts = _ids([(prompt, is_chat) for prompt, _, is_chat in texts], tokenizer)
    wholes = _ids([(whole, is_chat) for _, whole, is_chat in texts], tokenizer)
    input_ids, num_prompt_tokens, categories, is_truncated = [], [], [], []
    lengths = []
    for row, (example, text, prompt, whole) in enumerate(zip(examples, texts, prompts, wholes, strict=True)):
        prompt_text, whole_text, is_chat = text
        try:
            answer = _answer_ids(prompt, whole, whole_text[len(prompt_text) :], ends[is_chat], tokenizer, is_chat)
        except DataError as error:
            raise DataError(f"{owner}, example {row}: {error}") from error
        lengths.append(len(prompt) + len(answer))
        if len(prompt) >= max_length:
            continue
        input_ids.append(tuple((prompt + answer)[:max_length]))
        num_prompt_tokens.append(len(prompt))
        categories.append(example.category)
        is_truncated.append(lengths[-1] > max_length)
    num_lost = len(examples) - len(input_ids)
    if not input_ids or num_lost > max_lost_share * len(examples):
        raise DataError(
            f"{owner}: {num_lost} of {len(examples)} examples lose their whole answer, because their prompt alone "
            f"fills max-length = {max_length} tokens (allowed share: {max_lost_share:g}). The longest example has "
            f"{max(lengths)} tokens, half have at most {sorted(lengths)[len(lengths) // 2]}: raise max-length, "
            f"shorten the prompts, or raise max-lost-share to train without those examples"
        )
    return TokenisedExamples(
        tuple(input_ids), tuple(num_prompt_tokens), tuple(categories), tuple(is_truncated), num_lost
    )


def prompt_token_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids after which the model answers: the same for training, evaluation and generation.

    Raises:
        DataError: The prompt is a chat and the tokenizer has no chat template.
    """
    (ids,) = _ids([(_prompt_text(prompt, tokenizer), not isinstance(prompt, str))], tokenizer)
    return ids


def end_token_id(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token which ends an answer to this kind of prompt.

    For a chat it is the first special token that the template writes after an assistant's text (``<|im_end|>``,
    ``<|eot_id|>``, ``<end_of_turn>``, ...); for plain text, or a template that writes none, the tokenizer's end
    token.

    Raises:
        DataError: There is no such token.
    """
    if not isinstance(prompt, str):
        answer = {"role": "assistant", "content": "yes"}
        text = _chat_text(({"role": "user", "content": "?"}, answer), tokenizer, ends_with_answer=True)
        closing = tokenizer(text[text.rindex("yes") + 3 :], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        for index in closing:
            if index in special:
                return index
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token (eos_token), so the model could not learn to stop; add one to the "
            "tokenizer's configuration"
        )
    return tokenizer.eos_token_id


def _prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    return prompt if isinstance(prompt, str) else _chat_text(prompt, tokenizer, ends_with_answer=False)


def _texts(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, bool]:
    """The prompt, the prompt with its answer, and whether they are a chat's."""
    prompt = _prompt_text(example.prompt, tokenizer)
    if isinstance(example.prompt, str):
        return prompt, prompt + example.completion, False
    turn = {"role": "assistant", "content": example.completion}
    whole = _chat_text((*example.prompt, turn), tokenizer, ends_with_answer=True)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template writes the conversation with the answer differently from the prompt that "
            "generation would see, so training would not match use; give plain `prompt` and `completion` text "
            f"instead. Prompt: {prompt!r}. Conversation: {whole!r}"
        )
    return prompt, whole, True


def _ids(texts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of texts, each with whether it is a chat's, without the tokens that close a text.

    A chat's template has written the special tokens already.
    """
    found: list[list[int]] = [[] for _ in texts]
    for kind in (False, True):
        rows = [row for row, (_, is_chat) in enumerate(texts) if is_chat == kind]
        closing = _closing_ids(tokenizer) if rows and not kind else []
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            encoded = tokenizer([texts[row][0] for row in some], add_special_tokens=not kind)["input_ids"]
            for row, ids in zip(some, encoded, strict=True):
                found[row] = _open_ended(ids, closing)
    return found


def _closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens with which the tokenizer closes each plain text: an end token, a separator, or none."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[start + len(plain) :]
    return []


def _open_ended(ids: list[int], closing: Sequence[int]) -> list[int]:
    """Return a text's ids without the tokens that close it: the answer comes before those."""
    return ids[: -len(closing)] if closing and ids[-len(closing) :] == closing else ids


def _answer_ids(
    prompt: list[int],
    whole: list[int],
    answer_text: str,
    end: int,
    tokenizer: PreTrainedTokenizerBase,
    is_chat: bool,
) -> list[int]:
    """Return the ids of an answer after the prompt's own, with the token that ends it.

    Raises:
        DataError: The tokenizer cannot write the answer right behind the prompt.
    """
    is_prefix = whole[: len(prompt)] == prompt
    answer = whole[len(prompt) :] if is_prefix else continuation_ids(prompt, whole, answer_text, tokenizer)
    if is_chat and end in answer:
        # The template may write more after the end token (a newline), which generation never reaches.
        return answer[: len(answer) - answer[::-1].index(end)]
    return answer if answer[-1:] == [end] else [*answer, end]


def _chat_text(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, ends_with_answer: bool
) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "the examples are chats (`messages`), but this model's tokenizer has no chat template: give plain "
            "`prompt` and `completion` text instead, or use an instruction-tuned model"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=not ends_with_answer,
            tokenize=False,
            **date_arguments(tokenizer),
        )
    except Exception as error:  # Templates raise whatever they like on a role or an order they do not know.
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses messages with the roles {roles}: {error}") from error
    assert isinstance(text, str)  # tokenize=False
    return text
