"""Callbacks of a node: what happens on it while it takes part in a federation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker has loaded.

    Attributes:
        num_train: Examples to train on.
        num_test: Examples held out.
        num_parameters: Parameters of the base model.
        dtype: The base model's data type.
        base_sha256: The base model's content hash, if it is known.
    """

    num_train: int
    num_test: int
    num_parameters: int
    dtype: str
    base_sha256: str | None


@dataclass(frozen=True)
class TaskInfo:
    """Which task the server has sent.

    Attributes:
        kind: What is asked for, such as `train`.
        server_round: The round it belongs to.
    """

    kind: str
    server_round: int


class NodeCallback:
    """Receives what happens on a node; every method does nothing unless a subclass overrides it."""

    def on_message(self, text: str) -> None:
        """Receive a line about what the worker is doing before the first task."""

    def on_warning(self, text: str) -> None:
        """Receive a warning that concerns this node's data."""

    def on_ready(self, info: WorkerInfo) -> None:
        """Receive that model and data are loaded."""

    def on_connected(self, server: str) -> None:
        """Receive that the server has admitted this node."""

    def on_connection_lost(self, reason: str, retry_seconds: float) -> None:
        """Receive that there is no connection, why, and when the next attempt is made."""

    def on_task(self, task: TaskInfo, num_bytes: int) -> None:
        """Receive that a task of this size has arrived."""

    def on_repeated_task(self, task: TaskInfo) -> None:
        """Receive that the last task came once more; it is answered without any work."""

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Receive the loss of a training step."""

    def on_task_done(self, task: TaskInfo, num_bytes: int, seconds: float) -> None:
        """Receive that a task is done: the size of the reply, and how long it took."""

    def on_task_failed(self, reason: str) -> None:
        """Receive that a task has no reply, and why, in full."""
