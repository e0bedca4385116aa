"""`StatusWriter`: keeps `status.json` in a run's directory up to date."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from fedmomentum.errors import FedMomentumError
from fedmomentum.formats.status_file import STATUS_FILE
from fedmomentum.server.callbacks import Callback
from fedmomentum.utils.io import canonical_json, write_atomically
from fedmomentum.utils.records import with_checksum
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.formats.round_record import RoundRecord, Withheld


LOG = logging.getLogger("fedmomentum")
MIN_WRITE_SECONDS = 1.0
"""The minimum time between writes for frequent events."""
WRITING_FRACTION = 0.05
"""The fraction of the run's time that writing may take if it is slow, as with many clients."""
LONG_SECONDS = 0.05
"""A write that takes longer than this is slow; the next events are then not written at once."""


@dataclass
class _ClientStatus:
    """What is known about a client, under the file's keys; see `ClientStatus`."""

    connected: bool = False
    state: str = "idle"
    until: float | None = None
    reason: str | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    rounds: int = 0
    late_replies: int = 0
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None

    def rest(self) -> None:
        """Clear the fields of the current task."""
        self.until = None
        self.step = None
        self.num_steps = None
        self.loss = None


@dataclass(kw_only=True)
class _RunStatus:
    """What is known about a run, under the file's keys; see `StatusFile`."""

    phase: str = "waiting"
    round: int | None = None
    num_rounds: int
    version: str | None = None
    waiting_for: list[str] = field(default_factory=list)
    waits_until: float | None = None
    clients: dict[str, _ClientStatus] = field(default_factory=dict)
    networked: bool = True
    participants: list[str] = field(default_factory=list)
    message: str = ""
    num_aggregated: int = 0
    num_modules: int = 0
    reason: str | None = None


class StatusWriter(Callback):
    """Writes the status that `fedmomentum status` and the live page show; a context manager.

    If the file cannot be written, that is reported once, and the run continues without it.

    Args:
        out: The run's directory.
        num_rounds: The run's number of rounds.
        networked: Whether the clients are on other machines.
        withheld: What the run's metrics leave out; it is left out here, too.
    """

    def __init__(
        self,
        out: Path,
        num_rounds: int,
        *,
        networked: bool = True,
        withheld: Withheld | None = None,
    ) -> None:
        self._file = out / STATUS_FILE
        self._status = _RunStatus(num_rounds=num_rounds, networked=networked)
        self._written_at = 0.0
        self._pause = 0.0
        self._has_written = False
        self._has_failed = False
        # Steps reveal a client's number of examples, losses something about its data.
        fields = () if withheld is None else withheld.fields
        self._shows_steps = "clients" not in fields
        self._shows_losses = withheld is None

    def __enter__(self) -> StatusWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A run that was refused before it began leaves no file.
        if error is not None:
            self._status.reason = _describe_end(error)
        if self._has_written:
            self.close()

    # ── the run ──

    def on_message(self, text: str) -> None:
        """Note what is being done before the rounds."""
        self._status.message = printable(text)
        self._write()

    def on_round_begin(self, server_round: int, clients: Sequence[str]) -> None:
        """Note that a round's clients are sampled."""
        self._enter_phase("training" if server_round else "evaluating")
        self._status.round = server_round
        self._status.participants = list(clients)
        self._status.message = ""
        for name in {*clients, *self._status.clients}:
            client = self._client(name)
            client.state = "idle"
            client.reason = None
            client.rest()
        self._write()

    def on_aggregate(self, num_done: int, num_modules: int) -> None:
        """Note that a round is being aggregated; called for every module."""
        self._enter_phase("aggregating")
        self._status.num_aggregated = num_done
        self._status.num_modules = num_modules
        self._write(is_frequent=True)

    def on_evaluate(self, clients: Sequence[str]) -> None:
        """Note that the global model is being evaluated."""
        self._enter_phase("evaluating")
        if not self._status.networked:
            # Only over a network do events (tasks and replies) say when a client starts and ends.
            for name in clients:
                self._client(name).state = "asked"
        self._write()

    def on_round_end(self, record: RoundRecord) -> None:
        """Note a round's result."""
        self._status.version = record.version
        for name in record.accepted:
            self._client(name).rounds += 1
        if not self._status.networked:
            self._add_traffic(record)
        # Replies that arrived but were refused count as failures, too.
        for name, client in self._status.clients.items():
            client.rest()
            client.state = "failed" if name in record.failures else "idle"
            if name in record.failures:
                client.reason = printable(record.failures[name])
        self._write()

    def _add_traffic(self, record: RoundRecord) -> None:
        """Add a round's bytes; over a network they are counted as they are sent instead."""
        for name, num_bytes in record.uplink_bytes.items():
            self._client(name).up_bytes += num_bytes
        for name, num_bytes in record.downlink_bytes.items():
            self._client(name).down_bytes += num_bytes

    def _enter_phase(self, phase: str) -> None:
        self._status.phase = phase
        self._status.waiting_for = []
        self._status.waits_until = None
        self._status.num_aggregated = 0
        self._status.num_modules = 0

    # ── the clients ──

    def on_nodes(self, registered: Sequence[str], online: Sequence[str]) -> None:
        """Note which clients are connected; called every few seconds."""
        connected = set(online)
        has_changed = False
        for name in {*registered, *self._status.clients}:
            client = self._client(name)
            is_connected = name in connected
            has_changed = has_changed or client.connected != is_connected
            client.connected = is_connected
        self._write(is_frequent=not has_changed)

    def on_waiting(self, missing: Sequence[str], seconds: float) -> None:
        """Note which clients a round waits for."""
        self._status.waiting_for = list(missing)
        self._status.waits_until = time.time() + seconds
        self._write()

    def on_task_sent(self, client: str, num_bytes: int, timeout: float) -> None:
        """Note that a client has a task."""
        # The round is no longer waiting for clients.
        self._status.waiting_for = []
        self._status.waits_until = None
        status = self._client(client)
        status.rest()
        status.state = "asked"
        status.until = time.time() + timeout
        status.reason = None
        status.down_bytes += num_bytes
        self._write()

    def on_step(self, client: str, step: int, num_steps: int, loss: float) -> None:
        """Note how far a client on this machine has trained; called for every step."""
        # The last step counts as the answer, since what follows takes no time.
        status = self._client(client)
        status.state = "answered" if step >= num_steps else "asked"
        if self._shows_steps:
            status.step = step
            status.num_steps = num_steps
        if self._shows_losses:
            status.loss = loss if math.isfinite(loss) else None
        self._write(is_frequent=True)

    def on_reply(self, client: str, num_bytes: int) -> None:
        """Note that a client has answered."""
        status = self._client(client)
        status.rest()
        status.state = "answered"
        status.reason = None
        status.up_bytes += num_bytes
        self._write()

    def on_failure(self, client: str, reason: str) -> None:
        """Note why a client gave no usable reply."""
        status = self._client(client)
        status.rest()
        status.state = "failed"
        status.reason = reason
        self._write()

    def on_late_reply(self, client: str) -> None:
        """Count a reply that arrived too late."""
        self._client(client).late_replies += 1
        self._write()

    def close(self) -> None:
        """Note that the server has ended: no client is connected or working anymore."""
        self._pause = 0.0
        self._enter_phase("ended")
        for client in self._status.clients.values():
            client.connected = False
            client.rest()
            if client.state == "asked":
                client.state = "idle"
        self._write()

    def _client(self, name: str) -> _ClientStatus:
        return self._status.clients.setdefault(name, _ClientStatus())

    def _write(self, *, is_frequent: bool = False) -> None:
        """Write the file; for a frequent event only if it was last written a while ago."""
        # Nobody reads the file more often than once a second.
        now = time.time()
        pause = max(self._pause, MIN_WRITE_SECONDS if is_frequent else 0.0)
        if (pause and now <= self._written_at + pause) or not self._file.parent.is_dir():
            return
        self._written_at = now
        try:
            table = with_checksum({**msgspec.to_builtins(self._status), "written": now})
            # Not durable: after a crash of the machine there is no running server to report on.
            write_atomically(self._file, canonical_json(table).encode(), durable=False)
            self._has_written = True
            seconds = time.time() - now
            self._pause = seconds / WRITING_FRACTION if seconds > LONG_SECONDS else 0.0
        except OSError as error:
            if not self._has_failed:
                LOG.warning("%s cannot be written: %s", self._file, error.strerror)
            self._has_failed = True


def _describe_end(error: BaseException) -> str:
    """Return why a run has ended early, in words."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    if isinstance(error, (FedMomentumError, OSError)):
        return printable(str(error))
    return f"{type(error).__name__}; the terminal and the log say more"
