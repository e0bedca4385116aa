"""Records on disk what a party has opened, so that it cannot be tricked into opening more.

The sum over a set of parties and the sum over a subset differ by the values of the missing parties.
So a party opens only one attempt at each sum, and never a sum earlier than the last one it opened.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from fedmomentum.errors import SecureSumError
from fedmomentum.secure_sum.messages import SumPlan
from fedmomentum.utils.io import write_json
from fedmomentum.utils.records import Record, read_record, with_checksum
from fedmomentum.utils.schema import Count, Schema


class RunProgress(Schema, frozen=True, kw_only=True):
    """A party's progress in one run.

    Attributes:
        begun: Round, sum and attempt that it last took part in.
        opened: Round and sum that it last opened; zeros if none.
    """

    begun: tuple[Count, Count, Count] = (0, 0, 0)
    opened: tuple[Count, Count] = (0, 0)


class _JournalFile(Record, frozen=True, kw_only=True):
    format_version: Literal[1]
    runs: dict[str, RunProgress]


class PartyJournal:
    """The file in which a party records what it takes part in and opens.

    Each entry is written to disk before the party sends what it refers to. Several processes may
    share a file.

    Args:
        file: The file, in an existing directory.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def begin(self, plan: SumPlan) -> None:
        """Record that the party takes part in an attempt at a sum.

        Raises:
            SecureSumError: If it is earlier than the party's last one, or its sum was opened.
        """
        with self._locked():
            runs = self._read()
            progress = runs.get(plan.run_id, RunProgress())
            # An opened sum is over, whatever the attempt.
            if plan.position[:2] <= progress.opened:
                raise SecureSumError(
                    f"{plan.title}: this party has opened sum {progress.opened[1]} of round "
                    f"{progress.opened[0]} already, and opens no sum twice: the difference of two "
                    "would show the values of single parties"
                )
            # The keys of an attempt depend on its number, so none may be repeated.
            if plan.position <= progress.begun:
                raise SecureSumError(
                    f"{plan.title}: this party has begun attempt {progress.begun[2]} at sum "
                    f"{progress.begun[1]} of round {progress.begun[0]}, and does not go back; "
                    "wanted a later attempt"
                )
            runs[plan.run_id] = msgspec.structs.replace(progress, begun=plan.position)
            self._write(runs)

    def open(self, plan: SumPlan) -> None:
        """Record that the party opens its shares of an attempt at a sum.

        Raises:
            SecureSumError: If it is not the attempt that the party last began, or the sum was
                opened before.
        """
        with self._locked():
            runs = self._read()
            progress = runs.get(plan.run_id, RunProgress())
            if plan.position[:2] <= progress.opened:
                raise SecureSumError(
                    f"{plan.title}: this party has opened shares of this sum already, and opens "
                    "no others"
                )
            if plan.position != progress.begun:
                raise SecureSumError(
                    f"{plan.title}: this party has begun a later attempt since; it opens nothing "
                    "of this one"
                )
            runs[plan.run_id] = msgspec.structs.replace(progress, opened=plan.position[:2])
            self._write(runs)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file's lock, so that no other process reads data that is about to change."""
        with self.file.with_name(f".{self.file.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, RunProgress]:
        try:
            return dict(read_record(self.file, _JournalFile, SecureSumError).runs)
        except FileNotFoundError:
            return {}

    def _write(self, runs: dict[str, RunProgress]) -> None:
        table = {"format_version": 1, "runs": msgspec.to_builtins(runs)}
        write_json(self.file, with_checksum(table))
