"""A round's sums over whole adapters: what is summed, within what bounds, and what results.

Every block of a sum has a public bound, derived from two limits set before the round: a client's
maximum number of examples, and the maximum change of any element of its adapter. A client within
both limits is within all bounds.

::

    layout.first_blocks()                              server   plan of sum 1
    layout.first_values(changes, ...)                  client   its values
    layout.mean_changes(totals)                        server   sent to the clients of sum 1
    layout.second_blocks(), layout.second_values(...)           the same for sum 2
    layout.stand_ins(means, totals)                    server   adapters for `aggregate_updates`

After a round, a client keeps `product_from_sums.next_feedback` for each module, computed with the
layout's `feedback_limit`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmomentum.aggregation.product_from_sums import (
    ClientChange,
    FirstTerms,
    MeanChange,
    MeanChanges,
    combine_sums,
    first_terms,
    mean_change,
    second_terms,
    sketch_matrix,
    stand_ins,
)
from fedmomentum.errors import AdapterError, DataError
from fedmomentum.linalg.low_rank import CORE_DTYPE
from fedmomentum.linalg.matrix import Matrix
from fedmomentum.lora.adapter import Adapter
from fedmomentum.secure_sum.fixed_point import (
    count_block,
    largest_integer,
    rounding_variance,
)
from fedmomentum.secure_sum.messages import Block

# Block name to its elements, `(size,)`, float64.
Values = Mapping[str, Tensor]
EXAMPLES = "examples"
# Rounding for transmission may lengthen the unit columns of Q by up to this factor.
Q_MARGIN = 1.001


@dataclass(frozen=True, eq=False)
class ClientChanges:
    """How one client changed its adapter in a round.

    Attributes:
        num_examples: Its number of examples.
        modules: Module to its factors' change, with feedback in units of the adapter's scaling.
        saved: Name of each fully trained tensor to its change.
    """

    num_examples: int
    modules: Mapping[str, ClientChange]
    saved: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class AdapterSums:
    """The layout of a round's sums, shared by the server and all clients.

    Attributes:
        start: The adapter that all clients start from.
        factors: The factors that are summed, `BA`, `B` or `A`; any other stays as in `start`.
        sketch_ranks: The width of the sketches, in multiples of the adapter's rank; 0 for methods
            that need only mean factors. Unless both factors are summed, there is no cross term.
        num_parties: The number of parties in the sums.
        max_examples: The maximum number of examples per client.
        max_change: The maximum absolute change of any element of a factor or saved tensor.
        expected_examples: Approximate total number of examples over all clients.
        seed: Seed of the round's sketches.

    Raises:
        AdapterError: If a sum over that many examples would not fit.
    """

    start: Adapter
    factors: str
    sketch_ranks: int
    num_parties: int
    max_examples: int
    max_change: float
    expected_examples: int
    seed: int

    def __post_init__(self) -> None:
        """Check that the counts of examples fit."""
        largest = largest_integer(self.num_parties)
        if not 1 <= self.max_examples <= largest:
            raise AdapterError(
                f"a client has at most {self.max_examples} examples, and a sum over "
                f"{self.num_parties} clients counts 1 to {largest} of each; set a lower bound"
            )

    @property
    def has_second_sum(self) -> bool:
        """Whether there is a cross term to sum."""
        return self.factors == "BA" and self.sketch_ranks > 0

    def width(self, module: str) -> int:
        """Return the number of columns of a module's sketch."""
        matrix = self.start.modules[module]
        return min(self.sketch_ranks * matrix.rank, *matrix.shape) if self.has_second_sum else 0

    # ── client ──

    def changes(
        self, trained: Adapter, num_examples: int, feedback: Mapping[str, Matrix]
    ) -> ClientChanges:
        """Return how a client changed the adapter that the round started with.

        Args:
            trained: The adapter that it trained.
            num_examples: Its number of examples.
            feedback: Module to the part of its earlier cross terms that the model still lacks, in
                units of the adapter's scaling.

        Raises:
            DataError: If there are too many examples.
            AdapterError: If the adapter's modules or shapes differ from the start's.
        """
        if not 1 <= num_examples <= self.max_examples:
            # A `DataError`, because its message, and so the number, never leaves the client.
            raise DataError(
                f"this client has {num_examples} examples, and the round's sums count 1 to "
                f"{self.max_examples} of a client; it takes no part in them"
            )
        modules = {}
        for module, begun in self.start.modules.items():
            try:
                modules[module] = ClientChange.of(
                    begun, trained.modules[module], num_examples, feedback.get(module)
                )
            except (KeyError, ValueError) as error:
                raise AdapterError(f"{trained.name}: module {module}: {error}") from error
        saved = {}
        for name, tensor in self.start.saved.items():
            saved[name] = trained.saved[name].to(CORE_DTYPE) - tensor.to(CORE_DTYPE)
        return ClientChanges(num_examples, modules, saved)

    def first_values(self, changes: ClientChanges) -> Values:
        """Return a client's values in the first sum, by block."""
        values = {EXAMPLES: torch.tensor([changes.num_examples], dtype=CORE_DTYPE)}
        for module, change in changes.modules.items():
            omega = self._omega(module)
            limit = self._sketch_bound(module) / 2
            terms = first_terms(change, omega, self.expected_examples, limit)
            if "B" in self.factors:
                values[f"B {module}"] = _flat(terms.b)
            if "A" in self.factors:
                values[f"A {module}"] = _flat(terms.a)
            if self.has_second_sum:
                values[f"sketch {module}"] = _flat(terms.sketch)
        for name, difference in changes.saved.items():
            values[f"saved {name}"] = _flat(changes.num_examples * difference)
        return values

    def second_values(self, changes: ClientChanges, means: MeanChanges) -> Values:
        """Return a client's values in the second sum, by block."""
        values = {}
        # In units of examples, as in the first sum.
        for module, change in changes.modules.items():
            limit = self.feedback_limit(module)
            values[f"cross {module}"] = _flat(second_terms(change, means.modules[module], limit))
        return values

    def feedback_limit(self, module: str) -> float:
        """Return the limit on each element of the feedback in the second sum."""
        return self._cross_bound(module) / 2

    # ── server ──

    def first_blocks(self) -> list[Block]:
        """Return the blocks of the first sum."""
        # A change of at most `max_change`, times a weight of at most `max_examples`.
        blocks = [count_block(EXAMPLES, 1, self.num_parties)]
        bound = self.max_examples * self.max_change
        for module, matrix in self.start.modules.items():
            if "B" in self.factors:
                blocks.append(Block(name=f"B {module}", size=matrix.B.numel(), bound=bound))
            if "A" in self.factors:
                blocks.append(Block(name=f"A {module}", size=matrix.A.numel(), bound=bound))
            if self.has_second_sum:
                size = matrix.shape[0] * self.width(module)
                sketch_bound = self._sketch_bound(module)
                blocks.append(Block(name=f"sketch {module}", size=size, bound=sketch_bound))
        for name, tensor in self.start.saved.items():
            blocks.append(Block(name=f"saved {name}", size=tensor.numel(), bound=bound))
        return blocks

    def rounding(self, totals: Values, num_survivors: int) -> float:
        """Return the rounding error of the summed adapter changes, relative to their norm.

        `sqrt(sum over elements of E[error^2]) / norm(sum_i N_i change_i)`, at most 1; 1 means that
        rounding has swamped the changes.

        Args:
            totals: The values of the first sum.
            num_survivors: The number of clients whose changes are included.
        """
        squared_error = 0.0
        squared_norm = 0.0
        for block in self.first_blocks():
            if block.name.startswith((EXAMPLES, "sketch ")):
                continue
            variance = rounding_variance(block, self.num_parties, num_survivors)
            squared_error += block.size * variance
            squared_norm += float(totals[block.name].square().sum())
        if squared_norm == 0:
            return 1.0
        return min(1.0, math.sqrt(squared_error / squared_norm))

    def second_blocks(self) -> list[Block]:
        """Return the blocks of the second sum."""
        blocks = []
        for module, matrix in self.start.modules.items():
            size = self.width(module) * matrix.shape[1]
            bound = self._cross_bound(module)
            blocks.append(Block(name=f"cross {module}", size=size, bound=bound))
        return blocks

    def mean_changes(self, totals: Values, dtype: torch.dtype = torch.float32) -> MeanChanges:
        """Return the outcome of the first sum.

        Args:
            totals: The sum's values.
            dtype: The dtype for transmission; everyone computes with values rounded to it.
        """
        num_examples = round(float(totals[EXAMPLES][0]))

        def rounded(tensor: Tensor) -> Tensor:
            return tensor.to(dtype).to(CORE_DTYPE)

        # Whatever was not summed has not changed.
        modules = {}
        for module, matrix in self.start.modules.items():
            zero_B = torch.zeros(matrix.B.shape, dtype=CORE_DTYPE)
            zero_A = torch.zeros(matrix.A.shape, dtype=CORE_DTYPE)
            zero_sketch = torch.zeros(matrix.shape[0], self.width(module), dtype=CORE_DTYPE)
            total = FirstTerms(
                num_examples,
                _shaped(totals, f"B {module}", zero_B),
                _shaped(totals, f"A {module}", zero_A),
                _shaped(totals, f"sketch {module}", zero_sketch),
            )
            mean = mean_change(total, self._omega(module))
            modules[module] = MeanChange(
                num_examples, rounded(mean.b), rounded(mean.a), rounded(mean.Q)
            )
        saved = {}
        for name, tensor in self.start.saved.items():
            total_change = _shaped(totals, f"saved {name}", tensor.to(CORE_DTYPE))
            saved[name] = rounded(total_change / num_examples)
        return MeanChanges(num_examples, modules, saved)

    def stand_ins(
        self, means: MeanChanges, totals: Values | None
    ) -> tuple[list[Adapter], list[float]]:
        """Return stand-ins for the clients' adapters and weights, to pass to `aggregate_updates`.

        Args:
            means: The outcome of the first sum.
            totals: The values of the second sum; None if there was none.
        """
        num_pairs = self.sketch_ranks if totals is not None else 0
        # Every module gets the same number of stand-ins: an adapter has one update per module.
        by_module = {}
        weights = torch.ones(1)
        for module, begun in self.start.modules.items():
            mean = means.modules[module]
            second = None
            if totals is not None:
                shape = (self.width(module), begun.shape[1])
                second = _shaped(totals, f"cross {module}", torch.zeros(shape))
            factors, cross = combine_sums(begun, mean, second)
            by_module[module], weights = stand_ins(factors, cross, num_pairs)
        # In every stand-in, fully trained tensors equal their mean.
        saved = {}
        for name, tensor in self.start.saved.items():
            saved[name] = (tensor.to(CORE_DTYPE) + means.saved[name]).to(tensor.dtype)
        adapters = []
        for index in range(len(weights)):
            modules = {module: updates[index] for module, updates in by_module.items()}
            name = f"stand-in {index + 1}"
            adapters.append(replace(self.start, modules=modules, saved=saved, name=name))
        return adapters, weights.tolist()

    # ── bounds ──

    def _omega(self, module: str) -> Tensor:
        in_size = self.start.modules[module].shape[1]
        return sketch_matrix(module, in_size, self.width(module), self.seed)

    def _sketch_bound(self, module: str) -> float:
        """Bound the sketch's elements: half for the client's own product, half for feedback."""
        if not self.has_second_sum:
            return math.inf
        rank = self.start.modules[module].rank
        # |(b a omega)_ij| <= sum over k of |b_ik| |a_k| |omega_j|, elementwise.
        column_sum = float(self._omega(module).abs().sum(0).max())
        return 2 * self.max_examples * rank * self.max_change**2 * column_sum

    def _cross_bound(self, module: str) -> float:
        """Bound the second sum's elements: half for the own cross term, half for feedback."""
        matrix = self.start.modules[module]
        # Deviations from a mean are at most twice as large, and the columns of Q are unit vectors.
        column = 4 * matrix.rank * self.max_change**2 * math.sqrt(matrix.shape[0])
        return 2 * Q_MARGIN * self.max_examples * column


def _flat(tensor: Tensor) -> Tensor:
    return tensor.to(CORE_DTYPE).reshape(-1)


def _shaped(values: Values, block: str, like: Tensor) -> Tensor:
    """Return a block in the shape of `like`, or `like` itself if the block was not summed."""
    if block not in values:
        return like
    return values[block].reshape(like.shape)
