"""Finds the assistant's tokens in a chat, for learning all of the assistant's turns.

The entire chat is tokenized at once. If the template marks generated text (``{% generation %}``),
the marks determine the turns. Otherwise a turn extends from the end of the preceding chat, as
generation would see it, to the token that ends the turn. This is only valid if the template renders
a turn the same way no matter what follows, which is checked token by token: a template that removes
earlier reasoning does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fedmomentum.data.chat_text import template_messages
from fedmomentum.data.tokenized import Span
from fedmomentum.errors import DataError
from fedmomentum.utils.chat_date import date_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def gaps_between(learned: Sequence[Span], length: int) -> tuple[Span, ...]:
    """Return the unlearned ranges after the first learned token.

    Args:
        learned: The learned ranges, in order.
        length: Number of tokens of the row; everything beyond is cut off.
    """
    gaps = []
    for (_, end), (start, _) in pairwise([*learned, (length, length)]):
        # The row may have been truncated within this gap or before it.
        if end < min(start, length):
            gaps.append((end, min(start, length)))
    return tuple(gaps)


def has_generation_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template marks what the assistant generates."""
    return _GENERATION_MARK.search(tokenizer.get_chat_template()) is not None


def marked_turns(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
    positions: Sequence[int],
) -> tuple[list[int], list[Span]]:
    """Return a chat's token ids, and the ranges that its template marks as generated.

    Args:
        messages: The complete chat.
        tokenizer: A tokenizer whose template has generation marks.
        end_id: The token at which generation stops.
        positions: The messages to learn: some or all of the assistant's, including the last one.

    Raises:
        DataError: If the tokenizer cannot tell which tokens are marked, an assistant turn is not
            marked, or the marks leave out the token that ends the last one.
    """
    try:
        encoded: Any = tokenizer.apply_chat_template(
            template_messages(messages, tokenizer),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **date_arguments(tokenizer),
        )
    # Tokenizers without offsets raise errors of several kinds.
    except Exception as error:
        raise DataError(
            "the chat template marks what the assistant generates, and this tokenizer cannot tell "
            f'which tokens that is ({error}); set training.loss-on = "last"'
        ) from error
    ids = list(encoded["input_ids"])
    learned = _runs(encoded["assistant_masks"])

    # Consecutive assistant turns may form one range.
    roles = ["", *(message["role"] for message in messages)]
    num_turns = 0
    for previous, role in pairwise(roles):
        num_turns += role == "assistant" and previous != "assistant"
    if len(learned) < num_turns:
        raise DataError(
            f"the generation marks of the chat template cover {len(learned)} of the assistant's "
            f"{num_turns} turns; mark all of them, or set training.loss-on = "
            '"last"'
        )
    # Only the last turn is checked: some templates end earlier turns with a different token than
    # the one at which generation stops.
    start, end = learned[-1]
    if end_id not in ids[start:end]:
        raise DataError(
            f"the assistant's last turn: the generation marks of the chat template leave out "
            f"{tokenizer.decode([end_id])!r}, the token that ends it, so the model would not learn "
            "to stop; move {% endgeneration %} behind it, or set training.loss-on = "
            '"last"'
        )
    return ids, _chosen_runs(learned, messages, positions)


def _chosen_runs(
    learned: list[Span], messages: Sequence[dict[str, Any]], positions: Sequence[int]
) -> list[Span]:
    """Return the ranges of the messages that are learned.

    Raises:
        DataError: If some turns are not learned, and the ranges cannot be matched to messages.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(positions) == len(turns):
        return learned
    if len(learned) != len(turns):
        raise DataError(
            f"some of the assistant's {len(turns)} messages are not to be learned, and the "
            f"generation marks of the chat template cover {len(learned)} ranges, so that it is not "
            "clear which they are; write messages of the assistant that follow each other as one"
        )
    return [span for span, turn in zip(learned, turns, strict=True) if turn in positions]


def _runs(mask: Sequence[int]) -> list[Span]:
    """Return the ranges of ones in a mask."""
    runs = []
    start = None
    for position, is_marked in enumerate([*mask, 0]):
        if is_marked and start is None:
            start = position
        elif not is_marked and start is not None:
            runs.append((start, position))
            start = None
    return runs


def prefix_turns(
    texts: Sequence[tuple[int, str, str]], tokenizer: PreTrainedTokenizerBase, end_id: int
) -> tuple[list[int], list[Span]]:
    """Return a chat's token ids, and the assistant's ranges as found by prefixes of the chat.

    Args:
        texts: For each assistant turn, the position of its message, the chat before it as
            generation sees it, and the chat up to its end. The last one is the entire chat.
        tokenizer: The tokenizer.
        end_id: The token at which generation stops.

    Raises:
        DataError: If the template or the tokenizer renders a turn differently when others follow,
            or the beginning of an answer differently than in generation, or ends a turn without an
            end token.
    """
    encoded = tokenizer([text for _, *both in texts for text in both], add_special_tokens=False)
    all_ids: list[list[int]] = encoded["input_ids"]
    complete = all_ids[-1]
    learned = []
    for number, (position, _, _) in enumerate(texts, start=1):
        header = all_ids[2 * number - 2]
        turn = all_ids[2 * number - 1]
        where = f"the assistant's turn {number} of {len(texts)} (message {position + 1})"
        advice = 'set training.loss-on = "last", or give the template {% generation %} marks'
        if not position:
            raise DataError(
                f"{where} stands before any other message, so nothing tells where it begins; begin "
                f"the chat with another role's message, or {advice}"
            )
        start = len(header)
        if turn[:start] != header:
            raise DataError(
                f"{where}: the chat template or the tokenizer writes the beginning of the answer "
                f"differently from the prompt that generation would see; {advice}"
            )
        if end_id not in turn[start:]:
            raise DataError(
                f"{where}: the chat template writes no {tokenizer.decode([end_id])!r} at its end, "
                f"so the model would not learn to stop; {advice}"
            )
        # The template may add more after the end token, which generation never reaches.
        end = len(turn) - turn[::-1].index(end_id)
        if complete[:end] != turn[:end]:
            raise DataError(
                f"{where}: the chat template writes it, or what stands before it, differently when "
                "other turns follow (it may remove earlier reasoning), so training would not match "
                f"use; {advice}"
            )
        learned.append((start, end))
    return complete, learned
