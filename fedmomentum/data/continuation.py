"""The ids of an answer that follows a prompt's own ids, where the tokenizer would have merged the two.

Generation starts from the prompt's ids, so training must, too. SentencePiece writes a space in front of every text, so
an answer tokenized by itself would be learned with a space too many after a prompt that ends in one; WordPiece would
begin a new word. So the answer is tokenized behind some other text, an anchor, whose ids are then taken off, and what
comes out is accepted only if prompt and answer together read like the whole text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedmomentum.errors import DataError
from fedmomentum.schema import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", ":", ".", "a", "x", "1", "(", "-", "z", "?", "é")
"""Texts behind which the answer is tokenized, in this order; one of them will not merge with it."""


def continuation_ids(
    prompt: Sequence[int], whole: Sequence[int], answer_text: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return ids that, after the prompt's, read as the whole text does.

    Args:
        prompt: The prompt's ids.
        whole: The ids of prompt and answer as one text; they do not begin with the prompt's.
        answer_text: The answer.
        tokenizer: The base model's tokenizer.

    Raises:
        DataError: There are none that this tokenizer would write.
    """
    wanted = _read(whole, tokenizer)
    read = ""
    for answer in _candidates(answer_text, tokenizer):
        read = _read([*prompt, *answer], tokenizer)
        if read == wanted:
            return answer
    raise DataError(
        f"after this prompt the tokenizer cannot write the answer as it stands: it would read "
        f"...{printable(repr(read[-60:]), 80)} instead of ...{printable(repr(wanted[-60:]), 80)}. Let the answer begin "
        "with a space or a new line, and the prompt end without one"
    )


def _candidates(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield ways to write the text in the middle of another, the likeliest first."""
    yield tokenizer(text, add_special_tokens=False)["input_ids"]
    for anchor in _ANCHORS:
        before = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        both = tokenizer(anchor + text, add_special_tokens=False)["input_ids"]
        if before and both[: len(before)] == before:
            yield both[len(before) :]


def _read(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of ids; characters that are written in several ways count as the same."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return unicodedata.normalize("NFC", str(text))
