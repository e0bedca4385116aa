"""What a method is, and what it returns. torch only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from fedmomentum.lowrank import LowRank


@dataclass(frozen=True, eq=False)
class Aggregate:
    """One module after aggregation: `adapter + residual + carried` is what the method made of the updates.

    Attributes:
        adapter: the next round's adapter, of the rank asked for.
        residual: what the base must absorb now, in the adapter's units; None where the method has none.
        carried: what is kept for the next round's sum, in the adapter's units; None where nothing is.
        findings: numbers about this module worth reporting, by name.
    """

    adapter: LowRank
    residual: LowRank | None = None
    carried: LowRank | None = None
    findings: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """Combines the clients' factors of ONE module. Pure: no input or output, no in-place writes, no memory.

    A method is a frozen dataclass whose fields are its settings, so that its `repr` is the record of a run.
    """

    exact: ClassVar[bool]
    """Whether `adapter + residual + carried` is the exact weighted sum."""

    def __call__(
        self,
        updates: Sequence[LowRank],
        weights: Tensor,
        *,
        rank: int,
        reference: LowRank | None = None,
        carried: LowRank | None = None,
        server_round: int = 1,
        generator: torch.Generator | None = None,
    ) -> Aggregate:
        """Aggregate one module.

        Args:
            updates: the clients' factors, each `(out, rank_i)` and `(rank_i, in)`, in effective-weight units
                divided by the output's scaling, so that no scaling appears here.
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
    if not bool(torch.isfinite(weights).all()) or bool((weights <= 0).any()):
        raise ValueError(f"weights must be positive and finite; got {weights.tolist()}")
    if abs(float(weights.sum()) - 1) > 1e-6:
        raise ValueError(f"weights must sum to 1; they sum to {float(weights.sum())!r}. Divide them by their sum")
    out_size, in_size = updates[0].shape
    if not 1 <= rank <= min(out_size, in_size):
        raise ValueError(
            f"rank must be from 1 to {min(out_size, in_size)} for a {out_size} x {in_size} matrix; got {rank}"
        )
    for position, update in enumerate(updates):
        for name, factor in (("B", update.B), ("A", update.A)):
            if not bool(torch.isfinite(factor).all()):
                raise ValueError(f"update {position} holds NaN or Inf in its factor {name}; leave that client out")


def adapter_dtype(updates: Sequence[LowRank]) -> torch.dtype:
    """float64 if every update is, else float32: half precision is an input format only."""
    return torch.float64 if all(update.dtype == torch.float64 for update in updates) else torch.float32
