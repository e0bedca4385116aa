"""Who was drawn for a round and is not in its model: how often, for how much of the data, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmomentum.report.summary import natural_order
from fedmomentum.report.text import percent, shorten


@dataclass(frozen=True)
class Absence:
    """A client whose update is missing from at least one round.

    Attributes:
        client: Its name.
        num_asked: Rounds for which it was drawn.
        num_missing: Those of them in which its update was not used.
        num_too_large: Those in which it was left out for the size of its update.
        share: Its share of all training examples; None where that is not known.
        last_round: The last round in which its update was not used.
        reason: Why, in that round.
    """

    client: str
    num_asked: int
    num_missing: int
    num_too_large: int
    share: float | None
    last_round: int
    reason: str

    @property
    def is_total(self) -> bool:
        """Whether nothing of this client's data is in the model."""
        return self.num_missing == self.num_asked

    @property
    def headline(self) -> str:
        """How often, and for how much of the data."""
        data = f" ({percent(self.share)} of all training examples)" if self.share is not None else ""
        size = f", {self.num_too_large} times for the size of its update" if self.num_too_large else ""
        never = ": nothing of its data is in the model" if self.is_total else ""
        rounds = "round" if self.num_asked == 1 else "rounds"
        return (
            f"{shorten(self.client, 100)}{data} was left out of {self.num_missing} of {self.num_asked} "
            f"{rounds}{size}{never}"
        )


def absences(rows: Sequence[Mapping[str, Any]], partition: Mapping[str, Any]) -> list[Absence]:
    """Return the clients whose updates are missing, those that are missing most first.

    Args:
        rows: The rows of metrics.jsonl.
        partition: What partition.json holds: client to {"train": {category: count}}.
    """
    asked: dict[str, int] = {}
    missing: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        accepted = set(row.get("accepted") or ())
        for client in row.get("participants") or ():
            asked[client] = asked.get(client, 0) + 1
            if client not in accepted:
                missing.setdefault(client, []).append(row)
    sizes = {client: sum((splits.get("train") or {}).values()) for client, splits in partition.items()}
    total = sum(sizes.values())
    found = [
        Absence(
            client=client,
            num_asked=asked[client],
            num_missing=len(without),
            num_too_large=sum(bool(_screening(row, client).get("is_left_out")) for row in without),
            share=sizes[client] / total if client in sizes and total else None,
            last_round=without[-1]["round"],
            reason=shorten(str((without[-1].get("failures") or {}).get(client, "no reason was recorded")), 600),
        )
        for client, without in missing.items()
    ]
    return sorted(found, key=lambda one: (-one.num_missing / one.num_asked, natural_order(one.client)))


def _screening(row: Mapping[str, Any], client: str) -> Mapping[str, Any]:
    return (row.get("screening") or {}).get(client) or {}
