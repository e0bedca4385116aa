"""`status.json` in a served run's directory: who is connected, and what each client is doing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.errors import ModelError
from fedmomentum.formats.run_files import StatusFile
from fedmomentum.server.callbacks import Callback
from fedmomentum.utils.io import write_json
from fedmomentum.utils.records import read_record, with_checksum

if TYPE_CHECKING:
    from fedmomentum.formats.round_record import RoundRecord


STATUS_FILE = "status.json"
STALE_SECONDS = 30.0
"""A server that has not written for longer than this is busy aggregating, or gone."""
MIN_WRITE_SECONDS = 1.0
"""How often at most the file is written for events that come often."""


@dataclass
class _ClientStatus:
    """What is known of a client, under the file's keys.

    Attributes:
        connected: Whether it is connected.
        state: `idle`, `asked`, `answered` or `failed`.
        until: When its current task has to be answered, in seconds since 1970.
        reason: Why its last task failed.
        up_bytes: Bytes that it has sent.
        down_bytes: Bytes that it was sent.
        rounds: Rounds in which its update was accepted.
    """

    connected: bool = False
    state: str = "idle"
    until: float | None = None
    reason: str | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    rounds: int = 0


@dataclass(kw_only=True)
class _RunStatus:
    """What is known of a run, under the file's keys.

    Attributes:
        phase: What the server is doing.
        round: The current round; None before the first.
        num_rounds: Rounds of the run.
        version: The global model's version.
        waiting_for: Clients that the server is waiting for.
        waits_until: Until when, in seconds since 1970.
        clients: What is known of each client.
    """

    phase: str = "waiting"
    round: int | None = None
    num_rounds: int
    version: str | None = None
    waiting_for: list[str] = field(default_factory=list)
    waits_until: float | None = None
    clients: dict[str, _ClientStatus] = field(default_factory=dict)


class StatusWriter(Callback):
    """Writes what `fedmomentum status` shows, as things happen.

    Args:
        out: The run's directory.
        num_rounds: Rounds of the run.
    """

    def __init__(self, out: Path, num_rounds: int) -> None:
        self._file = out / STATUS_FILE
        self._status = _RunStatus(num_rounds=num_rounds)
        self._written_at = 0.0

    # ── the run ──

    def on_round_begin(self, server_round: int, clients: Sequence[str]) -> None:
        """Note that a round's clients are sampled."""
        self._enter_phase("training")
        self._status.round = server_round
        self._write()

    def on_aggregate(self, num_done: int, num_modules: int) -> None:
        """Note that a round is being aggregated; comes for every module."""
        self._enter_phase("aggregating")
        self._write(is_frequent=True)

    def on_evaluate(self, clients: Sequence[str]) -> None:
        """Note that the global model is being evaluated."""
        self._enter_phase("evaluating")
        self._write()

    def on_round_end(self, record: RoundRecord) -> None:
        """Note a round's result."""
        self._status.version = record.version
        for name in record.accepted:
            self._client(name).rounds += 1
        self._write()

    def _enter_phase(self, phase: str) -> None:
        self._status.phase = phase
        self._status.waiting_for = []
        self._status.waits_until = None

    # ── the clients ──

    def on_nodes(self, registered: Sequence[str], online: Sequence[str]) -> None:
        """Note which clients are connected; comes every few seconds."""
        has_changed = False
        for name in {*registered, *self._status.clients}:
            client = self._client(name)
            is_connected = name in online
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
        status = self._client(client)
        status.state = "asked"
        status.until = time.time() + timeout
        status.reason = None
        status.down_bytes += num_bytes
        self._write()

    def on_reply(self, client: str, num_bytes: int) -> None:
        """Note that a client has answered."""
        status = self._client(client)
        status.state = "answered"
        status.until = None
        status.reason = None
        status.up_bytes += num_bytes
        self._write()

    def on_failure(self, client: str, reason: str) -> None:
        """Note why there is no reply of a client."""
        status = self._client(client)
        status.state = "failed"
        status.until = None
        status.reason = reason
        self._write()

    def on_late_reply(self, client: str) -> None:
        """Write the file once more; a late reply changes nothing."""
        self._write()

    def close(self) -> None:
        """Note that the server has ended: no client is connected to it or works for it anymore."""
        self._enter_phase("ended")
        for client in self._status.clients.values():
            client.connected = False
            client.until = None
            if client.state == "asked":
                client.state = "idle"
        self._write()

    def _client(self, name: str) -> _ClientStatus:
        return self._status.clients.setdefault(name, _ClientStatus())

    def _write(self, *, is_frequent: bool = False) -> None:
        """Write the file; for a frequent event only if it was last written a while ago."""
        # nobody reads the file more often than once a second
        now = time.time()
        if is_frequent and now <= self._written_at + MIN_WRITE_SECONDS:
            return
        if self._file.parent.is_dir():
            self._written_at = now
            write_json(self._file, with_checksum({**asdict(self._status), "written": now}))


def read_status(out: Path) -> StatusFile:
    """Return the status of a run, as its server wrote it last.

    Args:
        out: The run's directory.

    Raises:
        ModelError: If the directory has no status, or a damaged one.
    """
    try:
        return read_record(out / STATUS_FILE, StatusFile)
    except FileNotFoundError as error:
        raise ModelError(
            f"{out} has no {STATUS_FILE}; give the directory of a run that `fedmomentum serve` made"
        ) from error
    except ModelError as error:
        raise ModelError(
            f"{error}. A running server writes it again with its next event"
        ) from error
