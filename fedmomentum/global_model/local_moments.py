"""The optimizer moments that a client keeps for itself from round to round.

They belong to the factors that the client trained. In its next round, it starts from different
factors, those of the global adapter; `start_moments` carries the moments over to them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from fedmomentum.aggregation.moments import Moments, carry_moments
from fedmomentum.errors import ModelError, PayloadError
from fedmomentum.global_model.shared_moments import decode_moments, encode_moments
from fedmomentum.global_model.state_file import StateFile, StateHeader, encode_state, read_state
from fedmomentum.linalg.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class LocalMoments(StateFile):
    """A client's own moments after a round.

    Attributes:
        client: The client's name.
        run_id: The run's identifier on the wire.
        server_round: The round of training that produced them.
        factors: Module to the trained factors, float32.
        moments: `<module>.B` or `<module>.A` to the moments, for the factors that were trained.
    """

    KIND: ClassVar[str] = "optimizer"
    TITLE: ClassVar[str] = "optimizer moments"
    KEY: ClassVar[str] = "moments"

    client: str
    run_id: str
    server_round: int
    factors: Mapping[str, LowRank]
    moments: Mapping[str, Moments]

    def start_moments(self, live: Mapping[str, LowRank]) -> dict[str, Moments]:
        """Return the moments in the coordinates of the factors that the client starts from.

        Args:
            live: Module to these factors, with the same rank or, after pruning, a smaller one.

        Raises:
            ModelError: If they have other modules or shapes than those that were trained.
        """
        name = f"client {self.client}: its optimizer moments after round {self.server_round}"
        unmatched = sorted(self.factors.keys() ^ live.keys())
        if unmatched:
            raise ModelError(
                f"{name} and the adapter differ: {unmatched[0]} is in one of them only"
            )
        started = {}
        for module, after in live.items():
            before = self.factors[module]
            if before.shape != after.shape or before.rank < after.rank:
                raise ModelError(
                    f"{name}: {module} was {before.shape} of rank {before.rank}; the adapter now "
                    f"is {after.shape} of rank {after.rank}. Use the [lora] that it was trained "
                    "with"
                )
            # A method that prunes keeps the first components.
            pruned = LowRank(before.B[:, : after.rank], before.A[: after.rank])
            moments = self._of_module(module, after.rank)
            for kind, moment in carry_moments(moments, pruned, after).items():
                started[f"{module}.{kind}"] = moment
        return started

    def _of_module(self, module: str, rank: int) -> dict[str, Moments]:
        """Return the moments of a module's first `rank` components."""
        result = {}
        if (moment := self.moments.get(f"{module}.B")) is not None:
            second = None if moment.second is None else moment.second[:, :rank]
            result["B"] = Moments(moment.first[:, :rank], second, moment.step)
        if (moment := self.moments.get(f"{module}.A")) is not None:
            second = None if moment.second is None else moment.second[:rank]
            result["A"] = Moments(moment.first[:rank], second, moment.step)
        return result

    # ── files ──

    def encode(self) -> bytes:
        """Return the bytes of their file, which includes a checksum of its content."""
        header = StateHeader(client=self.client, run_id=self.run_id, round=self.server_round)
        tensors = encode_moments(self.moments)
        for module, matrix in self.factors.items():
            tensors[f"{module}.B"] = matrix.B
            tensors[f"{module}.A"] = matrix.A
        return encode_state(self.KEY, header, tensors)

    @classmethod
    def read(cls, file: Path) -> LocalMoments:
        """Read the moments in a file.

        Raises:
            ModelError: If it is missing or damaged.
        """
        header, tensors = read_state(file, cls.KEY, StateHeader, cls.TITLE)
        factors = {}
        for key in sorted(tensors):
            module, _, kind = key.rpartition(".")
            if kind == "A" and f"{module}.B" in tensors:
                factors[module] = LowRank(tensors[f"{module}.B"], tensors[key])
        try:
            moments = decode_moments(*_without_factors(tensors, factors), str(file))
        except PayloadError as error:
            raise ModelError(str(error)) from error
        return cls(
            client=header.client,
            run_id=header.run_id,
            server_round=header.round,
            factors=factors,
            moments=moments,
        )


def _without_factors(
    tensors: Mapping[str, Tensor], factors: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Return the tensors of the moments, and the shapes of the factors that have moments."""
    remaining = dict(tensors)
    shapes = {}
    for module in factors:
        for kind in "BA":
            key = f"{module}.{kind}"
            factor = remaining.pop(key)
            if f"{key}.step" in tensors:
                shapes[key] = (factor.shape[0], factor.shape[1])
    return remaining, shapes
