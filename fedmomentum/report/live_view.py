"""The content of the live page: a run's status and finished rounds, in the page's words.

It shows only what the run's files publish; what the metrics withhold is marked as withheld.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedmomentum.formats.withheld import describe_withheld
from fedmomentum.results.formatting import MISSING, number, percent, shorten
from fedmomentum.results.participation import REASON_LENGTH
from fedmomentum.results.summary import natural_order, scored, total_seconds
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.formats.round_record import RoundRecord, Withheld
    from fedmomentum.formats.status_file import ClientStatus, StatusFile
    from fedmomentum.results.run_results import RunResults


MAX_CLIENTS = 100
"""The most clients with their own row; those that need attention come first."""
MAX_ROUNDS = 20
"""The most rounds with their own row, the latest ones; the curves show all."""
MAX_NAMES = 8
"""The most names in a sentence or cell."""
NAME_LENGTH = 64
WITHHELD = "withheld"
# Clients that need attention come first.
ORDER = {"failed": 0, "late": 1, "busy": 2, "done": 3, "idle": 4}
KINDS = {"failed": "bad", "late": "bad", "busy": "busy", "done": "calm", "idle": "calm"}


@dataclass(frozen=True)
class ClientRow:
    """A row of the clients table; `kind` is a class in the style sheet."""

    name: str
    connected: str
    state: str
    kind: str
    detail: str
    until: float | None
    rounds: int
    up_bytes: int
    down_bytes: int
    reason: str


@dataclass(frozen=True)
class RoundRow:
    """A row of the rounds table."""

    round: int
    is_best: bool
    num_accepted: int
    num_participants: int
    train_loss: str
    loss: str
    score: str
    up_bytes: int
    down_bytes: int
    seconds: float
    missing: list[tuple[str, str]]
    num_more_missing: int


@dataclass(frozen=True)
class LiveView:
    """The content of the page.

    Attributes:
        now: The time, in seconds since 1970; deadlines count down from it.
        is_ended: Whether the run's process has ended.
        is_finished: Whether all rounds are done.
        has_begun: Whether anything is known about the run.
        reason: Why the run stopped; empty if unknown.
        where: How far it got, if it stopped.
        phase: What the run is doing.
        round: The current round; None before the first.
        num_rounds: Number of rounds of the run; 0 if not known yet.
        num_finished: Number of finished rounds.
        message: What is being prepared before the rounds.
        waiting_for: Clients that the round waits for before it begins; `num_more_waiting` more are
            not named.
        waits_until: Until when.
        due: The latest time at which a client's answer is due.
        num_asked: Number of clients in the round.
        num_answered: Number of those that have answered or trained.
        num_failed: Number of those that have failed.
        num_aggregated: Number of modules already aggregated, of `num_modules`.
        withheld: Why something is withheld; empty if nothing is. `left_out` says what.
        score_label: What `score` measures; `score_note` says for which model.
        bytes_since: The period over which bytes are counted.
        client_count: How many clients there are; `client_note` says what they are doing.
        networked: Whether the clients are on other machines.
        measure: What a round's score measures.
    """

    now: float
    is_ended: bool = False
    is_finished: bool = False
    has_begun: bool = False
    reason: str = ""
    where: str = ""
    phase: str = ""
    round: int | None = None
    num_rounds: int = 0
    num_finished: int = 0
    message: str = ""
    waiting_for: list[str] = field(default_factory=list)
    num_more_waiting: int = 0
    waits_until: float | None = None
    due: float | None = None
    num_asked: int = 0
    num_answered: int = 0
    num_failed: int = 0
    num_aggregated: int = 0
    num_modules: int = 0
    withheld: str = ""
    left_out: str = ""
    score_label: str = "Score"
    score: str = MISSING
    score_note: str = "no evaluation yet"
    up_bytes: int = 0
    down_bytes: int = 0
    bytes_since: str = ""
    client_count: str = MISSING
    client_note: str = ""
    networked: bool = False
    clients: list[ClientRow] = field(default_factory=list)
    num_more_clients: int = 0
    measure: str = "exact match"
    rounds: list[RoundRow] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """The state in a few words, for the window's title and screen readers."""
        if self.is_ended and self.is_finished:
            return f"All {self.num_rounds} rounds are finished"
        if self.is_ended:
            return f"Stopped {self.where}"
        if self.waiting_for:
            return "Waiting for clients"
        if self.round is None:
            return "Before the first round"
        if self.round == 0:
            return "The base model is evaluated"
        return f"Round {self.round} of {self.num_rounds}"


def live_view(
    status: StatusFile | None, run: RunResults | None, *, is_ended: bool, now: float
) -> LiveView:
    """Return the content of the page.

    Args:
        status: The run's latest status; None if none has been written yet.
        run: Its plan and rounds; None before they are written.
        is_ended: Whether the run's process has ended.
        now: The time, in seconds since 1970.
    """
    # Either may be missing, since a run may be watched before it has written anything.
    rounds = [] if run is None else run.rounds
    withheld = rounds[-1].withheld if rounds else None
    num_finished = rounds[-1].round if rounds else 0
    num_rounds = _num_rounds(status, run)
    is_ended = is_ended or (status is not None and status.phase == "ended")
    return LiveView(
        now=now,
        is_ended=is_ended,
        is_finished=bool(rounds) and num_finished >= num_rounds,
        has_begun=status is not None,
        reason=printable((status.reason if status else None) or ""),
        where=_where(num_finished, num_rounds),
        num_rounds=num_rounds,
        num_finished=num_finished,
        withheld="" if withheld is None else withheld.reason,
        left_out="" if withheld is None else describe_withheld(withheld),
        rounds=[_round_row(record) for record in rounds[: -MAX_ROUNDS - 1 : -1]],
        **_progress(status),
        **_scores(rounds, withheld),
        **_traffic(status, rounds),
        **_clients(status, now),
    )


def shown_name(name: str) -> str:
    """Return a client's name, sanitized for display."""
    return shorten(printable(name), NAME_LENGTH)


def _num_rounds(status: StatusFile | None, run: RunResults | None) -> int:
    if status is not None:
        return status.num_rounds
    return 0 if run is None else run.plan.num_rounds


def _where(num_finished: int, num_rounds: int) -> str:
    if not num_finished:
        return "before the first round was finished"
    return f"after round {num_finished} of {num_rounds}"


# ── the round in progress ──


def _progress(status: StatusFile | None) -> dict[str, Any]:
    """Return what is currently happening."""
    if status is None:
        return {}
    # Clients that the run waits for, and the states of those in the round.
    waiting = [shown_name(name) for name in status.waiting_for[:MAX_NAMES]]
    states = [client.state for client in status.clients.values()]
    deadlines = [client.until for client in status.clients.values() if client.until is not None]
    num_asked = len(states) - states.count("idle")
    if not status.networked:
        # Clients run in turn, so most have not begun; an evaluation's progress is unknown.
        num_asked = len(status.participants) if status.phase == "training" else 0
    return {
        "phase": status.phase,
        "round": status.round,
        "message": printable(status.message),
        "waiting_for": waiting,
        "num_more_waiting": len(status.waiting_for) - len(waiting),
        "waits_until": status.waits_until,
        "due": max(deadlines, default=None),
        "num_asked": num_asked,
        "num_answered": states.count("answered"),
        "num_failed": states.count("failed"),
        "num_aggregated": status.num_aggregated,
        "num_modules": status.num_modules,
    }


def _traffic(status: StatusFile | None, rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    """Return the bytes so far: of the finished rounds, or since the server's start."""
    up = sum(sum(record.uplink_bytes.values()) for record in rounds)
    down = sum(sum(record.downlink_bytes.values()) for record in rounds)
    since = "in the finished rounds"
    clients = () if status is None else status.clients.values()
    live_up = sum(client.up_bytes for client in clients)
    live_down = sum(client.down_bytes for client in clients)
    # A resumed server counts from its restart, so its count may be the smaller one; otherwise it
    # includes the round in progress.
    if live_up + live_down > up + down:
        return {"up_bytes": live_up, "down_bytes": live_down, "bytes_since": "so far"}
    return {"up_bytes": up, "down_bytes": down, "bytes_since": since}


# ── the clients ──


def _clients(status: StatusFile | None, now: float) -> dict[str, Any]:
    """Return the clients table and a brief summary of what they are doing."""
    if status is None:
        return {}
    # Sort clients by state, those that need attention first.
    kinds = {name: _kind(client, now) for name, client in status.clients.items()}
    names = sorted(kinds, key=lambda name: (ORDER[kinds[name]], natural_order(name)))
    rows = [_client_row(name, status, kinds[name]) for name in names[:MAX_CLIENTS]]
    count = f"{len(names)} on this machine"
    if status.networked:
        num_connected = sum(client.connected for client in status.clients.values())
        count = f"{num_connected} of {len(names)} connected"
    work = "evaluating" if status.phase == "evaluating" else "training"
    words = {"failed": "failed", "late": "late", "busy": work, "done": "done"}
    found = list(kinds.values())
    notes = [f"{found.count(kind)} {word}" for kind, word in words.items() if kind in found]
    return {
        "networked": status.networked,
        "clients": rows,
        "num_more_clients": len(names) - len(rows),
        "client_count": count,
        "client_note": ", ".join(notes) or "none is at work",
    }


def _kind(client: ClientStatus, now: float) -> str:
    if client.state == "failed":
        return "failed"
    if client.state == "asked":
        is_late = client.until is not None and client.until < now
        return "late" if is_late else "busy"
    return "done" if client.state == "answered" else "idle"


def _client_row(name: str, status: StatusFile, kind: str) -> ClientRow:
    """Return a client's row of the clients table."""
    client = status.clients[name]
    reason = shorten(printable(client.reason), REASON_LENGTH) if client.reason else ""
    # A client may be fine by now but still too slow.
    if client.late_replies:
        times = "once" if client.late_replies == 1 else f"{client.late_replies} times"
        reason = f"{reason}; answered too late {times}".removeprefix("; ")
    return ClientRow(
        name=shown_name(name),
        connected="yes" if client.connected else "no",
        state=_state(name, status, kind),
        kind=KINDS[kind],
        detail=_step(client),
        until=client.until,
        rounds=client.rounds,
        up_bytes=client.up_bytes,
        down_bytes=client.down_bytes,
        reason=reason,
    )


def _state(name: str, status: StatusFile, kind: str) -> str:
    """Describe what a client is doing."""
    if kind == "busy":
        return "evaluating" if status.phase == "evaluating" else "training"
    if kind == "done":
        return "answered" if status.networked else "trained"
    if kind != "idle":
        return kind
    if status.phase == "ended":
        return "–"
    is_sampled = name in status.participants
    if is_sampled and status.phase == "training" and not status.networked:
        return "waits for its turn"
    return "idle"


def _step(client: ClientStatus) -> str:
    """Return the progress of a client's training, if visible from this machine."""
    if client.step is None or client.num_steps is None:
        return ""
    text = f"step {client.step} of {client.num_steps}"
    return text if client.loss is None else f"{text}, loss {number(client.loss)}"


# ── the rounds ──


def _is_withheld(withheld: Withheld | None, name: str) -> bool:
    return withheld is not None and name in withheld.fields


def _scores(rounds: Sequence[RoundRecord], withheld: Withheld | None) -> dict[str, Any]:
    """Return the latest score and what it measures."""
    if _is_withheld(withheld, "evaluation"):
        return {"score": WITHHELD, "score_note": "no held-out score is revealed"}
    for record in reversed(rounds):
        score = scored(record.evaluation.total) if record.evaluation else None
        if score is not None:
            model = f"after round {record.round}" if record.round else "of the base model"
            return {
                "measure": score.measure,
                "score_label": score.measure.capitalize(),
                "score": percent(score.exact_match),
                "score_note": f"{model}, loss {number(score.loss)}",
            }
    return {}


def _round_row(record: RoundRecord) -> RoundRow:
    score = scored(record.evaluation.total) if record.evaluation else None
    # Mark what is intentionally empty.
    hidden = WITHHELD if _is_withheld(record.withheld, "evaluation") else MISSING
    no_train_loss = WITHHELD if _is_withheld(record.withheld, "train_loss") else MISSING
    failures = _shown_failures(record.failures)
    return RoundRow(
        round=record.round,
        is_best=record.is_best,
        num_accepted=len(record.accepted),
        num_participants=len(record.participants),
        train_loss=no_train_loss if record.train_loss is None else number(record.train_loss),
        loss=hidden if score is None else number(score.loss),
        score=hidden if score is None else percent(score.exact_match),
        up_bytes=sum(record.uplink_bytes.values()),
        down_bytes=sum(record.downlink_bytes.values()),
        seconds=total_seconds(record),
        missing=failures,
        num_more_missing=len(record.failures) - len(failures),
    )


def _shown_failures(failures: Mapping[str, str]) -> list[tuple[str, str]]:
    names = sorted(failures, key=natural_order)[:MAX_NAMES]
    return [(shown_name(name), shorten(printable(failures[name]), REASON_LENGTH)) for name in names]
