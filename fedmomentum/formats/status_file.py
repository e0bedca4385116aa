"""status.json in a run's directory: who is connected, and what each client is doing.

A served run writes it, and a run with a page to watch; `fedmomentum status` and that page read it.
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
    """What a run knows of one client.

    Attributes:
        connected: Whether it is connected.
        state: What it is doing; `asked` until its reply is there.
        until: When its current task has to be answered, in seconds since 1970.
        reason: Why its last task failed.
        rounds: Rounds in which its update was accepted, since the server started.
        up_bytes: Bytes that it has sent since then.
        down_bytes: Bytes that it was sent since then.
        late_replies: Replies that came after their deadline and were ignored.
        step: Steps that it has trained in this round; None where the server does not see them.
        num_steps: Steps that it trains in this round.
        loss: Of the last of these steps; None where it is withheld, too.
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
        num_rounds: Rounds of the run.
        version: The global model's version.
        waiting_for: Clients that the server is waiting for.
        waits_until: Until when, in seconds since 1970.
        clients: What is known of each client.
        written: When the file was written, in seconds since 1970.
        networked: Whether the clients are elsewhere; if not, `connected` means nothing.
        participants: Clients that were sampled for the round.
        message: The last line about what is done before the rounds.
        num_aggregated: Modules of the round that are aggregated.
        num_modules: Modules to aggregate; 0 before the first.
        reason: Why the run ended before its last round, where that is known.
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
            f"{out} has no {STATUS_FILE}; give the directory of a run that `fedmomentum serve` "
            "made, or `fedmomentum run --dashboard`"
        ) from error
    except ModelError as error:
        raise ModelError(
            f"{error}. A running server writes it again with its next event"
        ) from error
