"""`Callback`: typed hooks into a run; the base class of views, trackers and status files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmomentum.formats.plan import Plan
    from fedmomentum.formats.round_record import RoundRecord


class Callback:
    """Receives the events of a run; every method does nothing unless a subclass overrides it.

    Callbacks are called in the thread that runs the rounds, in the order in which they were given.
    An exception in one ends the run; all earlier rounds are saved.
    """

    def on_message(self, text: str) -> None:
        """Receive a line about what the run is doing before its first round."""

    def on_plan(self, plan: Plan) -> None:
        """Receive what the run will cost, before its first round."""

    def on_round_begin(self, server_round: int, clients: Sequence[str]) -> None:
        """Receive a round's sampled clients; round 0 samples none."""

    def on_task_sent(self, client: str, num_bytes: int, timeout: float) -> None:
        """React to a task sent over a network; the client has `timeout` seconds to reply."""

    def on_step(self, client: str, step: int, num_steps: int, loss: float) -> None:
        """Receive the loss of a local training step; only for clients in this process."""

    def on_reply(self, client: str, num_bytes: int) -> None:
        """React to a client's reply that arrived over a network."""

    def on_failure(self, client: str, reason: str) -> None:
        """React to a client that will give no usable reply in this exchange, and why."""

    def on_late_reply(self, client: str) -> None:
        """React to a reply that arrived after its deadline and was ignored."""

    def on_nodes(self, registered: Sequence[str], online: Sequence[str]) -> None:
        """Receive which clients are admitted, and which of them are connected."""

    def on_waiting(self, missing: Sequence[str], seconds: float) -> None:
        """React to a round that waits up to `seconds` for clients that are not connected."""

    def on_aggregate(self, num_done: int, num_modules: int) -> None:
        """Receive how many of the round's modules have been aggregated."""

    def on_evaluate(self, clients: Sequence[str]) -> None:
        """Receive which clients are asked to evaluate the global model."""

    def on_round_end(self, record: RoundRecord) -> None:
        """Receive the record of a committed round, which from now on survives a crash."""


class CallbackList(Callback):
    """Calls several callbacks in order, for every hook of `Callback`, including future ones."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)


def _for_each_callback(hook: str) -> Callable[..., None]:
    def call(self: CallbackList, *arguments: object, **keywords: object) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments, **keywords)

    return call


for _hook in [name for name in vars(Callback) if name.startswith("on_")]:
    setattr(CallbackList, _hook, _for_each_callback(_hook))
