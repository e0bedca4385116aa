"""Token ids of an answer after its prompt, for tokenizers that would merge tokens across the two.

Generation starts from the prompt's token ids, so training must too. SentencePiece puts a space in
front of every text, so an answer tokenized on its own would be learned with an extra space after a
prompt that ends in one; WordPiece would begin a new word. The answer is therefore tokenized after
another text, an anchor, whose ids are then removed, and the result is accepted only if prompt and
answer together decode to the full text.
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
"""Anchors to try, in this order; one of them will not merge with the answer."""

SHOWN_CHARACTERS = 60
"""How much of a text's end error messages show."""


def continuation_ids(
    prompt_ids: Sequence[int],
    full_ids: Sequence[int],
    answer: str,
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """Return token ids of the answer that, after the prompt's, decode to the full text.

    Args:
        prompt_ids: The token ids of the prompt.
        full_ids: The token ids of prompt and answer as one text, which do not start with the
            prompt's ids.
        answer: The text of the answer.
        tokenizer: The base model's tokenizer.

    Returns:
        The token ids of the answer.

    Raises:
        DataError: If no tokenization of the answer decodes to the full text.
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
    """Yield tokenizations of a text in the middle of another, most likely first."""
    yield tokenizer(text, add_special_tokens=False)["input_ids"]
    for anchor in ANCHORS:
        anchor_ids = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        both_ids = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        if anchor_ids and both_ids[: len(anchor_ids)] == anchor_ids:
            yield both_ids[len(anchor_ids) :]


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode token ids to Unicode-normalized text."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return unicodedata.normalize("NFC", str(text))
