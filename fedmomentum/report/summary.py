"""Untouched model against federated model: the numbers behind the page and the final table of the command line."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

_Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution: two-sided 95 %


def wilson_interval(num_exact: int, num_examples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n); (0, 1) without items."""
    if num_examples == 0:
        return 0.0, 1.0
    share, spread = num_exact / num_examples, _Z * _Z / num_examples
    centre = share + spread / 2
    half = _Z * math.sqrt(share * (1 - share) / num_examples + spread / (4 * num_examples))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


@dataclass(frozen=True)
class Measure:
    """One model on one group of items. Loss in nats per token."""

    num_examples: int
    num_exact: int
    loss: float

    @property
    def exact_match(self) -> float:
        """Share of items answered exactly."""
        return self.num_exact / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `exact_match`."""
        return wilson_interval(self.num_exact, self.num_examples)


@dataclass(frozen=True)
class SummaryRow:
    """One group of items under both models; None where a model was not evaluated on the group."""

    group: Literal["total", "category", "client"]
    name: str
    untouched: Measure | None
    federated: Measure | None

    @property
    def change(self) -> float | None:
        """Exact match gained, as a share of the items."""
        if self.untouched is None or self.federated is None:
            return None
        return self.federated.exact_match - self.untouched.exact_match


def summarise(rows: Sequence[dict[str, Any]]) -> list[SummaryRow]:
    """Total, then each category, then each client (in natural order): round 0 against the last evaluated round.

    Args:
        rows: the rows of metrics.jsonl, in the order of rounds.
    """
    before, after = untouched_row(rows), federated_row(rows)
    summary = [SummaryRow("total", "all", _measure(before, "total"), _measure(after, "total"))]
    groups: tuple[tuple[Literal["category", "client"], str], ...] = (
        ("category", "by_category"),
        ("client", "by_client"),
    )
    for group, key in groups:
        names = {name for row in (before, after) for name in _evaluation(row).get(key) or {}}
        for name in sorted(names, key=natural_order):
            summary.append(SummaryRow(group, name, _measure(before, key, name), _measure(after, key, name)))
    return summary


def untouched_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of round 0 if it was evaluated."""
    return next((row for row in rows if row["round"] == 0 and row.get("evaluation")), None)


def federated_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last evaluated row after round 0."""
    return next((row for row in reversed(rows) if row["round"] > 0 and row.get("evaluation")), None)


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which client-2 comes before client-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def measure(score: dict[str, Any] | None) -> Measure | None:
    """A score of an evaluation; None where it has no items."""
    if not score or not score["num_examples"]:
        return None
    return Measure(score["num_examples"], score["num_exact"], score["loss"])


def _evaluation(row: dict[str, Any] | None) -> dict[str, Any]:
    return (row or {}).get("evaluation") or {}


def _measure(row: dict[str, Any] | None, key: str, name: str | None = None) -> Measure | None:
    scores = _evaluation(row).get(key) or {}
    return measure(scores if name is None else scores.get(name))
