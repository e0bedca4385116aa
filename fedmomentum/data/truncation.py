"""Truncation of tokenized examples at a maximum length, and what it may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fedmomentum.data.tokenized import Span, TokenizedExamples
from fedmomentum.data.turns import gaps_between
from fedmomentum.errors import DataError

if TYPE_CHECKING:
    from fedmomentum.data.examples import Example


class TokenIds(NamedTuple):
    """The untruncated token ids of an example, and the ranges that are learned."""

    ids: list[int]
    learned: list[Span]


@dataclass(frozen=True)
class UntruncatedExamples:
    """Examples and their untruncated tokens; the fields are parallel.

    Attributes:
        examples: The examples.
        rows: Their token ids.
        rejected: The token ids of the prompts with the rejected answers; empty lists without.
    """

    examples: Sequence[Example]
    rows: Sequence[TokenIds]
    rejected: Sequence[list[int]]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each example, including its rejected answer's."""
        return [max(len(row.ids), len(ids)) for row, ids in zip(self.rows, self.rejected)]

    def retained(self, max_length: int) -> list[int]:
        """Return the positions of the examples whose prompt alone does not fill the length."""
        return [row for row, ids in enumerate(self.rows) if ids.learned[0][0] < max_length]

    def truncate(self, max_length: int) -> TokenizedExamples:
        """Put prompt and answer of each retained example in a row of at most the length."""
        retained = self.retained(max_length)
        input_ids = []
        is_truncated = []
        gaps = []
        for row in retained:
            learned = self.rows[row].learned
            ids = tuple(self.rows[row].ids[:max_length])
            input_ids.append(ids)
            gaps.append(gaps_between(learned, len(ids)))
            # Tokens after the last learned one can be cut off without truncating an answer.
            is_cut = learned[-1][1] > max_length or len(self.rejected[row]) > max_length
            is_truncated.append(is_cut)
        return TokenizedExamples(
            tuple(input_ids),
            tuple(self.rows[row].learned[0][0] for row in retained),
            tuple(self.examples[row].category for row in retained),
            tuple(is_truncated),
            len(self.rows) - len(retained),
            tuple(gaps),
            tuple(tuple(self.rejected[row][:max_length]) for row in retained),
            units=tuple(self.examples[row].unit for row in retained),
        )


def refuse_lost_answers(
    parts: Sequence[UntruncatedExamples],
    *,
    max_length: int,
    max_truncated_fraction: float,
    owner: str,
    trains: bool = True,
) -> None:
    """Refuse examples of which too many would lose their entire answer.

    Args:
        parts: The parts of the examples, counted together.
        max_length: The maximum number of tokens per row.
        max_truncated_fraction: The fraction of all examples that may be lost.
        owner: Whose examples these are, for error messages.
        trains: Whether the first part is trained on, and must not lose all of its examples; if not,
            one example of any part is enough.

    Raises:
        DataError: If too many are lost; the message says which length would be needed.
    """
    num_retained = [len(part.retained(max_length)) for part in parts]
    num_examples = sum(len(part.rows) for part in parts)
    num_lost = num_examples - sum(num_retained)
    has_any = any(num_retained[:1] if trains else num_retained)
    if has_any and num_lost <= max_truncated_fraction * num_examples:
        return
    lengths = sorted(length for part in parts for length in part.lengths)
    allowed = ""
    advice = "raise max-length, or shorten the prompts"
    if has_any:
        allowed = f" (allowed fraction: {max_truncated_fraction:g})"
        advice = (
            "raise max-length, shorten the prompts, or raise max-truncated-fraction to train "
            "without those examples"
        )
    raise DataError(
        f"{owner}: {num_lost} of {num_examples} examples lose their complete answer, because "
        f"their prompt alone fills max-length = {max_length} tokens{allowed}. The longest example "
        f"has {lengths[-1]} tokens, half have at most {lengths[len(lengths) // 2]}: {advice}"
    )
