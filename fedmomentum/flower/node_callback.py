"""Callbacks of a node that report what happens while it takes part in a federation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker has loaded.

    Attributes:
        num_train: Number of training examples.
        num_test: Number of held-out examples.
        num_parameters: Number of base model parameters.
        dtype: The base model's data type.
        base_sha256: The base model's content hash, if known.
    """

    num_train: int
    num_test: int
    num_parameters: int
    dtype: str
    base_sha256: str | None


@dataclass(frozen=True)
class TaskInfo:
    """The task that the server has sent.

    Attributes:
        kind: The type of task, such as `train`.
        server_round: The round it belongs to.
    """

    kind: str
    server_round: int


class NodeCallback:
    """Receives a node's events; every method does nothing unless overridden."""

    def on_message(self, text: str) -> None:
        """Handle a line about what the worker is doing before the first task."""

    def on_warning(self, text: str) -> None:
        """Handle a warning that concerns this node's data."""

    def on_ready(self, info: WorkerInfo) -> None:
        """Handle that model and data are loaded."""

    def on_connected(self, server: str) -> None:
        """Handle that the server has admitted this node."""

    def on_connection_lost(self, reason: str, retry_seconds: float) -> None:
        """Handle a lost connection: the reason, and the time until the next attempt."""

    def on_task(self, task: TaskInfo, num_bytes: int) -> None:
        """Handle the arrival of a task of this size."""

    def on_repeated_task(self, task: TaskInfo) -> None:
        """Handle a repetition of the last task, which is answered without any work."""

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Handle the loss of a training step."""

    def on_task_done(self, task: TaskInfo, num_bytes: int, seconds: float) -> None:
        """Handle a finished task: the size of the reply, and how long it took."""

    def on_task_failed(self, reason: str) -> None:
        """Handle a task without a reply, with the full reason."""
