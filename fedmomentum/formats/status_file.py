"""status.json in a run's directory: who is connected, and what each client is doing.

Served runs and runs with a live page write it; `fedmomentum status` and that page read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from fedmomentum.errors import ModelError
from fedmomentum.formats.run_files import RunRecord
from fedmomentum.utils.records import read_record
from fedmomentum.utils.schema import Count

STATUS_FILE = "status.json"
STALE_SECONDS = 30.0
"""A server that has not written for longer than this is busy aggregating, or gone."""


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a run knows about one client.

    Attributes:
        connected: Whether it is connected.
        state: What it is doing; `asked` until its reply has arrived.
        until: The deadline of its current task, in seconds since 1970.
        reason: Why its last task failed.
        rounds: Number of rounds in which its update was accepted, since the server started.
        up_bytes: Bytes that it has sent since then.
        down_bytes: Bytes that it has received since then.
        late_replies: Number of replies that arrived after their deadline and were ignored.
        step: Number of steps trained in this round; None if the server does not see them.
        num_steps: Total number of steps in this round.
        loss: The loss of the last of these steps; also None if it is withheld.
    """

    connected: bool
    state: Literal["idle", "asked", "answered", "failed"]
    until: float | None
    reason: str | None
    rounds: Count
    up_bytes: Count
    down_bytes: Count
    late_replies: Count = 0
    step: Count | None = None
    num_steps: Count | None = None
    loss: float | None = None


class StatusFile(RunRecord, frozen=True, kw_only=True):
    """status.json.

    Attributes:
        phase: What the run is doing.
        round: The current round; None before the first.
        num_rounds: The run's number of rounds.
        version: The global model's version.
        waiting_for: Clients that the server is waiting for.
        waits_until: Until when it waits, in seconds since 1970.
        clients: What is known about each client.
        written: When the file was written, in seconds since 1970.
        networked: Whether the clients are on other machines; if not, `connected` is meaningless.
        participants: Clients that were sampled for the round.
        message: The last message about what the run does before its rounds.
        num_aggregated: Number of modules that have been aggregated in this round.
        num_modules: Number of modules to aggregate; 0 before the first.
        reason: Why the run ended before its last round, if known.
    """

    phase: Literal["waiting", "training", "evaluating", "aggregating", "ended"]
    round: Count | None
    num_rounds: Count
    version: str | None
    waiting_for: list[str]
    waits_until: float | None
    clients: dict[str, ClientStatus]
    written: float
    networked: bool = True
    participants: list[str] = []
    message: str = ""
    num_aggregated: Count = 0
    num_modules: Count = 0
    reason: str | None = None


def read_status(out: Path) -> StatusFile:
    """Return the status that a run's server wrote last.

    Args:
        out: The run's directory.

    Raises:
        ModelError: If the directory has no status, or a damaged one.
    """
    try:
        return read_record(out / STATUS_FILE, StatusFile)
    except FileNotFoundError as error:
        raise ModelError(
            f"{out} has no {STATUS_FILE}; give the directory of a run that `fedmomentum serve` "
            "made, or `fedmomentum run --dashboard`"
        ) from error
    except ModelError as error:
        raise ModelError(
            f"{error}. A running server writes it again with its next event"
        ) from error
