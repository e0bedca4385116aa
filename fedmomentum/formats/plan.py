"""`Plan`: what a run will cost, estimated before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of memory in each phase of a run, estimated.

    Attributes:
        at_rest: The model with its adapter, between tasks.
        loading: While the model is loaded.
        training: At the peak of a training step.
        evaluating: At the peak of a batch that is evaluated.
        aggregating: While the server aggregates, in the same process.
    """

    at_rest: int
    loading: int
    training: int
    evaluating: int
    aggregating: int

    @property
    def peak(self) -> int:
        """The most of all phases."""
        return max(self.at_rest, self.loading, self.training, self.evaluating, self.aggregating)


@dataclass(frozen=True)
class WorkerPlan:
    """A process of `run.devices`.

    Attributes:
        device: Where its model is.
        clients: The clients that it plays.
    """

    device: str
    clients: tuple[str, ...]


def divide_clients(clients: Sequence[str], devices: Sequence[str]) -> tuple[WorkerPlan, ...]:
    """Divide clients among workers, in the order of their names: one after the other.

    A device that no client is left for gets no worker.
    """
    names = sorted(clients)
    num_workers = min(len(devices), len(names))
    return tuple(WorkerPlan(devices[k], tuple(names[k::num_workers])) for k in range(num_workers))


@dataclass(frozen=True)
class Plan:
    """What a run will cost, estimated before it starts.

    Bytes are upper estimates; `metrics.jsonl` has the real ones.

    Attributes:
        model: The base's name.
        num_parameters: Of the base.
        num_trained: Of the adapter.
        num_clients: Parties.
        num_rounds: Rounds.
        method: Its `repr`.
        uplink_bytes: Per client and round.
        downlink_bytes: Per client and round: the adapter and the most the residual can be.
        memory_bytes: Of the run's processes on the host, at the peak, about.
        disk_bytes: Of the run directory, at most.
        adapted: The adapted modules, layers together.
        not_adapted: The other linear modules with the reason, if the base model is at hand.
        warnings: What the user should know before it starts.
        optimizer_state: What the clients' optimizers start a round with.
        objective: What is learned, as [training] says it.
        labels: A classifier's labels, label to its number of training examples, in the order of the
            head; None where only the clients know it.
        device: Where the model is, in which dtype and how held; empty where it is with the clients.
        host_memory: Of the host, in each phase; None where only the server's is known.
        device_memory: Of the GPU, for one worker where there are several; None without one.
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
