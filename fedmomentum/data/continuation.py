"""The token ids of an answer that follows a prompt's own, where the tokenizer would merge the two.

Generation starts from the prompt's ids, so training must, too. SentencePiece writes a space in
front of every text, so an answer tokenized by itself would be learned with a space too many after a
prompt that ends in one; WordPiece would begin a new word. So the answer is tokenized after some
other text, an anchor, whose ids are then removed, and the result is accepted only if prompt and
answer together read like the full text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedmomentum.errors import DataError
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ANCHORS = ("\n", ":", ".", "a", "x", "1", "(", "-", "z", "?", "é")
"""Texts after which the answer is tokenized, in this order; one of them will not merge with it."""

SHOWN_CHARACTERS = 60
"""How much of a text's end a message shows: the prompt's last words and the answer's first."""


def continuation_ids(
    prompt_ids: Sequence[int],
    full_ids: Sequence[int],
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """Return token ids that, after the prompt's, read as the full text does.

    Args:
        prompt_ids: The token ids of the prompt.
        full_ids: The token ids of prompt and answer as one text; they do not begin with the
            prompt's.
        answer: The text of the answer.
        tokenizer: The base model's tokenizer.

    Returns:
        The token ids of the answer.

    Raises:
        DataError: If no way to write the answer reads as the full text does.
    """
    wanted = _decode(full_ids, tokenizer)
    text = ""
    for answer_ids in _candidates(answer, tokenizer):
        text = _decode([*prompt_ids, *answer_ids], tokenizer)
        if text == wanted:
            return answer_ids
    text_end = printable(repr(text[-SHOWN_CHARACTERS:]), 80)
    wanted_end = printable(repr(wanted[-SHOWN_CHARACTERS:]), 80)
    raise DataError(
        "after this prompt the tokenizer cannot write the answer as it stands: it would read "
        f"...{text_end} instead of ...{wanted_end}. Let the answer begin with a space or a new "
        "line, and the prompt end without one"
    )


def _candidates(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield ways to write a text in the middle of another, the likeliest first."""
    yield tokenizer(text, add_special_tokens=False)["input_ids"]
    for anchor in ANCHORS:
        anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        both_ids = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        if anchor_ids and both_ids[: len(anchor_ids)] == anchor_ids:
            yield both_ids[len(anchor_ids) :]


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of token ids; characters that can be written in several ways are unified."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return unicodedata.normalize("NFC", str(text))
