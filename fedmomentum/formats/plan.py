"""`Plan`: what a run will cost, estimated before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MemoryUse:
    """Estimated bytes of memory in each phase of a run.

    Attributes:
        at_rest: The model with its adapter, between tasks.
        loading: While the model is loaded.
        training: At the peak of a training step.
        evaluating: At the peak of an evaluation batch.
        aggregating: While the server aggregates, in the same process.
    """

    at_rest: int
    loading: int
    training: int
    evaluating: int
    aggregating: int

    @property
    def peak(self) -> int:
        """The maximum over all phases."""
        return max(self.at_rest, self.loading, self.training, self.evaluating, self.aggregating)


@dataclass(frozen=True)
class WorkerPlan:
    """A process of `run.devices`.

    Attributes:
        device: Where its model is.
        clients: The clients that it runs.
    """

    device: str
    clients: tuple[str, ...]


def divide_clients(clients: Sequence[str], devices: Sequence[str]) -> tuple[WorkerPlan, ...]:
    """Divide clients, sorted by name, among workers in turn.

    A device for which no client is left gets no worker.
    """
    names = sorted(clients)
    num_workers = min(len(devices), len(names))
    return tuple(WorkerPlan(devices[k], tuple(names[k::num_workers])) for k in range(num_workers))


@dataclass(frozen=True)
class Plan:
    """What a run will cost, estimated before it starts.

    Bytes are upper estimates; `metrics.jsonl` has the actual numbers.

    Attributes:
        model: The base model's name.
        num_parameters: The number of parameters of the base model.
        num_trained: The number of parameters of the adapter.
        num_clients: The number of clients.
        num_rounds: The number of rounds.
        method: The method's `repr`.
        uplink_bytes: Bytes sent per client and round.
        downlink_bytes: Bytes received per client and round: the adapter and the largest residual.
        memory_bytes: Approximate peak memory of the run's processes on the host.
        disk_bytes: The maximum size of the run directory.
        adapted: The adapted modules, with layers grouped.
        not_adapted: The other linear modules with the reason, if the base model is available.
        warnings: What the user should know before the run starts.
        optimizer_state: What the clients' optimizers start a round with.
        objective: The training objective, with the terms of [training].
        labels: A classifier's labels, in the order of the head, to the number of training examples;
            None if only the clients know it.
        device: The model's device, dtype and weight format; empty if only clients have the model.
        host_memory: The host's memory in each phase; None if only the server's is known.
        device_memory: The GPU's memory, for a single worker if there are several; None without GPU.
        workers: The processes of `run.devices`.
        privacy: What the clients keep from the server; empty for nothing.
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
    adapted: tuple[str, ...]
    not_adapted: tuple[str, ...]
    warnings: tuple[str, ...]
    optimizer_state: str = "fresh"
    objective: str = ""
    labels: Mapping[str, int | None] = field(default_factory=dict)
    device: str = ""
    host_memory: MemoryUse | None = None
    device_memory: MemoryUse | None = None
    workers: tuple[WorkerPlan, ...] = ()
    privacy: str = ""
