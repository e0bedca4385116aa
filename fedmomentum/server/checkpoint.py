"""`RunDirectory`: a checkpoint after every round, so that a crash loses no finished round.

::

    config.toml plan.json partition.json environment.json    what the run is
    metrics.jsonl                   one row per round
    updates/                        a round's updates, while they are needed
    rounds/0003.json                the global model's manifest and the server's state
    objects/<sha256>.safetensors    what the manifests name, shared by all rounds

A round is written in the order objects, metrics, manifest. The manifest is the commit: anything
without one (objects, an extra row, a temporary file, a round's updates) is deleted when the
directory is opened or the next round is committed.

The manifest guards everything that the next round depends on: itself with a checksum, objects with
their names and sizes, the rows of metrics with a hash, the settings with a copy. Whatever was
damaged or altered since is refused by name.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from fedmomentum.errors import FedMomentumError, FormatError, ModelError
from fedmomentum.formats.directories import (
    check_last_round,
    read_manifest,
    record_committed_round,
    retained_rounds,
    round_file,
)
from fedmomentum.formats.metrics_file import (
    METRICS,
    encode_record,
    metrics_prefix,
    parse_record_line,
)
from fedmomentum.formats.run_files import DATA
from fedmomentum.global_model.client_state_kinds import client_states
from fedmomentum.global_model.model import GlobalModel, object_names
from fedmomentum.global_model.objects import object_size, prune_objects, read_object, save_objects
from fedmomentum.server.checkpoint_reader import CheckpointReader
from fedmomentum.server.update_store import UpdateStore
from fedmomentum.utils.io import json_bytes, write_atomically, write_json
from fedmomentum.utils.records import with_checksum

if TYPE_CHECKING:
    from fedmomentum.formats.manifest import Fingerprint
    from fedmomentum.formats.round_record import RoundRecord
    from fedmomentum.server.diagnostics import GlobalUpdate
    from fedmomentum.server.state import ServerState


class RunDirectory:
    """The directory of one run, locked by the process that has it open.

    Args:
        path: Created if it does not exist.
        keep: How many of the last rounds to keep, in addition to the best.

    Attributes:
        records: The rows of metrics.jsonl so far.
        settings: The run's configuration as TOML; every checkpoint contains it.

    Raises:
        ModelError: If another process has it open, or a file is in the place of a subdirectory.
    """

    def __init__(self, path: Path | str, *, keep: int = 3) -> None:
        self.path, self.keep = Path(path), keep
        self.records: list[RoundRecord] = []
        self.settings = ""
        self._lines: list[bytes] = []
        self._data: dict[str, Any] | None = None
        self._later: list[int] = []
        self._named: dict[int, tuple[frozenset[str], frozenset[str]]] = {}
        self._finite: set[str] = set()
        self._lock = self._locked()
        self._reader = CheckpointReader(self.path)
        self.updates = UpdateStore(self.path / "updates")

    def _locked(self) -> IO[str]:
        """Create the directories and return the open lock file, which no other process holds."""
        for part in (
            self.path,
            self.path / "rounds",
            self.path / "objects",
            self.path / "updates",
        ):
            if os.path.lexists(part) and not part.is_dir():
                raise ModelError(f"{part} is no directory, and a run's has one there; move it away")
        (self.path / "rounds").mkdir(parents=True, exist_ok=True)
        file = self.path / ".lock"
        if os.path.lexists(file) and not file.is_file():
            raise ModelError(f"{file} is no regular file, and a run's lock is one; remove it")
        lock = file.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ModelError(
                f"{self.path} is in use by another process; wait for it or choose another --out"
            ) from error
        return lock

    def close(self) -> None:
        """Delete scratch files and release the lock."""
        self.updates.clear()
        self._lock.close()

    # ── reading ──

    def resume(self, server_round: int | None = None) -> tuple[GlobalModel, ServerState] | None:
        """Return the last finished round, or None in a fresh directory.

        Leftovers of an interrupted round are deleted.

        Everything that the next round depends on is checked: the manifest, all objects that it
        names, the rows of metrics. Nothing is deleted before all of it has been found intact.

        Args:
            server_round: Resume from this round instead of the last; later rounds are redone. Their
                checkpoints are deleted when the run starts (`describe`), and not before.

        Raises:
            ModelError: If anything was damaged or altered, or is missing; the message names it, and
                an intact older round if there is one.
        """
        # Choose the round: the requested one, or the last.
        rounds = retained_rounds(self.path)
        requested_round = server_round
        if server_round is None:
            check_last_round(self.path, rounds[-1] if rounds else -1)
            server_round = rounds[-1] if rounds else -1
        elif server_round not in rounds:
            raise ModelError(
                f"{self.path} keeps the rounds {rounds}; round {server_round} is not among them"
            )
        lines = self._reader.lines()
        # Without a checkpoint, there may be one row of metrics: that of an interrupted round 0.
        if server_round == -1:
            if len(lines) > 1:
                raise ModelError(
                    f"{self.path / METRICS} has {len(lines)} rows, and there is no checkpoint in "
                    f"{self.path / 'rounds'}. Restore that directory from a copy, or start over in "
                    "another --out"
                )
            self._sweep()
            return None
        # Read and check everything before anything is deleted.
        try:
            manifest, model, state = self._reader.read(server_round)
            self._reader.check_lines(
                lines, manifest, None if requested_round is None else rounds[-1]
            )
        except FormatError:
            raise
        except FedMomentumError as error:
            raise ModelError(
                f"{str(error).rstrip('.?')}. {self._reader.advice(server_round)}"
            ) from error

        self._sweep()
        assert manifest.run is not None  # ensured by read_manifest
        self._data = msgspec.to_builtins(manifest.run.data)
        self._lines = lines[: manifest.run.metrics.rows]
        self.records = [parse_record_line(line, "metrics", ModelError) for line in self._lines]
        self._later = [later for later in rounds if later > server_round]
        if not self._later:
            self._prune(state)
        return model, state

    def _sweep(self) -> None:
        for leftover in self.path.rglob(".*.tmp"):
            if leftover.is_symlink() or leftover.is_file():
                leftover.unlink()

    def last_update(self, model: GlobalModel, state: ServerState) -> GlobalUpdate | None:
        """Return the last round's change, which led to `model`; see `CheckpointReader`."""
        return self._reader.last_update(model, state, self.records)

    def read(self, name: str) -> bytes:
        """Return the bytes of an object.

        Raises:
            MissingObject: If it is missing or damaged.
        """
        return read_object(self.path, name)

    def size(self, name: str) -> int:
        """Return the size of an object in bytes.

        Raises:
            MissingObject: If it is missing.
        """
        return object_size(self.path, name)

    # ── writing ──

    def describe(
        self,
        settings: str,
        run_id: str,
        *,
        plan: Mapping[str, Any] | None = None,
        partition: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        data: Mapping[str, Fingerprint] | None = None,
    ) -> None:
        """Write config.toml and the given tables, which describe the run.

        Args:
            settings: The configuration as TOML; all checkpoints from now on contain it.
            run_id: The run's random name, which ties the files to it.
            plan: The fields of `Plan`.
            partition: Client to `train` and `test`, to category, to number of examples.
            environment: Versions, threads and the like.
            data: Fingerprints of the clients' data; all checkpoints from now on contain them.
        """
        self.settings = settings
        if self._later:
            record_committed_round(self.path, self._later[0] - 1)
            for later in self._later:
                round_file(self.path, later).unlink()
            self._later = []
        tables: dict[str, Mapping[str, Any] | None] = {
            "plan.json": plan,
            "environment.json": environment,
        }
        if partition is not None:
            tables["partition.json"] = {"clients": partition}
        if data is not None:
            self._data = msgspec.to_builtins(data)
            tables[DATA] = {"directory": str(self.path.resolve()), "clients": self._data}
        # Every table is written with its checksum and the run that it belongs to.
        contents = {"config.toml": settings.encode()}
        for name, table in tables.items():
            if table is not None:
                contents[name] = json_bytes(with_checksum({**table, "run_id": run_id}))
        for name, content in contents.items():
            self._replace(name, content)

    def _replace(self, name: str, content: bytes) -> None:
        """Write a file unless it already has that content, as it usually does in a resumed run."""
        file = self.path / name
        if os.path.lexists(file) and not file.is_file():
            raise ModelError(f"{file} is no regular file; move it away")
        if (
            not file.is_file()
            or file.stat().st_size != len(content)
            or file.read_bytes() != content
        ):
            write_atomically(file, content)

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Store objects that are sent before the manifest that names them is written."""
        save_objects(objects, self.path)

    def commit(self, model: GlobalModel, state: ServerState, record: RoundRecord) -> None:
        """Make a round durable: from the moment this returns, it survives a crash.

        Raises:
            ModelError: If the model or the row holds a non-finite number; nothing is written.
        """
        line = encode_record(record)
        # Objects first, then metrics, then the manifest: the manifest commits the round.
        self._check_finite(model)
        newest = {
            blob.name: blob.data for blob in model.newest
        }  # after consolidation, `model.objects()` may not contain them
        objects = {**newest, **model.objects()}
        save_objects(objects, self.path)
        self.records.append(record)
        self._lines.append(line)
        write_atomically(self.path / METRICS, b"".join(self._lines))
        # The manifest with everything that the next round depends on.
        manifest = model.manifest()
        own = object_names(manifest) | (
            {str(manifest["carried"])} if manifest["carried"] else set()
        )
        needed = own | _needed(state)
        table = {
            **manifest,
            "run": {
                **msgspec.to_builtins(state),
                "settings": self.settings,
                "metrics": msgspec.to_builtins(metrics_prefix(self._lines)),
                "data": self._data,
            },
            "sizes": {
                name: len(objects[name]) if name in objects else self.size(name)
                for name in sorted(needed)
            },
        }
        write_json(round_file(self.path, model.server_round), with_checksum(table))
        record_committed_round(self.path, model.server_round)
        self._named[model.server_round] = frozenset(own), frozenset(needed)
        self._prune(state)

    def _check_finite(self, model: GlobalModel) -> None:
        """Refuse a model with non-finite numbers; parts checked before are skipped."""
        try:
            model.check_finite(self._finite)
        except ModelError as error:
            raise ModelError(
                f"round {model.server_round} is not committed: {error}. The rounds before it are "
                "saved"
            ) from error
        self._finite = {blob.name for blob in (*model.newest, *model.base_update)}

    def _prune(self, state: ServerState) -> None:
        """Keep the last rounds and the best; delete the others, then unreferenced objects.

        For the last rounds, all objects are kept that resuming needs; for an older best one, only
        those of its model.
        """
        # The last rounds can be resumed from; an older best one is only kept for export.
        rounds = retained_rounds(self.path)
        last = set(rounds[-self.keep :])
        kept = last | ({state.best_round} & set(rounds))
        named = _needed(state)
        for server_round in sorted(kept):
            own, needed = self._names(server_round)
            named |= needed if server_round in last else own
        for server_round in set(rounds) - kept:
            round_file(self.path, server_round).unlink(missing_ok=True)
        if kept:
            for states in client_states(self.path, state.run_id):
                states.prune(kept)
        prune_objects(self.path, named)

    def _names(self, server_round: int) -> tuple[frozenset[str], frozenset[str]]:
        """Return the objects of a kept round's model, and all that its checkpoint names."""
        if server_round not in self._named:
            try:
                manifest = read_manifest(round_file(self.path, server_round))
            except FormatError:
                raise
            except ModelError as error:
                raise ModelError(
                    f"{error}. It is not needed to continue: restore it from a copy, or delete it"
                ) from error
            own = manifest.needed | ({manifest.carried} if manifest.carried else set())
            self._named[server_round] = own, frozenset(manifest.sizes)
        return self._named[server_round]


def _needed(state: ServerState) -> set[str]:
    """Return the objects that a state names; matches `RunState.needed` of its saved form."""
    return {
        *state.started_from,
        *state.merged,
        *([state.moments] if state.moments else []),
        *(name for recipe in state.recipes for name in recipe.fetched),
        *(outcome.means for outcome in state.outcomes.values()),
    }
