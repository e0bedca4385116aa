"""`Plan`: what a run will cost, estimated before it starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a run will cost, estimated before it starts.

    Bytes are upper estimates; `metrics.jsonl` has the real ones.

    Attributes:
        model: the base's name.
        num_parameters: of the base.
        num_trained: of the adapter.
        num_clients: parties.
        num_rounds: rounds.
        method: its `repr`.
        uplink_bytes: per client and round.
        downlink_bytes: per client and round: the adapter and the most the residual can be.
        memory_bytes: of this process, about.
        disk_bytes: of the run directory, at most.
        warnings: what the user should know before it starts.
    """

    model: str
    num_parameters: int
    num_trained: int
    num_clients: int
    num_rounds: int
    method: str
    uplink_bytes: int
    downlink_bytes: int
    memory_bytes: int
    disk_bytes: int
    warnings: tuple[str, ...]
