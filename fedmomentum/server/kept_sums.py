"""What a server keeps on disk of a round's sums, so that it can continue them after a kill.

Clients open each sum only once, so the server cannot ask for their replies again. ::

    secure/<run>/0003.json      who trained in the round, and what the server noted meanwhile
    secure/<run>/0003-1-1/      round, sum, attempt
        2/<client>              a reply behind its SHA-256, by step
        2.json                  the step has ended with these clients
        means                   the outcome of the first sum, as it was sent

A reply is on disk before its step ends, and the end of a step before the next message is sent.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from fedmomentum.errors import ModelError
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.protocol.secure_messages import FIRST_SUM
from fedmomentum.secure_sum.messages import STEPS
from fedmomentum.server.replies import Replies
from fedmomentum.utils.io import write_atomically, write_json
from fedmomentum.utils.names import directory_name
from fedmomentum.utils.records import Record, read_file, read_record, with_checksum
from fedmomentum.utils.schema import Count, Hash, PositiveCount, Text

DIGEST_BYTES = 32
SIGNATURES = STEPS.index("signatures")
"""The step after which clients open a sum."""
KEPT_SUMS = "secure"
"""The name of the subdirectory in a run's directory."""


class _RoundFile(Record, frozen=True, kw_only=True):
    """A round in which clients have trained.

    Attributes:
        attempt: The attempt at the round's sums.
        parties: The clients that trained.
        work: The hash of what they trained.
        failures: Client to why it did not train.
        uplink_bytes: Client to the bytes that it sent.
        downlink_bytes: Client to the bytes that it was sent.
    """

    format_version: Literal[2]
    attempt: PositiveCount
    parties: list[Text]
    work: Hash
    failures: dict[Text, str]
    uplink_bytes: dict[Text, Count]
    downlink_bytes: dict[Text, Count]


class _StepFile(Record, frozen=True, kw_only=True):
    format_version: Literal[1]
    parties: list[Text]


@dataclass(frozen=True)
class TrainedParties:
    """The clients whose updates are in a round's sums.

    Attributes:
        attempt: The attempt at the round's sums.
        parties: The clients, sorted.
        work: The hash of what they trained (`training_work`).
    """

    attempt: int
    parties: list[str]
    work: str


@dataclass(frozen=True)
class KeptSum:
    """One attempt at a sum on disk."""

    directory: Path

    def means(self, computed: StoredObject) -> StoredObject:
        """Return the sum's outcome as first sent to the clients, even if it has been recomputed.

        Another machine may compute other directions, but clients have already used the first ones.

        Raises:
            ModelError: If the file is damaged.
        """
        file = self.directory / "means"
        try:
            data = read_file(file, max_bytes=DIGEST_BYTES + len(computed.data))
        except FileNotFoundError:
            write_atomically(file, _with_digest(computed.data))
            return computed
        return StoredObject(_without_digest(data, file))

    def replies(self, step: int, parties: Sequence[str], max_bytes: int) -> Mapping[str, bytes]:
        """Return the kept replies of a step, each read on access."""
        directory = self.directory / str(step)
        files = {party: directory / directory_name(party) for party in parties}
        present = {party: file for party, file in files.items() if file.is_file()}
        return _Replies(present, max_bytes)

    def keep(self, step: int, party: str, reply: bytes) -> None:
        """Keep a reply."""
        directory = self.directory / str(step)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / directory_name(party), _with_digest(reply))

    def ended_with(self, step: int) -> list[str] | None:
        """Return the clients that took part in a finished step; None if it has not ended.

        Raises:
            ModelError: If the record is damaged.
        """
        try:
            return read_record(self.directory / f"{step}.json", _StepFile).parties
        except FileNotFoundError:
            return None

    def end(self, step: int, parties: Sequence[str]) -> None:
        """Record that a step has ended: clients that have not replied have dropped out."""
        table = {"format_version": 1, "parties": list(parties)}
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self.directory / f"{step}.json", with_checksum(table))


class KeptSums:
    """The directory in which the sums of uncommitted rounds are kept.

    Args:
        directory: Created with the first round.
        run_id: The run's identifier on the wire.
    """

    def __init__(self, directory: Path, run_id: str) -> None:
        # A run that has committed nothing gets a new name when it is started again.
        self._root = directory
        self._directory = directory / run_id

    def sum(self, server_round: int, number: int, attempt: int) -> KeptSum:
        """Return an attempt at a sum, whether begun or not."""
        return KeptSum(self._directory / f"{server_round:04d}-{number}-{attempt}")

    def round(self, server_round: int) -> tuple[TrainedParties, Replies] | None:
        """Return who trained in a round, with the failures and traffic noted; None if nobody has.

        Raises:
            ModelError: If the record is damaged.
        """
        file = self._round_file(server_round)
        try:
            record = read_record(file, _RoundFile)
        except FileNotFoundError:
            return None
        replies = Replies(
            failures=record.failures,
            uplink_bytes=record.uplink_bytes,
            downlink_bytes=record.downlink_bytes,
        )
        return TrainedParties(record.attempt, record.parties, record.work), replies

    def begin_round(self, server_round: int, trained: TrainedParties, replies: Replies) -> None:
        """Record who has trained in a round, before its first sum begins."""
        self._directory.mkdir(parents=True, exist_ok=True)
        table = {
            "format_version": 2,
            "attempt": trained.attempt,
            "parties": trained.parties,
            "work": trained.work,
            "failures": replies.failures,
            "uplink_bytes": replies.uplink_bytes,
            "downlink_bytes": replies.downlink_bytes,
        }
        write_json(self._round_file(server_round), with_checksum(msgspec.to_builtins(table)))

    def is_opened(self, server_round: int) -> bool:
        """Return whether clients may have opened an attempt at a round's first sum."""
        attempts = self._directory.glob(f"{server_round:04d}-{FIRST_SUM}-*")
        return any(KeptSum(attempt).ended_with(SIGNATURES) is not None for attempt in attempts)

    def clear(self) -> None:
        """Delete everything, once the round is committed."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _round_file(self, server_round: int) -> Path:
        return self._directory / f"{server_round:04d}.json"


class _Replies(Mapping[str, bytes]):
    """Each client's reply on disk."""

    def __init__(self, files: Mapping[str, Path], max_bytes: int) -> None:
        self._files = files
        self._max_bytes = max_bytes

    def __getitem__(self, party: str) -> bytes:
        file = self._files[party]
        data = read_file(file, max_bytes=self._max_bytes + DIGEST_BYTES)
        return _without_digest(data, file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _with_digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() + data


def _without_digest(data: bytes, file: Path) -> bytes:
    """Return the content that follows its hash.

    Raises:
        ModelError: If it is not what was written; damage would not show in masked values.
    """
    content = data[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != data[:DIGEST_BYTES]:
        raise ModelError(f"{file} was damaged or altered; restore it from a copy")
    return content
