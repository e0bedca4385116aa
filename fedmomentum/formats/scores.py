"""`Score`: sums over a group of examples; in memory, on the wire and on disk alike."""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta

from fedmomentum.utils.schema import Count, Schema

LARGEST = 1e300
"""Larger numbers overflow as soon as something is done with them, be it drawing a curve."""
MAX_EXPONENT = 700.0
"""`exp` of more nats a token leaves the range of float64; perplexity is given up to here."""
NORMAL_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution: two-sided 95 %."""


class Score(Schema, frozen=True, kw_only=False):
    """Sums over a group of held-out examples, so that groups and clients can be added.

    Attributes:
        nll: Summed negative log-likelihood of the completion tokens, in nats; of pairs of answers,
            that of the preference.
        num_tokens: Number of completion tokens, end tokens included; of pairs, their number.
        num_examples: Number of examples.
        num_exact: Number of examples that greedy generation answers word for word; of pairs, those
            whose chosen answer has the larger reward.
        margin: Sum of the margins between the rewards of pairs; None for other examples.
    """

    nll: Annotated[float, Meta(ge=0, le=LARGEST)]
    num_tokens: Count
    num_examples: Count
    num_exact: Count
    margin: Annotated[float, Meta(ge=-LARGEST, le=LARGEST)] | None = None

    def __post_init__(self) -> None:
        """Check that the numbers fit each other; msgspec reports a ValueError with the field."""
        if self.num_exact > self.num_examples:
            raise ValueError(f"{self.num_exact} exact answers of {self.num_examples} examples")

    def __add__(self, other: Score) -> Score:
        """Return the score of both groups together."""
        return Score(
            self.nll + other.nll,
            self.num_tokens + other.num_tokens,
            self.num_examples + other.num_examples,
            self.num_exact + other.num_exact,
            margin=_sum(self.margin, other.margin),
        )

    @property
    def is_of_pairs(self) -> bool:
        """Whether the examples are pairs of answers."""
        return self.margin is not None

    @property
    def mean_margin(self) -> float:
        """Mean margin between the rewards of a pair; NaN for other examples."""
        if self.margin is None or not self.num_examples:
            return math.nan
        return self.margin / self.num_examples

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a completion token, in nats; NaN without tokens."""
        return self.nll / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, of at most `MAX_EXPONENT`; NaN without tokens, and for pairs."""
        if self.is_of_pairs or not self.num_tokens:
            return math.nan
        return math.exp(min(self.loss, MAX_EXPONENT))

    @property
    def exact_match(self) -> float:
        """Fraction of the examples answered word for word, or of pairs ranked right.

        NaN without examples.
        """
        return self.num_exact / self.num_examples if self.num_examples else math.nan

    @property
    def measure(self) -> str:
        """What people call `exact_match`: of pairs it is the reward accuracy."""
        return "reward accuracy" if self.is_of_pairs else "exact match"

    @property
    def loss_unit(self) -> str:
        """The unit of the loss."""
        return "nats per pair" if self.is_of_pairs else "nats per token"

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `exact_match`; (0, 1) without examples.

        Unlike the normal interval it stays inside [0, 1] and does not shrink to nothing at 0 % or
        100 %.
        """
        n = self.num_examples
        if n == 0:
            return 0.0, 1.0
        z_squared = NORMAL_95**2
        fraction = self.num_exact / n
        center = (fraction + z_squared / (2 * n)) / (1 + z_squared / n)
        variance = fraction * (1 - fraction) / n + z_squared / (4 * n * n)
        half_width = NORMAL_95 / (1 + z_squared / n) * math.sqrt(variance)
        # With no hit or only hits a bound is 0 or 1 exactly; rounding would miss it by a hair.
        low = 0.0 if self.num_exact == 0 else center - half_width
        high = 1.0 if self.num_exact == n else center + half_width
        return low, high

    def to_json(self) -> dict[str, float | int | None]:
        """Return the sums and what follows from them, as a row of metrics.jsonl holds them."""
        row: dict[str, float | int | None] = {
            "nll": self.nll,
            "num_tokens": self.num_tokens,
            "num_examples": self.num_examples,
            "num_exact": self.num_exact,
            "loss": self.loss if self.num_tokens else None,
            "perplexity": None if math.isnan(self.perplexity) else self.perplexity,
            "exact_match": self.exact_match if self.num_examples else None,
        }
        if self.margin is not None:
            row["margin"] = self.margin
            row["mean_margin"] = self.mean_margin if self.num_examples else None
        return row


def _sum(first: float | None, second: float | None) -> float | None:
    """Return the sum of what is there; None where neither is."""
    there = [value for value in (first, second) if value is not None]
    return sum(there) if there else None


NO_EXAMPLES = Score(0.0, 0, 0, 0)
"""The score of an empty group: the neutral element of addition."""
