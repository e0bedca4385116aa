"""What a method is, what it declares, and what it returns. torch only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedmomentum.aggregation.unequal import first_components
from fedmomentum.lowrank import LowRank
from fedmomentum.sums import Matrix


@dataclass(frozen=True, eq=False)
class Aggregate:
    """One module after aggregation: `adapter + residual + carried` is what the method made of the updates.

    Attributes:
        adapter: the next round's adapter, of the rank asked for.
        residual: what the base must absorb now, in the adapter's units; None where the method has none. Dense where
            factors would be larger: the sum of many clients (`sums`).
        carried: what is kept for the next call, in the adapter's units; None where nothing is. Dense as above.
        findings: numbers about this module worth reporting, by name. `dropped_energy` is the squared norm of
            what the method left out of the weighted sum: an inexact method always tells.
    """

    adapter: LowRank
    residual: Matrix | None = None
    carried: Matrix | None = None
    findings: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """Combines the clients' factors of ONE module. Pure: no input or output, no in-place writes, no memory.

    A method is a frozen dataclass whose fields are its settings, so that its `repr` is the record of a run. What
    it asks of training, of the wire and of the byte counts it declares; the values here are those of a method
    that declares nothing: both factors are trained, uploaded and sent, at one rank.
    """

    title: ClassVar[str] = ""
    """Its name in print."""
    paper: ClassVar[str] = ""
    """Authors, title, venue, arXiv id."""
    unequal_ranks: ClassVar[bool] = False
    """Whether clients may have different ranks."""
    best_rank: ClassVar[bool] = False
    """Whether the adapter is the best approximation of the sum at its rank, with no direction that cannot train."""
    shares: ClassVar[str] = "BA"
    """The factors that ever leave a client; any other is personal and stays there for the whole run."""
    fresh: ClassVar[bool] = False
    """Whether the adapter is `factors.fresh_adapter` of a seed that everyone has, and need not be sent."""
    keeps_tail: ClassVar[bool] = False
    """Whether a client of a smaller rank keeps beside its base what its own adapter cannot hold (`localise`)."""
    residual_rank: ClassVar[str] = ""
    """The rank q of what each round sends for the base, in words of r and n clients; empty where there is nothing."""
    reads_base: ClassVar[bool] = False
    """Whether `initialise` reads the base weight."""

    @property
    def exact(self) -> bool:
        """Whether `adapter + residual + carried` is the weighted sum, plus what was carried in."""
        return False

    @property
    def personal(self) -> str:
        """The factors that never leave a client; where there are some, there is no one global model."""
        return "".join(factor for factor in "BA" if factor not in self.shares)

    @property
    def prunes(self) -> bool:
        """Whether clients' ranks can fall during a run: the method has a `next_rank` of its own."""
        return type(self).next_rank is not Method.next_rank

    def trains(self, server_round: int) -> str:
        """The factors that clients train in this round: `BA`, `B` or `A`. What is not trained all clients share."""
        return "BA"

    def uploads(self, server_round: int) -> str:
        """The factors that clients send up: those that they train and share."""
        return "".join(factor for factor in self.trains(server_round) if factor in self.shares)

    def sends(self, server_round: int) -> str:
        """The adapter's factors that clients must be sent after this round; the others they have or can draw."""
        return "BA"

    def uplink_numbers(self, out_size: int, in_size: int, rank: int, server_round: int) -> int:
        """How many numbers a client of this rank sends for one module in this round."""
        return _numbers(self.uploads(server_round), out_size, in_size, rank)

    def downlink_numbers(self, out_size: int, in_size: int, rank: int, residual_rank: int, server_round: int) -> int:
        """How many numbers it is sent after it: the adapter's factors and a residual of rank `residual_rank`."""
        adapter = _numbers(self.sends(server_round), out_size, in_size, rank)
        return adapter + _numbers("BA", out_size, in_size, residual_rank)

    def initialise(self, weight: Tensor | None, fresh: LowRank) -> tuple[LowRank, LowRank | None]:
        """The adapter before the first round, and what the base must absorb so that the model is as it was.

        Args:
            weight: `(out, in)`, the base weight divided by the adapter's scaling; only where `reads_base`.
            fresh: LoRA's own initialisation.

        Returns:
            The adapter, and the change of the base in the adapter's units (None: none).
        """
        return fresh, None

    def weigh(self, weights: Tensor, norms: Callable[[], Tensor]) -> Tensor:
        """The clients' weights in the sum.

        Args:
            weights: `(num_clients,)`, the shares of examples, sum 1.
            norms: gives `(num_clients,)`, each client's `sqrt(sum over modules ||s_i B_i A_i||_F^2)`.

        Returns:
            `(num_clients,)`, positive, sum 1.
        """
        return weights

    def localise(self, adapter: LowRank, rank: int) -> tuple[LowRank, LowRank]:
        """A client's own adapter of `rank`, and the tail that it cannot hold: together the global adapter.

        For every client of a run whose ranks differ, so that all start in one gauge; for none where they are equal.

        Raises:
            ValueError: another rank than the global adapter's, for a method without `unequal_ranks`; a larger one.
        """
        if rank != adapter.rank and not self.unequal_ranks:
            raise ValueError(f"{self.title} needs every client at rank {adapter.rank}; got {rank}")
        return first_components(adapter, rank)

    def penalty(self, modules: Sequence[LowRank]) -> Tensor | None:
        """What a client adds to its training loss, from the live factors of all its modules; None for nothing."""
        return None

    def next_rank(self, rank: int, start: Sequence[LowRank], trained: Sequence[LowRank]) -> int:
        """The rank from 1 to `rank` at which a client goes on, from its modules before and after training.

        For methods with `unequal_ranks` that share both factors. The scaling stays, so that what is left counts as
        it did.
        """
        return rank

    def __call__(
        self,
        updates: Sequence[LowRank],
        weights: Tensor,
        *,
        rank: int,
        reference: LowRank | None = None,
        carried: Matrix | None = None,
        server_round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Aggregate:
        """Aggregate one module.

        Args:
            updates: the clients' factors, each `(out, rank_i)` and `(rank_i, in)`, in effective-weight units
                divided by the output's scaling, so that no scaling appears here. Each look at one may read it from
                disk anew: take them one after the other, and keep none.
            weights: `(num_clients,)`, positive, sum 1.
            rank: the rank of the adapter to return.
            reference: the adapter that the clients were sent; None where there was none (offline).
            carried: what the last round's `Aggregate.carried` held.
            server_round: from 1.
            generator: for methods that draw random numbers.

        Returns:
            The aggregate, in float64 if the updates are, else in float32, on their device.

        Raises:
            ValueError: see `check_updates`.
        """
        ...


def _numbers(factors: str, out_size: int, in_size: int, rank: int) -> int:
    return rank * sum({"B": out_size, "A": in_size}[factor] for factor in factors)


def check_updates(updates: Sequence[LowRank], weights: Tensor, rank: int) -> None:
    """Refuse what no method can aggregate.

    Raises:
        ValueError: no updates; shapes that differ; weights that are not one a client, not positive and finite,
            or do not sum to 1; a rank outside 1..min(out, in); NaN or Inf, naming the client's position.
    """
    if not updates:
        raise ValueError("no updates to aggregate")
    shapes = {update.shape for update in updates}
    if len(shapes) > 1:
        raise ValueError(f"the updates of one module must have one shape; got {[u.shape for u in updates]}")
    if tuple(weights.shape) != (len(updates),):
        raise ValueError(f"one weight a client: got {len(updates)} updates and weights of {tuple(weights.shape)}")
    shares = weights.tolist()
    if not all(0 < share < math.inf for share in shares):
        raise ValueError(f"weights must be positive and finite; got {shares}")
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"weights must sum to 1; they sum to {sum(shares)!r}. Divide them by their sum")
    out_size, in_size = updates[0].shape
    if not 1 <= rank <= min(out_size, in_size):
        raise ValueError(
            f"rank must be from 1 to {min(out_size, in_size)} for a {out_size} x {in_size} matrix; got {rank}"
        )
    wide = torch.promote_types(updates[0].dtype, torch.float32)
    sums = torch.stack([factor.sum(dtype=wide) for update in updates for factor in (update.B, update.A)])
    if bool(torch.isfinite(sums).all()):  # a sum keeps every NaN and Inf, and is the quickest look at all numbers
        return
    for position, update in enumerate(updates):
        for name, factor in (("B", update.B), ("A", update.A)):
            if not bool(torch.isfinite(factor).all()):
                raise ValueError(f"update {position} holds NaN or Inf in its factor {name}; leave that client out")


def adapter_dtype(updates: Sequence[LowRank]) -> torch.dtype:
    """float64 if every update is, else float32: half precision is an input format only."""
    return torch.float64 if all(update.dtype == torch.float64 for update in updates) else torch.float32
