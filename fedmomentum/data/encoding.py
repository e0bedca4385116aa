"""Token ids of texts, without the special tokens that a tokenizer appends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Texts per tokenizer call: the overhead of a call exceeds the cost of a short text, but a call
# holds several times the size of its texts in memory.
TEXTS_PER_CALL = 256


def encode_texts(
    texts: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Return the token ids of texts, without the special tokens at the end.

    Args:
        texts: Pairs of a text and whether it is a chat, in which case the template has already
            added the special tokens.
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
    """Return the special tokens that the tokenizer appends to plain text.

    An end token, a separator, or nothing.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    closed: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(closed) - len(plain) + 1):
        end = start + len(plain)
        if closed[start:end] == plain:
            return closed[end:]
    return []


def _without_closing(ids: list[int], closing_ids: Sequence[int]) -> list[int]:
    """Strip the closing tokens from a text's token ids: the answer belongs before them."""
    is_closed = closing_ids and ids[-len(closing_ids) :] == closing_ids
    return ids[: -len(closing_ids)] if is_closed else ids
