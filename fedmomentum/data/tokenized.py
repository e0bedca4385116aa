"""Tokenized examples: what the model sees, and which tokens are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, NamedTuple

Span = tuple[int, int]
"""A half-open range of tokens in a row."""


class TokenizedExample(NamedTuple):
    """One of `TokenizedExamples`.

    Attributes:
        input_ids: Token ids of prompt, completion and end token.
        num_prompt_tokens: The number of these that belong to the prompt.
        category: The category of the example.
        is_truncated: Whether part of the completion was cut off.
        gaps: Ranges after the prompt that carry no loss.
        rejected_ids: Token ids of the prompt and the rejected answer; empty if the example has
            only one answer.
        reference: Log-probabilities of the answer and the rejected answer under the reference
            model; empty until they are measured.
    """

    input_ids: tuple[int, ...]
    num_prompt_tokens: int
    category: str
    is_truncated: bool
    gaps: tuple[Span, ...] = ()
    rejected_ids: tuple[int, ...] = ()
    reference: tuple[float, ...] = ()

    @property
    def length(self) -> int:
        """Number of tokens of its longest row."""
        return max(len(self.input_ids), len(self.rejected_ids))

    @property
    def content(self) -> tuple[Any, ...]:
        """What the model is trained and scored on; examples with equal content are the same."""
        return (self.input_ids, self.num_prompt_tokens, self.gaps, self.rejected_ids)


@dataclass(frozen=True)
class TokenizedExamples:
    """Examples ready for training or evaluation; the fields are parallel, one entry per example.

    Attributes:
        input_ids: Token ids of each example's prompt, completion and end token. For a chat whose
            assistant turns are all learned, the entire chat. For a classifier, the token ids of
            the text, then the index of its label.
        num_prompt_tokens: The number of these that belong to the prompt, which carry no loss. For
            a classifier, the number of tokens of the first text of a pair.
        categories: The category of each example.
        is_truncated: Whether ``max_length`` cut off part of the completion (or its end token).
        num_lost: The number of other examples, dropped because truncation left nothing of their
            completion.
        gaps: Ranges after the prompt that carry no loss either, such as later user turns. None by
            default.
        rejected_ids: Token ids of the prompt and the rejected answer. None by default.
        reference: Log-probabilities of both answers under the reference model. By default, not
            measured.
        units: The privacy unit of each example, which differentially private training protects as
            a whole; empty for an example that is its own unit, as all are by default.
    """

    input_ids: tuple[tuple[int, ...], ...]
    num_prompt_tokens: tuple[int, ...]
    categories: tuple[str, ...]
    is_truncated: tuple[bool, ...]
    num_lost: int
    gaps: tuple[tuple[Span, ...], ...] = ()
    rejected_ids: tuple[tuple[int, ...], ...] = ()
    reference: tuple[tuple[float, ...], ...] = ()
    units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Fill in the defaults, so that every field has an entry for each example."""
        for name in ("gaps", "rejected_ids", "reference"):
            if not getattr(self, name):
                object.__setattr__(self, name, ((),) * len(self.input_ids))
        if not self.units:
            object.__setattr__(self, "units", ("",) * len(self.input_ids))

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> TokenizedExamples:
        """Return a slice of the examples; `num_lost` is kept."""
        return self._mapped(lambda values: values[rows], self.num_lost)

    def example(self, index: int) -> TokenizedExample:
        """Return one example; indices start at 0."""
        return TokenizedExample(
            self.input_ids[index],
            self.num_prompt_tokens[index],
            self.categories[index],
            self.is_truncated[index],
            self.gaps[index],
            self.rejected_ids[index],
            self.reference[index],
        )

    def _mapped(
        self, change: Callable[[tuple[Any, ...]], tuple[Any, ...]], num_lost: int
    ) -> TokenizedExamples:
        """Return the examples with ``change`` applied to every parallel field."""
        values: dict[str, Any] = {}
        for field in fields(self):
            if field.name != "num_lost":
                values[field.name] = change(getattr(self, field.name))
        return TokenizedExamples(**values, num_lost=num_lost)

    @classmethod
    def concatenate(cls, parts: Sequence[TokenizedExamples]) -> TokenizedExamples:
        """Concatenate the examples of all parts."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name != "num_lost":
                entries: Iterable[Any] = (getattr(part, field.name) for part in parts)
                values[field.name] = tuple(chain.from_iterable(entries))
        return cls(**values, num_lost=sum(part.num_lost for part in parts))

    @property
    def num_truncated(self) -> int:
        """Number of examples that have lost part of their completion."""
        return sum(self.is_truncated)

    @property
    def are_pairs(self) -> bool:
        """Whether each example has a rejected answer in addition to the one to learn."""
        return any(self.rejected_ids)

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """All rows that a model is run on: one per example, or two if it has a rejected answer."""
        return self.input_ids + tuple(ids for ids in self.rejected_ids if ids)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest row; 0 if there are no examples."""
        return max(map(len, self.rows), default=0)


EMPTY_EXAMPLES = TokenizedExamples((), (), (), (), 0)


@dataclass(frozen=True)
class TokenizedClient:
    """A client's tokenized examples.

    Attributes:
        client_id: The client.
        train: The training examples.
        test: The held-out examples.
    """

    client_id: str
    train: TokenizedExamples
    test: TokenizedExamples
