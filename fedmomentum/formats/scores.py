"""`Score`: sums over a group of examples, the same in memory, on the wire and on disk."""

from __future__ import annotations

import math
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from fedmomentum.utils.schema import LARGEST, MAX_LABELS, Count, Label, Schema

MAX_EXPONENT = 700.0
"""`exp` of more nats per token would overflow float64; perplexity is capped here."""
NORMAL_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution, for two-sided 95 % intervals."""


class LabelCounts(Schema, frozen=True, kw_only=False):
    """How often a classifier was right on one label.

    Attributes:
        num_examples: Number of examples with the label.
        num_predicted: Number of examples for which the label was predicted.
        num_exact: Number of examples for which both hold.
    """

    num_examples: Count
    num_predicted: Count
    num_exact: Count

    def __post_init__(self) -> None:
        """Check that the numbers are consistent."""
        if self.num_exact > min(self.num_examples, self.num_predicted):
            raise ValueError(
                f"{self.num_exact} right predictions of {self.num_predicted} for "
                f"{self.num_examples} examples of a label"
            )

    def __add__(self, other: LabelCounts) -> LabelCounts:
        """Return the combined counts of both groups."""
        return LabelCounts(
            self.num_examples + other.num_examples,
            self.num_predicted + other.num_predicted,
            self.num_exact + other.num_exact,
        )

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall; None for a label that does not occur."""
        total = self.num_examples + self.num_predicted
        return 2 * self.num_exact / total if total else None


class Score(Schema, frozen=True, kw_only=False):
    """Sums over a group of held-out examples, so that groups and clients can be added.

    Attributes:
        nll: Summed negative log-likelihood in nats: of completion tokens, of a classifier's labels,
            or of the preferences in pairs of answers.
        num_tokens: Number of completion tokens, including end tokens; for classifiers, the number
            of labels; for pairs, the number of pairs.
        num_examples: Number of examples.
        num_exact: Number of examples that greedy generation answers word for word, or whose label
            is predicted; for pairs, those whose chosen answer has the larger reward.
        margin: Sum of the margins between the rewards of pairs; None for other examples.
        by_label: For a classifier, label to its counts.
    """

    nll: Annotated[float, Meta(ge=0, le=LARGEST)]
    num_tokens: Count
    num_examples: Count
    num_exact: Count
    margin: Annotated[float, Meta(ge=-LARGEST, le=LARGEST)] | None = None
    by_label: Annotated[dict[Label, LabelCounts], Meta(max_length=MAX_LABELS)] = {}

    def __post_init__(self) -> None:
        """Check that the numbers are consistent; msgspec reports a ValueError with the field."""
        if self.num_exact > self.num_examples:
            raise ValueError(f"{self.num_exact} exact answers of {self.num_examples} examples")
        if not self.by_label:
            return
        # Every example has exactly one label and one prediction.
        counts = self.by_label.values()
        sums = [
            sum(count.num_examples for count in counts),
            sum(count.num_predicted for count in counts),
            sum(count.num_exact for count in counts),
        ]
        if sums != [self.num_examples, self.num_examples, self.num_exact]:
            raise ValueError("the counts of its labels do not add up to the score")

    def __add__(self, other: Score) -> Score:
        """Return the combined score of both groups."""
        by_label = dict(self.by_label)
        for label, counts in other.by_label.items():
            by_label[label] = by_label[label] + counts if label in by_label else counts
        return Score(
            self.nll + other.nll,
            self.num_tokens + other.num_tokens,
            self.num_examples + other.num_examples,
            self.num_exact + other.num_exact,
            margin=_sum(self.margin, other.margin),
            by_label=dict(sorted(by_label.items())),
        )

    def without_labels(self) -> Score:
        """Return the score without counts by label."""
        return msgspec.structs.replace(self, by_label={}) if self.by_label else self

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
        """Mean negative log-likelihood per completion token, in nats; NaN without tokens."""
        return self.nll / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, with the loss capped at `MAX_EXPONENT`; NaN without tokens and for pairs."""
        if self.is_of_pairs or not self.num_tokens:
            return math.nan
        return math.exp(min(self.loss, MAX_EXPONENT))

    @property
    def exact_match(self) -> float:
        """Fraction of examples answered word for word, or of labels or pairs predicted correctly.

        NaN without examples.
        """
        return self.num_exact / self.num_examples if self.num_examples else math.nan

    @property
    def measure(self) -> str:
        """The usual name of `exact_match`: for labels or pairs, it is an accuracy."""
        if self.by_label:
            return "accuracy"
        return "reward accuracy" if self.is_of_pairs else "exact match"

    @property
    def loss_unit(self) -> str:
        """The unit of the loss."""
        if self.by_label:
            return "nats per label"
        return "nats per pair" if self.is_of_pairs else "nats per token"

    @property
    def macro_f1(self) -> float | None:
        """Mean F1 of all labels that occur or are predicted; None if not a classifier.

        This is scikit-learn's `f1_score(average="macro")`; labels that were never right count as 0.
        """
        scores = (counts.f1 for counts in self.by_label.values())
        occurring = [score for score in scores if score is not None]
        return sum(occurring) / len(occurring) if occurring else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of `exact_match`; (0, 1) without examples.

        Unlike the normal interval, it stays inside [0, 1] and does not collapse at 0 % or 100 %.
        """
        n = self.num_examples
        if n == 0:
            return 0.0, 1.0
        z_squared = NORMAL_95**2
        fraction = self.num_exact / n
        center = (fraction + z_squared / (2 * n)) / (1 + z_squared / n)
        variance = fraction * (1 - fraction) / n + z_squared / (4 * n * n)
        half_width = NORMAL_95 / (1 + z_squared / n) * math.sqrt(variance)
        # With no or only correct answers, one bound is exactly 0 or 1, which rounding would miss.
        low = 0.0 if self.num_exact == 0 else center - half_width
        high = 1.0 if self.num_exact == n else center + half_width
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Return the sums and derived figures, in the form of a row of metrics.jsonl."""
        row: dict[str, Any] = {
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
        if self.by_label:
            # For a classifier, add the figures derived from its counts by label.
            row["macro_f1"] = self.macro_f1
            row["by_label"] = {}
            for label, counts in self.by_label.items():
                row["by_label"][label] = {**msgspec.structs.asdict(counts), "f1": counts.f1}
        return row


def _sum(first: float | None, second: float | None) -> float | None:
    """Return the sum of the values that are not None; None if both are."""
    there = [value for value in (first, second) if value is not None]
    return sum(there) if there else None


NO_EXAMPLES = Score(0.0, 0, 0, 0)
"""The score of an empty group: the neutral element of addition."""
