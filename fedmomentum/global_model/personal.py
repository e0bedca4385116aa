"""The factors that a client keeps for itself.

Some methods share one factor and leave the other with each client (`Method.personal_factors`). Such
a run has no single global model, but one model per client. A client's own factors are state that it
carries from round to round; see `client_state` for their files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from msgspec import Meta
from torch import Tensor

from fedmomentum.errors import ModelError
from fedmomentum.global_model.client_state import ClientStateFiles
from fedmomentum.global_model.state_file import StateFile, StateHeader, encode_state, read_state
from fedmomentum.utils.schema import PositiveCount


class _Header(StateHeader, frozen=True, kw_only=True):
    """The header of a file."""

    rank: PositiveCount
    scaling: Annotated[float, Meta(gt=0)]
    mixed: bool


@dataclass(frozen=True, eq=False)
class PersonalFactors(StateFile):
    """A client's own factors after a round.

    Attributes:
        client: The client's name.
        run_id: The run's identifier on the wire.
        server_round: The round of training that produced them.
        rank: The client's rank in that round.
        scaling: The client's `lora_alpha / rank`.
        mixed: Whether the clients' ranks differ, so that all start in the same gauge
            (`client_start`).
        tensors: `<module>.B` or `<module>.A` to the factor, float32, for each module that the
            client adapts.
    """

    KIND: ClassVar[str] = "personal"
    TITLE: ClassVar[str] = "own factors"
    KEY: ClassVar[str] = "personal"
    HEADER: ClassVar[type[StateHeader]] = _Header

    client: str
    run_id: str
    server_round: int
    rank: int
    scaling: float
    mixed: bool
    tensors: Mapping[str, Tensor]

    def copy_into(self, live: Mapping[str, Tensor], *, rank: int, scaling: float) -> None:
        """Copy the factors into the client's live adapter: all of them, or none.

        Args:
            live: `<module>.B` or `<module>.A` to the live tensor, for each factor that stays with
                the client.
            rank: The client's current rank.
            scaling: The client's current scaling.

        Raises:
            ModelError: If they have other modules, shapes, rank or scaling than the live adapter,
                or are not finite.
        """
        name = f"client {self.client}: its own factors after round {self.server_round}"
        if (self.rank, self.scaling) != (rank, scaling):
            raise ModelError(
                f"{name} have rank {self.rank} and scaling {self.scaling:g}; the adapter now has "
                f"rank {rank} and scaling {scaling:g}. Use the [lora] that they were trained with"
            )
        unmatched = sorted(self.tensors.keys() ^ live.keys())
        if unmatched:
            raise ModelError(
                f"{name} and the adapter differ: {unmatched[0]} is in one of them only"
            )
        for key, tensor in self.tensors.items():
            check_factor(tensor, tuple(live[key].shape), f"{name}: {key}")
        with torch.no_grad():
            for key, tensor in self.tensors.items():
                live[key].copy_(tensor)

    # ── files ──

    def encode(self) -> bytes:
        """Return the bytes of their file, which includes a checksum of its content."""
        header = _Header(
            client=self.client,
            run_id=self.run_id,
            round=self.server_round,
            rank=self.rank,
            scaling=self.scaling,
            mixed=self.mixed,
        )
        return encode_state(self.KEY, header, self.tensors)

    @classmethod
    def read(cls, file: Path) -> PersonalFactors:
        """Read the factors in a file.

        Raises:
            ModelError: If it is missing or damaged.
        """
        header, tensors = read_state(file, cls.KEY, _Header, cls.TITLE)
        return cls(
            client=header.client,
            run_id=header.run_id,
            server_round=header.round,
            rank=header.rank,
            scaling=header.scaling,
            mixed=header.mixed,
            tensors=tensors,
        )


def personal_states(store: Path, run_id: str) -> ClientStateFiles[PersonalFactors]:
    """Return the files of the clients' own factors in one run.

    Args:
        store: The run's directory, or a client's private store.
        run_id: The run's identifier on the wire.
    """
    return ClientStateFiles(store, run_id, PersonalFactors)


def check_factor(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Refuse a factor that has another shape or dtype, or is not finite.

    Raises:
        ModelError: If it is refused; the message begins with `name`.
    """
    if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
        raise ModelError(
            f"{name} is {tuple(tensor.shape)} in {tensor.dtype}; wanted {shape} in torch.float32"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"{name} holds NaN or Inf")
