"""Base model versus federated model: the scores shown on the page and by the command line."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from fedmomentum.formats.round_record import EvaluationRecord, RoundRecord
from fedmomentum.formats.scores import Score


@dataclass(frozen=True)
class SummaryRow:
    """One group of examples under both models.

    Attributes:
        group: What the group is.
        name: The category, the client, or `all`.
        base: The base model's score; None if it was not evaluated on the group.
        federated: The score after the last evaluated round; None if the group has none.
    """

    group: Literal["total", "category", "client"]
    name: str
    base: Score | None
    federated: Score | None

    @property
    def change(self) -> float | None:
        """The gain in exact match, as a fraction of the examples."""
        if self.base is None or self.federated is None:
            return None
        return self.federated.exact_match - self.base.exact_match


def summarize_run(rounds: Sequence[RoundRecord]) -> list[SummaryRow]:
    """Compare round 0 with the last evaluated round: in total, by category and by client.

    Args:
        rounds: The rounds of a run, in order.

    Returns:
        The total, each category, then each client; names in natural order.
    """
    # Either evaluation may be missing.
    before = _evaluation(find_base_round(rounds))
    after = _evaluation(find_federated_round(rounds))
    total_before = scored(before.total) if before else None
    total_after = scored(after.total) if after else None
    return [
        SummaryRow("total", "all", total_before, total_after),
        *_group_rows("category", _by_category(before), _by_category(after)),
        *_group_rows("client", _by_client(before), _by_client(after)),
    ]


def find_base_round(rounds: Sequence[RoundRecord]) -> RoundRecord | None:
    """Return round 0 if it was evaluated."""
    for record in rounds:
        if record.round == 0 and record.evaluation is not None:
            return record
    return None


def find_federated_round(rounds: Sequence[RoundRecord]) -> RoundRecord | None:
    """Return the last evaluated round after round 0."""
    for record in reversed(rounds):
        if record.round > 0 and record.evaluation is not None:
            return record
    return None


def scored(score: Score | None) -> Score | None:
    """Return a score, or None if it has no examples."""
    if score is None or score.num_examples == 0:
        return None
    return score


def total_seconds(record: RoundRecord) -> float:
    """Return the seconds of a round over all its phases."""
    return sum(seconds_by_phase(record).values())


def seconds_by_phase(record: RoundRecord) -> dict[str, float]:
    """Return the seconds of each phase that was measured; they add up to the round."""
    seconds = {}
    for phase, value in msgspec.structs.asdict(record.seconds).items():
        if value is not None and phase != "loading":  # inside other phases
            seconds[phase] = value
    return seconds


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts client-2 before client-10."""
    key = []
    for part in re.split(r"(\d+)", name):
        if part.isdecimal():
            key.append((int(part), ""))
        else:
            key.append((0, part))
    return key


def _group_rows(
    group: Literal["category", "client"],
    before: Mapping[str, Score],
    after: Mapping[str, Score],
) -> list[SummaryRow]:
    rows = []
    for name in sorted(before.keys() | after.keys(), key=natural_order):
        rows.append(SummaryRow(group, name, scored(before.get(name)), scored(after.get(name))))
    return rows


def _evaluation(record: RoundRecord | None) -> EvaluationRecord | None:
    return record.evaluation if record else None


def _by_category(evaluation: EvaluationRecord | None) -> Mapping[str, Score]:
    """Return the score of each category; empty if the data names none."""
    if evaluation is None or evaluation.by_category.keys() == {""}:
        return {}
    return evaluation.by_category


def _by_client(evaluation: EvaluationRecord | None) -> Mapping[str, Score]:
    return evaluation.by_client if evaluation else {}
