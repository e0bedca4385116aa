"""The interface of a method: what it declares, receives and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedmomentum.aggregation.checks import check_equal_ranks, check_frozen_factor, check_updates
from fedmomentum.linalg.matrix import Matrix, rank_bound

if TYPE_CHECKING:
    from fedmomentum.aggregation.client_updates import ClientUpdates
    from fedmomentum.linalg.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class ModuleAggregate:
    """One module after aggregation: `adapter + residual + carried` stands for the weighted sum.

    All three are in units of the combined adapter: its scaling is not included.

    Attributes:
        adapter: The next round's adapter, of the requested rank.
        residual: What the base weights absorb now; None if the method has none. Dense if factors
            would be larger, as with many clients.
        carried: What is carried into the next round's call; None if nothing is. Dense as above.
        findings: Scalars to report about this module, by name. `dropped_energy` is the squared
            Frobenius norm of what the method left out of the weighted sum; every inexact method
            reports it.
    """

    adapter: LowRank
    residual: Matrix | None = None
    carried: Matrix | None = None
    findings: Mapping[str, float] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> ModuleAggregate:
        """Return the aggregate cast to `dtype`, dropping a carried matrix of rank 0."""
        residual = self.residual
        carried = self.carried
        if residual is not None:
            residual = residual.to(dtype)
        if carried is not None:
            carried = carried.to(dtype) if rank_bound(carried) else None
        return ModuleAggregate(self.adapter.to(dtype), residual, carried, self.findings)


@dataclass(frozen=True, eq=False)
class AggregationContext:
    """What a method may know of one module besides the clients' updates.

    Attributes:
        rank: The rank of the adapter to return.
        reference: The adapter that the clients started from; None if there was none (offline).
        carried: What the last round's `ModuleAggregate.carried` contained.
        server_round: Number of the round, from 1.
        seed: Seed for the random numbers of this call.
    """

    rank: int
    reference: LowRank | None = None
    carried: Matrix | None = None
    server_round: int = 1
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Return a new CPU generator seeded with `seed`; create one per call and pass it on."""
        return torch.Generator().manual_seed(self.seed)


class Method(ABC):
    """Combines the clients' factors of ONE module.

    A method is pure: no I/O, no state, no in-place writes. It is a frozen dataclass whose fields
    are its hyperparameters, so its `repr` identifies it in the record of a run. It implements
    `combine`, the formula; callers use `aggregate`, which validates the updates and casts the
    result.

    A method declares what it needs from training, transport and cost estimates. The defaults
    here: both factors are trained, uploaded and sent, all at one rank.
    """

    title: ClassVar[str] = ""
    """Its display name."""
    paper: ClassVar[str] = ""
    """Authors, title, venue, arXiv id."""
    unequal_ranks: ClassVar[bool] = False
    """Whether clients may have different ranks; if not, `aggregate` rejects them."""
    best_rank: ClassVar[bool] = False
    """Whether the adapter is the best approximation at its rank, and every direction can train."""
    shared_factors: ClassVar[str] = "BA"
    """The factors that clients share; any other is personal and stays with its client."""
    fresh: ClassVar[bool] = False
    """Whether the adapter is a `fresh_adapter` from a seed every client has, so it is not sent."""
    keeps_tail: ClassVar[bool] = False
    """Whether a client of smaller rank adds to its base what does not fit into its adapter."""
    residual_rank: ClassVar[str] = ""
    """The rank q of what each round sends for the base, in terms of r and n; "" for none."""
    lighter_residual: ClassVar[str] = ""
    """How its settings make the residual smaller, as advice to the user; "" if they cannot."""
    shares_moments: ClassVar[bool] = False
    """Whether clients share the optimizer's moments unless the configuration says otherwise. In the
    papers, the optimizer is fresh in every round."""
    reads_base: ClassVar[bool] = False
    """Whether `initialize` needs the base weight."""
    depends_on: ClassVar[str] = "updates"
    """What its result depends on: `updates`, each client's update; `product`, the mean factors and
    the mean product; `factors`, the mean factors alone. Sums over the clients yield the latter two,
    so only `updates` methods cannot be used with secure aggregation."""

    @property
    def exact(self) -> bool:
        """Whether `adapter + residual + carried` is the weighted sum plus what was carried in."""
        return False

    @property
    def personal_factors(self) -> str:
        """The factors that never leave a client; if there are any, there is no global model."""
        return "".join(factor for factor in "BA" if factor not in self.shared_factors)

    @property
    def prunes(self) -> bool:
        """Whether clients' ranks can shrink during a run: the method overrides `next_rank`."""
        return type(self).next_rank is not Method.next_rank

    def trained_factors(self, server_round: int) -> str:
        """Return the factors that clients train in this round, `BA`, `B` or `A`.

        A frozen factor must be the same for all clients; `aggregate` rejects any that differ.
        """
        return "BA"

    def uploaded_factors(self, server_round: int) -> str:
        """Return the factors that clients upload: those they both train and share."""
        return "".join(
            factor for factor in self.trained_factors(server_round) if factor in self.shared_factors
        )

    def sent_factors(self, server_round: int) -> str:
        """Return the factors of the adapter that clients must be sent after this round."""
        return "BA"

    def max_residual_rank(self, rank: int, num_updates: int) -> int:
        """Return the largest rank that a round's residual can have: by default, that of the sum.

        Args:
            rank: The rank of the adapter and of the updates.
            num_updates: Number of updates in the sum.

        Returns:
            The rank; 0 if the method has no residual.
        """
        return num_updates * rank if self.residual_rank else 0

    def num_uplink_parameters(
        self, out_size: int, in_size: int, rank: int, server_round: int
    ) -> int:
        """Return how many parameters a client of this rank uploads for one module."""
        return num_factor_parameters(self.uploaded_factors(server_round), out_size, in_size, rank)

    def num_downlink_parameters(
        self, out_size: int, in_size: int, rank: int, residual_rank: int, server_round: int
    ) -> int:
        """Return how many parameters are sent to a client for one module: adapter and residual."""
        adapter = num_factor_parameters(self.sent_factors(server_round), out_size, in_size, rank)
        return adapter + num_factor_parameters("BA", out_size, in_size, residual_rank)

    def initialize(self, weight: Tensor | None, fresh: LowRank) -> tuple[LowRank, LowRank | None]:
        """Return the adapter before round 1, and the change to the base that compensates for it.

        Args:
            weight: `(out, in)`, the base weight divided by the adapter's scaling; given only if
                `reads_base`.
            fresh: LoRA's own initialization.

        Returns:
            The adapter, and the change to the base in the adapter's units; None for no change.
        """
        return fresh, None

    def client_weights(self, weights: Tensor, norms: Callable[[], Tensor]) -> Tensor:
        """Return the clients' weights in the sum.

        Args:
            weights: `(num_clients,)`, each client's fraction of the examples, summing to 1.
            norms: Computes `(num_clients,)`, each client's
                `sqrt(sum over modules ||s_i B_i A_i||_F^2)`.

        Returns:
            `(num_clients,)`, positive, summing to 1.
        """
        return weights

    def client_adapter(self, adapter: LowRank, rank: int) -> tuple[LowRank, LowRank]:
        """Split the global adapter into a client's adapter of `rank` and the tail beyond it.

        In a run with mixed ranks, called for every client, so that all start in one gauge;
        otherwise never called.

        Raises:
            ValueError: If `rank` exceeds the global adapter's, or differs from it for a method
                without `unequal_ranks`.
        """
        if rank != adapter.rank and not self.unequal_ranks:
            raise ValueError(f"{self.title} needs every client at rank {adapter.rank}; got {rank}")
        return adapter.split_rank(rank)

    def penalty(self, modules: Sequence[LowRank]) -> Tensor | None:
        """Return a penalty that clients add to their loss, from their live factors, or None."""
        return None

    def next_rank(self, rank: int, start: Sequence[LowRank], trained: Sequence[LowRank]) -> int:
        """Return a client's rank in the next round, from 1 to `rank`.

        For methods with `unequal_ranks` that share both factors. The scaling does not change with
        the rank, so the remaining components keep their effect.

        Args:
            rank: The client's rank in this round.
            start: Its modules before training.
            trained: Its modules after training.
        """
        return rank

    def aggregate(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Validate the updates, combine them, and cast the result to `updates.dtype`.

        Raises:
            ValueError: If no method could aggregate the updates (`check_updates`), if ranks differ
                from `context.rank` without `unequal_ranks`, or if a factor that is frozen in this
                round differs between clients.
        """
        # The method's declarations determine which updates to reject.
        check_updates(updates, context.rank)
        if not self.unequal_ranks:
            check_equal_ranks(self.title, updates, context.rank)
        for factor in "BA":
            if factor not in self.trained_factors(context.server_round):
                check_frozen_factor(self.title, updates, factor)
        return self.combine(updates, context).to(updates.dtype)

    @abstractmethod
    def combine(self, updates: ClientUpdates, context: AggregationContext) -> ModuleAggregate:
        """Combine valid updates of one module; the result may be in float64.

        Raises:
            ValueError: If the method cannot combine these updates in this context.
        """


def num_factor_parameters(factors: str, out_size: int, in_size: int, rank: int) -> int:
    """Return the number of parameters of some of the factors `BA` of one module."""
    sizes = {"B": out_size, "A": in_size}
    return rank * sum(sizes[factor] for factor in factors)
