"""The losses and scores that clients report if only sums are revealed.

A client's loss or score reveals something about its data, and so does the number of examples behind
it. So they are summed like updates. Integers are summed exactly. Any other number is split into an
integer part and a fractional part, which is as precise as the sum's integers allow. Then no bound
is needed, except that the integer part must fit.

Scores by category are left out, since the names of categories come from the clients' data. Scores
by label are not, since the run's settings name the labels; for a label that only one client has,
the sums are that client's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmomentum.errors import SecureSumError
from fedmomentum.formats.round_record import EvaluationRecord
from fedmomentum.formats.scores import NO_EXAMPLES, LabelCounts, Score
from fedmomentum.secure_sum.fixed_point import count_block
from fedmomentum.secure_sum.messages import Block

if TYPE_CHECKING:
    from fedmomentum.protocol.messages import EvaluateResult

# Block to its elements, `(size,)`.
Values = Mapping[str, NDArray[np.float64]]

LOSS = "loss"
WITHHELD_LOSSES = "untold losses"
"""The name of the block that counts the clients whose loss is not in the sum."""
MAX_LOSS = 1e4
"""A training loss beyond this many nats is not reported: the training has diverged."""
COUNTS = ("num_tokens", "num_examples", "num_exact")
GROUPS = ("total", "compared")


# ── training ──────────────────────────────────────────────────────────────────────────────────────


def loss_blocks(num_parties: int) -> list[Block]:
    """Return the blocks of the clients' training losses, which are part of the first sum."""
    return [*_real_blocks(LOSS, 1, num_parties), count_block(WITHHELD_LOSSES, 1, num_parties)]


def loss_values(loss: float | None, num_examples: int, max_examples: int) -> Values:
    """Return a client's values in these blocks.

    Args:
        loss: The mean loss of its training; None if differential privacy withholds it.
        num_examples: Its number of examples, which is its weight in the mean over clients.
        max_examples: The largest number of examples of a client.
    """
    if loss is None or not abs(loss) <= MAX_LOSS:
        return {**_real_values(LOSS, [0.0]), WITHHELD_LOSSES: np.array([1.0])}
    weighted = loss * num_examples / max_examples
    return {**_real_values(LOSS, [weighted]), WITHHELD_LOSSES: np.array([0.0])}


def mean_loss(totals: Values, num_examples: int, max_examples: int) -> float | None:
    """Return the clients' mean loss, weighted by their numbers of examples.

    Args:
        totals: The sums.
        num_examples: The number of examples of all clients in them.
        max_examples: The largest number of examples of a client.

    Returns:
        The mean; None if a client's loss is withheld or beyond `MAX_LOSS`, and so not in the sum.
    """
    if round(float(totals[WITHHELD_LOSSES][0])):
        return None
    (total,) = _reals(LOSS, totals)
    return total * max_examples / num_examples


# ── evaluation ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ScoreSums:
    """The layout of the sum of the clients' scores.

    Attributes:
        num_parties: The number of clients that the sum is planned for.
        of_pairs: Whether the examples are pairs of answers.
        labels: The labels of a classifier; empty for other models.
    """

    num_parties: int
    of_pairs: bool = False
    labels: Sequence[str] = ()

    def blocks(self) -> list[Block]:
        """Return the sum's blocks."""
        # The same blocks for both groups, with counts by label if there are labels.
        blocks = []
        for group in GROUPS:
            blocks += _real_blocks(f"{group} nll", 1, self.num_parties)
            blocks.append(count_block(f"{group} counts", len(COUNTS), self.num_parties))
            if self.of_pairs:
                blocks += _real_blocks(f"{group} margin", 1, self.num_parties)
            if self.labels:
                size = 3 * len(self.labels)
                blocks.append(count_block(f"{group} labels", size, self.num_parties))
        return blocks

    def values(self, result: EvaluateResult) -> Values:
        """Return a client's values in the sum; zeros if it has no held-out examples."""
        # A client without held-out examples adds zeros, since all must use the same layout.
        values: dict[str, NDArray[np.float64]] = {}
        for group in GROUPS:
            score = getattr(result, group) or NO_EXAMPLES
            values |= _real_values(f"{group} nll", [score.nll])
            counts = [float(getattr(score, name)) for name in COUNTS]
            values[f"{group} counts"] = np.array(counts)
            if self.of_pairs:
                values |= _real_values(f"{group} margin", [score.margin or 0.0])
            if self.labels:
                values[f"{group} labels"] = self._label_values(score)
        return values

    def _label_values(self, score: Score) -> NDArray[np.float64]:
        """Return the counts of each label, one label after the other."""
        rows = []
        for label in self.labels:
            counts = score.by_label.get(label, LabelCounts(0, 0, 0))
            rows.append([counts.num_examples, counts.num_predicted, counts.num_exact])
        return np.array(rows, dtype=np.float64).reshape(-1)

    def record(self, totals: Values) -> EvaluationRecord | None:
        """Return the pooled scores of all clients; None if nobody has held-out examples.

        Raises:
            SecureSumError: If they are contradictory, because some client added other values than
                it measured; nobody can tell which one.
        """
        try:
            total = self._score("total", totals)
            compared = self._score("compared", totals)
        except ValueError as error:
            raise SecureSumError(
                f"the sum of the clients' scores contradicts itself ({error}); a client added what "
                "it did not measure"
            ) from error
        return EvaluationRecord(total=total, compared=compared) if total.num_examples else None

    def _score(self, group: str, totals: Values) -> Score:
        """Return the score of a group; `ValueError` if the sums cannot be those of a score."""
        # Impossible sums are found here or by `Score` itself.
        num_tokens, num_examples, num_exact = _counts(totals[f"{group} counts"])
        (nll,) = _reals(f"{group} nll", totals)
        # Rounding may leave a sum of zeros slightly below zero.
        if nll < -1e-5:
            raise ValueError(f"a negative log-likelihood of {nll:.6g}")
        margin = None
        if self.of_pairs:
            (margin,) = _reals(f"{group} margin", totals)
        by_label = {}
        if self.labels:
            rows = np.reshape(totals[f"{group} labels"], (-1, 3))
            for label, row in zip(self.labels, rows, strict=True):
                by_label[label] = LabelCounts(*_counts(row))
            # As in the scores that clients send, omit labels that neither occur nor are predicted.
            by_label = {k: c for k, c in by_label.items() if c.num_examples or c.num_predicted}
        return Score(
            max(nll, 0.0),
            num_tokens,
            num_examples,
            num_exact,
            margin=margin,
            by_label=dict(sorted(by_label.items())),
        )


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────


def _real_blocks(name: str, size: int, num_parties: int) -> list[Block]:
    """Return the blocks of unbounded numbers: their integer and fractional parts."""
    whole = count_block(f"{name}, whole", size, num_parties)
    return [whole, Block(name=f"{name}, rest", size=size, bound=1.0)]


def _real_values(name: str, numbers: Sequence[float]) -> dict[str, NDArray[np.float64]]:
    """Return a client's values in these blocks."""
    # Round down, so that fractional parts are in [0, 1) for negative numbers, too.
    whole = [float(math.floor(number)) for number in numbers]
    rest = [number - part for number, part in zip(numbers, whole, strict=True)]
    return {f"{name}, whole": np.array(whole), f"{name}, rest": np.array(rest)}


def _reals(name: str, totals: Values) -> list[float]:
    """Return the sums of the numbers."""
    # Integer parts come back exactly, except for the last bits of the decoding.
    sums = np.rint(totals[f"{name}, whole"]) + totals[f"{name}, rest"]
    return [float(number) for number in sums]


def _counts(values: NDArray[np.float64]) -> list[int]:
    """Return sums of whole numbers; `ValueError` if one is negative."""
    counts = [round(float(value)) for value in values]
    if min(counts, default=0) < 0:
        raise ValueError(f"a count of {min(counts)}")
    return counts
