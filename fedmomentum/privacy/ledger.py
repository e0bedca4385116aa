"""A party's ledger: the total privacy spent by all private trainings on its data.

It belongs to the party and counts trainings in its file, whatever run or server they were for. Each
training is recorded on disk before its first step, so that a process that dies has never spent more
than the file says. The reply is stored on disk before it is sent, so that a repeated task gets the
same bytes rather than a second noise sample that could be averaged with the first.
"""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fedmomentum.errors import PrivacyError
from fedmomentum.privacy.accountant import Steps, epsilon_of, fits
from fedmomentum.privacy.mechanism import Mechanism
from fedmomentum.utils.io import json_bytes, sha256, write_atomically
from fedmomentum.utils.records import Record, read_file, read_record, with_checksum
from fedmomentum.utils.schema import Count, Hash, Label, PositiveCount, Schema, Text

RETAINED_REPLIES = 4
"""How many of the newest trainings' replies to keep, each the size of an adapter."""
MAX_REPLY_BYTES = 2**40

Positive = Annotated[float, Meta(gt=0)]


class Training(Schema, frozen=True, kw_only=True):
    """One private training.

    Attributes:
        task: Hash of the request, equal for a repeated task.
        run_id: The run.
        server_round: The round.
        noise_multiplier: Standard deviation of the noise in units of the clipping norm.
        sample_rate: Probability with which a unit took part in each step.
        num_steps: Number of steps.
        max_grad_norm: The clipping norm.
        expected_batch: What the noised sums were divided by.
        data: Keyed hash of the examples, which shows whether two trainings used the same.
        began: When it began, in UTC.
        state: `started` until its reply is on disk (`replied`) or it has `failed`. All count.
        reply: Hash of the reply.
    """

    task: Hash
    run_id: Text
    server_round: Count
    noise_multiplier: Positive
    sample_rate: Annotated[float, Meta(gt=0, le=1)]
    num_steps: PositiveCount
    max_grad_norm: Positive
    expected_batch: Positive
    data: Hash
    began: Label
    state: Literal["started", "replied", "failed"]
    reply: Hash | None = None

    @property
    def steps(self) -> Steps:
        """The steps for the accountant."""
        return Steps(self.noise_multiplier, self.sample_rate, self.num_steps)


class LedgerRecord(Record, frozen=True, kw_only=True):
    """The contents of a ledger file.

    Attributes:
        format: The type of file.
        format_version: The version of the format.
        party: The client.
        unit: What is protected: `example`, or the column that names the units.
        public_units: The number of units that was treated as public when the ledger was created.
        salt: Secret key for hashes of the data.
        trainings: All trainings, oldest first.
    """

    format: Literal["fedmomentum privacy ledger"]
    format_version: Literal[1]
    party: Text
    unit: Label
    public_units: PositiveCount
    salt: Hash
    trainings: list[Training]

    @property
    def history(self) -> list[Steps]:
        """The steps of all trainings for the accountant."""
        return [training.steps for training in self.trainings]


@dataclass(frozen=True)
class Budget:
    """The total that all trainings on a party's data may spend.

    Attributes:
        epsilon: The largest epsilon; None to only count trainings.
        delta: The delta at which epsilon is computed.
    """

    epsilon: float | None
    delta: float


@dataclass
class OpenTraining:
    """A training that has been recorded, while the ledger is locked.

    Attributes:
        ledger: The ledger.
        position: Its position among the ledger's trainings.
    """

    ledger: Ledger
    position: int

    def finish(self, reply: bytes) -> None:
        """Store the reply, after which it may be sent."""
        self.ledger.store_reply(self.position, reply)


@dataclass(frozen=True)
class Ledger:
    """A party's ledger.

    Attributes:
        file: Its file.
        party: The client.
        unit: What is protected: `example`, or the column that names the units.
        budget: What may be spent.
    """

    file: Path
    party: str
    unit: str
    budget: Budget

    def begin(self, num_units: int) -> LedgerRecord:
        """Return the ledger's contents, creating the file if needed.

        Args:
            num_units: The number of units to treat as public if it is created.

        Raises:
            PrivacyError: If the file is damaged, belongs to another party or unit, or was removed
                while its replies still exist.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._locked("file"):
            try:
                return self.read()
            except FileNotFoundError:
                pass
            # Replies still exist if someone removed the file to start over.
            if self._replies.is_dir() and any(self._replies.iterdir()):
                raise PrivacyError(
                    f"{self.file} is missing, and {self._replies} shows that there was a ledger: "
                    "what was spent is not known. Restore it from a copy; or, if nothing in the "
                    "new data was in the old, begin in another directory (privacy.dp.ledger)"
                )
            record = LedgerRecord(
                format="fedmomentum privacy ledger",
                format_version=1,
                party=self.party,
                unit=self.unit,
                public_units=num_units,
                salt=secrets.token_hex(32),
                trainings=[],
                # Filled in when written.
                sha256="0" * 64,
            )
            # Only this user may read past replies and the key of the hashes.
            self._replies.mkdir(exist_ok=True)
            self._replies.chmod(0o700)
            self._write(record)
            return record

    def read(self) -> LedgerRecord:
        """Return the ledger's contents.

        Raises:
            FileNotFoundError: If there is no file.
            PrivacyError: If it is damaged, or belongs to another party or unit.
        """
        record = read_ledger(self.file)
        if record.party != self.party:
            raise PrivacyError(
                f"{self.file} is the ledger of {record.party}; this client is {self.party}. Give "
                "each client's data a ledger of its own (privacy.dp.ledger)"
            )
        if record.unit != self.unit:
            raise PrivacyError(
                f"{self.file} counts what is revealed of one {record.unit}; [privacy.dp] here "
                f"protects one {self.unit}. What was spent on the one says nothing of the other: "
                "set unit-column as it was"
            )
        return record

    def stored_reply(self, task: str) -> bytes | None:
        """Return the stored reply to a completed task; None if it is not done or no longer kept."""
        for training in reversed(self.read().trainings):
            # A task may have failed before it succeeded, so take the newest reply.
            if training.task != task or training.reply is None:
                continue
            try:
                reply = read_file(self._reply_file(training), max_bytes=MAX_REPLY_BYTES)
            except FileNotFoundError:
                return None
            # A damaged reply must not be sent; the task is then trained and counted again.
            return reply if sha256(reply) == training.reply else None
        return None

    @contextmanager
    def training(
        self, task: str, run_id: str, server_round: int, mechanism: Mechanism, data: str
    ) -> Iterator[OpenTraining]:
        """Record a training, and keep others from training on this ledger within the block.

        A task that died without a reply is not counted again when repeated, since it revealed
        nothing. One that failed is, since what the server learned about it may depend on the data.

        Args:
            task: Hash of the request.
            run_id: The run.
            server_round: The round.
            mechanism: The steps.
            data: Keyed hash of the examples.

        Raises:
            PrivacyError: If the training would exceed the budget, or another process is training
                on this ledger.
        """
        # Held until the reply is stored, so that two processes never train for the same entry.
        with self._locked("training", waits=False):
            training = Training(
                task=task,
                run_id=run_id,
                server_round=server_round,
                noise_multiplier=mechanism.noise_multiplier,
                sample_rate=mechanism.sample_rate,
                num_steps=mechanism.num_steps,
                max_grad_norm=mechanism.max_grad_norm,
                expected_batch=mechanism.expected_batch,
                data=data,
                began=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                state="started",
            )
            opened = OpenTraining(self, self._enter(training))
            try:
                yield opened
            except BaseException:
                self._fail(opened.position)
                raise

    def _enter(self, training: Training) -> int:
        """Record a training and return its position."""
        with self._locked("file"):
            record = self.read()
            last = record.trainings[-1] if record.trainings else None
            # If a started one's process no longer holds the lock, it died before storing its reply.
            if last is not None and last.task == training.task and last.state == "started":
                if last.steps == training.steps:
                    return len(record.trainings) - 1
            self.check_budget(record.history, training.steps)
            trainings = [*record.trainings, training]
            self._write(msgspec.structs.replace(record, trainings=trainings))
            return len(trainings) - 1

    def check_budget(self, history: Sequence[Steps], more: Steps) -> None:
        """Reject steps that would exceed the budget.

        Raises:
            PrivacyError: If they would; the message says by how much.
        """
        budget = self.budget
        if budget.epsilon is None or fits([*history, more], budget.epsilon, budget.delta):
            return
        spent = epsilon_of(history, budget.delta)
        after = epsilon_of([*history, more], budget.delta)
        raise PrivacyError(
            f"privacy budget of {self.party}: {more.num_steps} more steps (sample rate "
            f"{more.sample_rate:.4g}, noise multiplier {more.noise_multiplier:.4g}) would bring "
            f"epsilon from {spent:.3f} to {after:.3f} at delta {budget.delta:g}, and the budget "
            f"is {budget.epsilon:g}. Nothing was trained; ask for fewer steps or more noise"
        )

    def store_reply(self, position: int, reply: bytes) -> None:
        """Store the reply of a training: first the reply itself, then the record of it."""
        with self._locked("file"):
            record = self.read()
            training = msgspec.structs.replace(
                record.trainings[position], state="replied", reply=sha256(reply)
            )
            self._replies.mkdir(exist_ok=True)
            # In the opposite order, a kill in between would leave a record without its reply.
            write_atomically(self._reply_file(training), reply)
            trainings = [*record.trainings]
            trainings[position] = training
            self._write(msgspec.structs.replace(record, trainings=trainings))
            self._prune(trainings)

    def _fail(self, position: int) -> None:
        """Record that a training has failed, unless its reply is stored."""
        with self._locked("file"):
            record = self.read()
            # After that, only sending it to the server can have failed.
            if record.trainings[position].state == "replied":
                return
            trainings = [*record.trainings]
            trainings[position] = msgspec.structs.replace(trainings[position], state="failed")
            self._write(msgspec.structs.replace(record, trainings=trainings))

    def _prune(self, trainings: Sequence[Training]) -> None:
        """Delete the replies of all but the newest trainings."""
        retained = {training.reply for training in trainings[-RETAINED_REPLIES:]}
        for file in self._replies.iterdir():
            if file.name not in retained:
                file.unlink()

    @property
    def _replies(self) -> Path:
        return self.file.with_suffix(".replies")

    def _reply_file(self, training: Training) -> Path:
        assert training.reply is not None  # it has replied
        return self._replies / training.reply

    def _write(self, record: LedgerRecord) -> None:
        """Write the file, readable only by this user."""
        table = msgspec.to_builtins(record)
        write_atomically(self.file, json_bytes(with_checksum(table)), permissions=0o600)

    @contextmanager
    def _locked(self, purpose: str, *, waits: bool = True) -> Iterator[None]:
        """Hold a lock, which is released when the process ends.

        Raises:
            PrivacyError: If `waits` is False and another process holds it.
        """
        file = self.file.with_suffix(f".{purpose}.lock")
        with file.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise PrivacyError(
                    f"another process is training on the ledger {self.file}; wait until it is done"
                ) from error
            yield


def read_ledger(file: Path) -> LedgerRecord:
    """Read a ledger file.

    Raises:
        FileNotFoundError: If there is none.
        PrivacyError: If it is damaged or not a ledger.
    """
    return read_record(file, LedgerRecord, PrivacyError)


def round_down(number: int) -> int:
    """Round a number down to two significant digits: 1234 to 1200."""
    num_dropped = max(0, len(str(number)) - 2)
    scale = int("1" + "0" * num_dropped)
    return number // scale * scale
