"""Optimizer moments in a masked sum, so that all clients continue from the same mean.

The row and column means of the second moments span many orders of magnitude, but a sum's integers
have a fixed step size. So each number comes in two parts: a whole number of coarse steps, which is
summed exactly, and the remainder. Their public limits follow from gradient clipping. The first
moments follow from the mean movement, which is in the sum anyway, and the learning rates.

All clients make the same number of steps. Otherwise movements would have to be summed twice, with
different weights, and anyone who knows one of three clients could use both sums to tell the other
two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.errors import ConfigError, DataError
from fedmomentum.linalg.low_rank import CORE_DTYPE
from fedmomentum.secure_sum.fixed_point import count_block
from fedmomentum.secure_sum.messages import Block

if TYPE_CHECKING:
    from fedmomentum.aggregation.product_from_sums import MeanChanges
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.lora.adapter import Adapter

# Block name to its elements, `(size,)`, float64.
Values = Mapping[str, Tensor]
COARSE_STEPS = 2**24
"""A limit in coarse steps; small enough that a sum over a hundred parties fits."""
LEARNING_RATES = "learning rates"


@dataclass(frozen=True)
class MomentLimits:
    """Public limits on what one client reports about its optimizer.

    Attributes:
        second_total: The maximum sum of all second moments after the round.
        learning_rate_sum: The maximum sum of the learning rates over a round's steps.
    """

    second_total: float
    learning_rate_sum: float


@dataclass(frozen=True, eq=False)
class MeanMovement:
    """How the clients moved one factor: weighted means over the clients, in float64.

    Attributes:
        displacement: `(m, n)`, mean movement per unit of summed learning rates.
        rows: `(m,)`, mean of the second moment's row means; None for optimizers without one.
        columns: `(n,)`, mean of its column means.
        num_steps: Mean number of steps, rounded.
    """

    displacement: Tensor
    rows: Tensor | None
    columns: Tensor | None
    num_steps: int


@dataclass(frozen=True)
class ClientMoments:
    """What one client reports about its optimizer after a round.

    Attributes:
        means: `<module>.<factor>.rows` and `.columns` to the means of the second moments.
        num_steps: The number of steps.
        learning_rate_sum: The sum of their learning rates.
    """

    means: Mapping[str, Tensor]
    num_steps: int
    learning_rate_sum: float


@dataclass(frozen=True)
class MomentSums:
    """The layout of the moments in a round's first sum, shared by clients and server.

    Attributes:
        shapes: `<module>.<factor>` to the shape of each trained factor.
        has_second: Whether the optimizer keeps second moments.
        num_steps: The number of steps of each client.
        num_parties: The number of parties in the sum.
        max_examples: The maximum number of examples per client.
        limits: Limits on what a client reports.
    """

    shapes: Mapping[str, tuple[int, int]]
    has_second: bool
    num_steps: int
    num_parties: int
    max_examples: int
    limits: MomentLimits

    @classmethod
    def of(
        cls,
        start: Adapter,
        factors: str,
        training: LocalTraining,
        *,
        num_parties: int,
        max_examples: int,
        limits: MomentLimits,
    ) -> MomentSums:
        """Return the layout for a round.

        Args:
            start: The adapter that all clients start from.
            factors: The factors that are trained, `BA`, `B` or `A`.
            training: The round's hyperparameters.
            num_parties: The number of parties in the sum.
            max_examples: The maximum number of examples per client.
            limits: Limits on what a client reports.

        Raises:
            ConfigError: If clients make different numbers of steps.
        """
        if training.local_steps is None:
            raise ConfigError("moments are summed where all clients make the same number of steps")
        return cls(
            shapes=factor_shapes(start, factors),
            has_second=training.arguments.get("optim") != "sgd",
            num_steps=training.local_steps,
            num_parties=num_parties,
            max_examples=max_examples,
            limits=limits,
        )

    def blocks(self) -> list[Block]:
        """Return the blocks of the sum."""
        blocks = []
        for name, (size, _) in self._numbers().items():
            blocks.append(count_block(_coarse_block(name), size, self.num_parties))
            blocks.append(Block(name=_fine_block(name), size=size, bound=0.5))
        return blocks

    def values(self, num_examples: int, moments: ClientMoments) -> Values:
        """Return a client's values, by block.

        Args:
            num_examples: Its number of examples.
            moments: What it reports about its optimizer.

        Raises:
            DataError: If a value exceeds its limit, or the number of steps is wrong.
        """
        if not (moments.num_steps == self.num_steps and moments.learning_rate_sum > 0):
            raise DataError(
                f"this client made {moments.num_steps} steps with learning rates of "
                f"{moments.learning_rate_sum:g} in all; wanted {self.num_steps} steps, to share "
                "the optimizer's moments"
            )
        numbers = {LEARNING_RATES: torch.tensor([moments.learning_rate_sum], dtype=CORE_DTYPE)}
        if self.has_second:
            for key in self.shapes:
                numbers[f"rows {key}"] = moments.means[f"{key}.rows"]
                numbers[f"columns {key}"] = moments.means[f"{key}.columns"]
        # A weight of at most `max_examples`, times a number within its limit.
        share = num_examples / self.max_examples
        values = {}
        for name, (_, limit) in self._numbers().items():
            scaled = numbers[name].to(CORE_DTYPE).reshape(-1) / limit
            if not float(scaled.abs().max()) <= 1:
                raise DataError(f"{name} of this client's optimizer are beyond {limit:.6g}")
            coarse = scaled * share * COARSE_STEPS
            values[_coarse_block(name)] = coarse.round()
            values[_fine_block(name)] = coarse - coarse.round()
        return values

    def means(
        self, totals: Values, num_examples: int, changes: Mapping[str, Tensor]
    ) -> dict[str, MeanMovement]:
        """Return the means over the clients, by factor.

        Args:
            totals: The sum's values.
            num_examples: The total number of examples of the clients included.
            changes: `<module>.<factor>` to the mean movement.
        """
        means = {}
        for name, (_, limit) in self._numbers().items():
            coarse = totals[_coarse_block(name)].round() + totals[_fine_block(name)]
            means[name] = coarse * (limit * self.max_examples / COARSE_STEPS / num_examples)
        movements = {}
        for key in self.shapes:
            displacement = changes[key].to(CORE_DTYPE) / float(means[LEARNING_RATES])
            rows = None
            columns = None
            if self.has_second:
                # Under masks, nobody can see whether a client's contribution was negative.
                rows = means[f"rows {key}"].clamp(min=0)
                columns = means[f"columns {key}"].clamp(min=0)
            movements[key] = MeanMovement(displacement, rows, columns, self.num_steps)
        return movements

    def _numbers(self) -> dict[str, tuple[int, float]]:
        """Return name to count and magnitude limit, for all values in the sum."""
        limits = self.limits
        numbers = {LEARNING_RATES: (1, limits.learning_rate_sum)}
        for key, (num_rows, num_columns) in self.shapes.items():
            if self.has_second:
                # A row's mean is its sum, at most the total, over its length.
                numbers[f"rows {key}"] = (num_rows, limits.second_total / num_columns)
                numbers[f"columns {key}"] = (num_columns, limits.second_total / num_rows)
        return numbers


def factor_shapes(adapter: Adapter, kinds: str) -> dict[str, tuple[int, int]]:
    """Return `<module>.<factor>` to the factor's shape."""
    shapes = {}
    for module, matrix in adapter.modules.items():
        out_size, in_size = matrix.shape
        for kind in kinds:
            is_B = kind == "B"
            shapes[f"{module}.{kind}"] = (out_size, matrix.rank) if is_B else (matrix.rank, in_size)
    return shapes


def changes_by_factor(means: MeanChanges) -> dict[str, Tensor]:
    """Return `<module>.<factor>` to the factor's mean movement."""
    changes = {}
    for module, change in means.modules.items():
        changes[f"{module}.B"] = change.b
        changes[f"{module}.A"] = change.a
    return changes


def _coarse_block(name: str) -> str:
    return f"{name}, coarse steps"


def _fine_block(name: str) -> str:
    return f"{name}, rest"
