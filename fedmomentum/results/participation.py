"""Which sampled clients are missing from the model: how often, with how much data, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.results.formatting import percent, shorten
from fedmomentum.results.summary import natural_order

# The maximum number of characters shown of a failure's reason, which may come from a client.
REASON_LENGTH = 600
# The maximum number of characters of a client's name in a headline.
CLIENT_LENGTH = 100


@dataclass(frozen=True)
class Absence:
    """A client whose update is missing from at least one round.

    Attributes:
        client: Its name.
        num_sampled: Number of rounds for which it was sampled.
        num_missing: Number of these in which its update was not used.
        num_too_large: Number of rounds in which its update was rejected for its norm.
        data_fraction: Its fraction of all training examples; None if unknown.
        last_round: The last round in which its update was not used.
        reason: Why it was not used in that round.
    """

    client: str
    num_sampled: int
    num_missing: int
    num_too_large: int
    data_fraction: float | None
    last_round: int
    reason: str

    @property
    def is_total(self) -> bool:
        """Whether none of this client's updates are in the model."""
        return self.num_missing == self.num_sampled

    @property
    def headline(self) -> str:
        """One line on how often it was missing, and with how much of the data."""
        text = shorten(self.client, CLIENT_LENGTH)
        if self.data_fraction is not None:
            text += f" ({percent(self.data_fraction)} of all training examples)"
        unit = "round" if self.num_sampled == 1 else "rounds"
        text += f" was left out of {self.num_missing} of {self.num_sampled} {unit}"
        if self.num_too_large:
            times = "once" if self.num_too_large == 1 else f"{self.num_too_large} times"
            text += f", {times} for the size of its update"
        if self.is_total:
            text += ": nothing of its data is in the model"
        return text


def find_absences(
    rounds: Sequence[RoundRecord], partition: Mapping[str, Mapping[str, Mapping[str, int]]]
) -> list[Absence]:
    """Return the clients with missing updates, most frequently missing first.

    Args:
        rounds: The rounds of a run, in order.
        partition: Client to split to category to number of examples.
    """
    # Count each client's rounds, and collect those without its update.
    num_sampled: dict[str, int] = {}
    missed_rounds: dict[str, list[RoundRecord]] = {}
    for record in rounds:
        for client in record.participants:
            num_sampled[client] = num_sampled.get(client, 0) + 1
            if client not in record.accepted:
                missed_rounds.setdefault(client, []).append(record)

    # Describe each client with its last missed round.
    data_fractions = _data_fractions(partition)
    absences = []
    for client, missed in missed_rounds.items():
        last = missed[-1]
        reason = last.failures.get(client, "no reason was recorded")
        absence = Absence(
            client=client,
            num_sampled=num_sampled[client],
            num_missing=len(missed),
            num_too_large=sum(_was_too_large(record, client) for record in missed),
            data_fraction=data_fractions.get(client),
            last_round=last.round,
            reason=shorten(reason, REASON_LENGTH),
        )
        absences.append(absence)
    return sorted(absences, key=_by_missing_fraction)


def _data_fractions(
    partition: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> dict[str, float]:
    """Return each client's fraction of all training examples; empty without examples."""
    # Count examples, then divide by the total.
    num_examples = {}
    for client, splits in partition.items():
        num_examples[client] = sum(splits.get("train", {}).values())
    total = sum(num_examples.values())
    if total == 0:
        return {}
    return {client: count / total for client, count in num_examples.items()}


def _was_too_large(record: RoundRecord, client: str) -> bool:
    screening = record.screening.get(client)
    return screening is not None and screening.is_left_out


def _by_missing_fraction(absence: Absence) -> tuple[float, list[tuple[int, str]]]:
    """Return a sort key: most frequently missing first, then by name."""
    return -absence.num_missing / absence.num_sampled, natural_order(absence.client)
