"""A run's folder: a checkpoint after every round, written so that a crash at any moment loses no finished round.

::

    config.toml  plan.json  partition.json  environment.json    what the run is
    metrics.jsonl                                               one row a round
    updates/                                                    a round's updates while they are needed
    rounds/0003.json                                            the global model's manifest and the server's state
    objects/<sha256>.safetensors                                what the manifests name, shared by all rounds

The order of writing is: objects, metrics, manifest. The manifest is the commit: what is there without it (objects,
a row too many, a temporary file, a round's updates) is swept up when the folder is opened or the next round is
committed.

The manifest guards everything that the next round depends on: itself by a checksum, objects by their names and sizes,
the rows of metrics by a hash, the settings by holding them. What was damaged or altered since is refused by name.
"""

from __future__ import annotations

import fcntl
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import msgspec
from torch import Tensor

from fedmomentum.config import Config, from_dict, load_config
from fedmomentum.diagnostics import Update
from fedmomentum.errors import FedMomentumError, FormatError, ModelError
from fedmomentum.files import json_bytes, read_safetensors, write_atomically, write_json
from fedmomentum.folders import check_last, find_manifest, kept_rounds, note_committed, read_manifest, round_file
from fedmomentum.global_model import (
    Blob,
    GlobalModel,
    adapter_parts,
    merged_matrices,
    object_names,
    object_size,
    prune_objects,
    read_object,
    save_objects,
    whole_instead,
)
from fedmomentum.manifest import Fingerprint, ModelFile, Recipe
from fedmomentum.personal import prune_personal
from fedmomentum.records import checksummed
from fedmomentum.run_files import DATA, METRICS, check_metrics, encode_row, metrics_prefix, parse_row, read_metrics
from fedmomentum.spool import Spool
from fedmomentum.wire import dtype_of, widened


@dataclass(frozen=True)
class ServerState:
    """What the server remembers between rounds, besides the global model.

    Attributes:
        run_id: names the run on the wire.
        held: client to the hashes of the objects it has said it holds.
        best_round: the evaluated round with the lowest loss on the items that all evaluations share; -1 if none.
        best_loss: its loss.
        started_from: hashes of the adapter's objects that the last round started from; none before the first. With
            `merged` and the adapter of now they say what that round changed, which the next one is compared with.
        merged: hashes of what the last round merged into the base.
        ranks: client to the rank at which it goes on; only of methods that prune, and of clients that have trained.
        recipes: how the last snapshots were made, oldest first, for whoever can make them too.
        splits: client to the hash of how its examples are divided, as it last said.
    """

    run_id: str
    held: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    best_round: int = -1
    best_loss: float | None = None
    started_from: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    recipes: tuple[Recipe, ...] = ()
    splits: Mapping[str, str] = field(default_factory=dict)

    def dividing(self, client_id: str, split: str) -> ServerState:
        """The state after a client said how its examples are divided."""
        return replace(self, splits={**self.splits, client_id: split})

    def holding(self, client_id: str, names: tuple[str, ...]) -> ServerState:
        """The state after a client said what it holds."""
        return replace(self, held={**self.held, client_id: tuple(sorted(names))})

    def stepped(self, before: GlobalModel, after: GlobalModel) -> ServerState:
        """The state after a round that led from one model to the other."""
        started_from = tuple(blob.name for blob in before.adapter_objects.values())
        return replace(self, started_from=started_from, merged=tuple(blob.name for blob in after.newest))


class RunFolder:
    """The folder of one run; open it in one process at a time.

    Args:
        folder: made if it is not there.
        keep: how many of the last rounds to keep, besides the best.

    Attributes:
        rows: the rows of metrics.jsonl so far.
        settings: the run's configuration as TOML; every checkpoint holds it.

    Raises:
        ModelError: If another process has it open, or files stand where its folders should be.
    """

    def __init__(self, folder: Path | str, *, keep: int = 3) -> None:
        self.folder, self.keep = Path(folder), keep
        self.rows: list[dict[str, Any]] = []
        self.settings = ""
        self._lines: list[bytes] = []
        self._data: dict[str, Any] | None = None
        self._later: list[int] = []
        self._named: dict[int, tuple[frozenset[str], frozenset[str]]] = {}
        self._finite: set[str] = set()
        self._lock = self._locked()
        self.spool = Spool(self.folder / "updates")

    def _locked(self) -> IO[str]:
        for part in (self.folder, self.folder / "rounds", self.folder / "objects", self.folder / "updates"):
            if os.path.lexists(part) and not part.is_dir():
                raise ModelError(f"{part} is no folder, and a run's has one there; move it away")
        (self.folder / "rounds").mkdir(parents=True, exist_ok=True)
        file = self.folder / ".lock"
        if os.path.lexists(file) and not file.is_file():
            raise ModelError(f"{file} is no regular file, and a run's lock is one; remove it")
        lock = file.open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise ModelError(
                f"{self.folder} is in use by another process; wait for it or choose another --out"
            ) from error
        return lock

    def close(self) -> None:
        """Let others open the folder."""
        self.spool.clear()
        self._lock.close()

    # ── reading ──

    def resume(self, server_round: int | None = None) -> tuple[GlobalModel, ServerState] | None:
        """Return the last finished round, or None in a fresh folder; what an interrupted round left is swept up.

        Everything that the next round depends on is checked: the manifest, all objects that it names, the rows of
        metrics. Nothing is deleted before all of it has been found whole.

        Args:
            server_round: take this round instead of the last; the rounds after it are done again. Their checkpoints
                are deleted when the run starts (`describe`), and not before.

        Raises:
            ModelError: If anything was damaged or altered, or is missing; the message names it, and an older round
                that is whole, if there is one.
        """
        rounds = kept_rounds(self.folder)
        asked = server_round
        if server_round is None:
            check_last(self.folder, rounds[-1] if rounds else -1)
            server_round = rounds[-1] if rounds else -1
        elif server_round not in rounds:
            raise ModelError(f"{self.folder} keeps the rounds {rounds}; round {server_round} is not among them")
        lines = self._read_lines()
        if server_round == -1:
            if len(lines) > 1:
                raise ModelError(
                    f"{self.folder / METRICS} has {len(lines)} rows, and there is no checkpoint in "
                    f"{self.folder / 'rounds'}. Restore that folder from a copy, or start anew in another --out"
                )
            self._sweep()
            return None
        try:
            manifest, model, state = self._read_round(server_round)
            self._check_lines(lines, manifest, None if asked is None else rounds[-1])
        except FormatError:
            raise
        except FedMomentumError as error:
            raise ModelError(f"{str(error).rstrip('.?')}. {self._what_to_do(server_round)}") from error

        self._sweep()
        assert manifest.run is not None  # read_manifest asks for it
        self._data = msgspec.to_builtins(manifest.run.data)
        self._lines = lines[: manifest.run.metrics.rows]
        self.rows = [parse_row(line, "metrics", ModelError) for line in self._lines]
        self._later = [later for later in rounds if later > server_round]
        if not self._later:
            self._prune(state)
        return model, state

    def _read_round(self, server_round: int) -> tuple[ModelFile, GlobalModel, ServerState]:
        """A round's checkpoint with all that the next round needs; each object is read, and its bytes are hashed."""
        file = round_file(self.folder, server_round)
        manifest = read_manifest(file)
        model = GlobalModel.read(self.folder, file)
        run = manifest.run
        assert run is not None  # read_manifest asks for it
        for name in sorted(run.needed - manifest.needed):
            read_object(self.folder, name, manifest.sizes[name])
        state = ServerState(
            run_id=run.run_id,
            held=run.held,
            best_round=run.best_round,
            best_loss=run.best_loss,
            started_from=run.started_from,
            merged=run.merged,
            ranks=run.ranks,
            recipes=run.recipes,
            splits=run.splits,
        )
        self.last_update(model, state)
        return manifest, model, state

    def _read_lines(self) -> list[bytes]:
        try:
            return read_metrics(self.folder / METRICS, ModelError)
        except FileNotFoundError:
            return []

    def _check_lines(self, lines: Sequence[bytes], manifest: ModelFile, last: int | None) -> None:
        """Refuse rows other than those that were committed.

        A killed run leaves one row more at most, which belongs to the round that it was about to commit. More of them
        mean that checkpoints are missing, unless the rounds up to `last` are to be done again.
        """
        assert manifest.run is not None
        path, wanted = self.folder / METRICS, manifest.run.metrics
        check_metrics(lines, wanted, path)
        most = wanted.rows + 1 + (last - manifest.round if last is not None else 0)
        if len(lines) > most:
            raise ModelError(
                f"{path} has rows of {len(lines)} rounds, and the last checkpoint is of round {manifest.round}; "
                "checkpoints are missing"
            )

    def _what_to_do(self, damaged: int) -> str:
        for server_round in reversed(kept_rounds(self.folder)):
            if server_round >= damaged:
                continue
            try:
                manifest, _, _ = self._read_round(server_round)
                check_metrics(self._read_lines(), manifest.run.metrics, self.folder / METRICS)  # type: ignore[union-attr]
            except FedMomentumError:
                continue
            return (
                f"Restore it from a copy; or resume from round {server_round}, which is whole, with --round "
                f"{server_round}: the rounds after it are then done again"
            )
        return "Restore it from a copy, or start anew in another --out"

    def _sweep(self) -> None:
        for leftover in self.folder.rglob(".*.tmp"):
            if leftover.is_symlink() or leftover.is_file():
                leftover.unlink()

    def last_update(self, model: GlobalModel, state: ServerState) -> Update | None:
        """What the round that led to `model` changed of the effective weights; None in round 0.

        Read from the objects that the state names, so that it is the same to the bit after a kill.

        Raises:
            ModelError: If one of them is missing or damaged, or holds something else than its part.
        """
        if not state.started_from:
            return None
        where, tensors = f"the start of round {model.server_round}", dict[str, Tensor]()
        for name in state.started_from:
            tensors |= read_safetensors(read_object(self.folder, name), where)[0]
        modules, _ = adapter_parts(widened(tensors, dtype_of(tensors), where), where)
        merged = merged_matrices([Blob.read(self.folder, name) for name in state.merged])
        told = (self.rows[model.server_round] if model.server_round < len(self.rows) else {}).get("diagnostics") or {}
        return Update(replace(model.adapter, modules=modules), model.adapter, merged, told.get("update_norm"))

    def read(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            MissingObject: it is not there, or damaged.
        """
        return read_object(self.folder, name)

    def size(self, name: str) -> int:
        """How many bytes an object has.

        Raises:
            MissingObject: it is not there.
        """
        return object_size(self.folder, name)

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
        """Write what the run is: config.toml, and those of plan, partition and environment that are given.

        Args:
            settings: the configuration as TOML; all checkpoints from here on hold it.
            run_id: the run's, to tie the files to it.
            plan: how `run.Plan` reads as a table.
            partition: client to `train` and `test`, to category, to number of examples.
            environment: versions, threads and the like.
            data: fingerprints of the clients' data; all checkpoints from here on hold them.
        """
        self.settings = settings
        if self._later:
            note_committed(self.folder, self._later[0] - 1)
            for later in self._later:
                round_file(self.folder, later).unlink()
            self._later = []
        tables: dict[str, Mapping[str, Any] | None] = {"plan.json": plan, "environment.json": environment}
        if partition is not None:
            tables["partition.json"] = {"clients": partition}
        if data is not None:
            self._data = msgspec.to_builtins(data)
            tables[DATA] = {"directory": str(self.folder.resolve()), "clients": self._data}
        contents = {"config.toml": settings.encode()}
        for name, table in tables.items():
            if table is not None:
                contents[name] = json_bytes(checksummed({**table, "run_id": run_id}))
        for name, content in contents.items():
            self._replace(name, content)

    def _replace(self, name: str, content: bytes) -> None:
        """Write a file where it does not hold that already: a resumed run mostly finds its own."""
        file = self.folder / name
        if os.path.lexists(file) and not file.is_file():
            raise ModelError(f"{file} is no regular file; move it away")
        if not file.is_file() or file.stat().st_size != len(content) or file.read_bytes() != content:
            write_atomically(file, content)

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Keep objects that the next manifest will name, to be sent before it is written; a crash leaves no trace."""
        save_objects(objects, self.folder)

    def commit(self, model: GlobalModel, state: ServerState, row: dict[str, Any]) -> None:
        """Make a round durable: after this returns it survives a crash; before, the round before it does.

        Raises:
            ModelError: If the model or the row holds a number that is not finite; nothing is written then.
        """
        line = encode_row(row)
        self._check_finite(model)
        newest = {blob.name: blob.data for blob in model.newest}  # else perhaps only in what is consolidated
        objects = {**newest, **model.objects()}
        save_objects(objects, self.folder)
        self.rows.append(row)
        self._lines.append(line)
        write_atomically(self.folder / METRICS, b"".join(self._lines))
        manifest = model.manifest()
        own = object_names(manifest) | ({str(manifest["carried"])} if manifest["carried"] else set())
        needed = own | _needed(state)
        table = {
            **manifest,
            "run": {
                **msgspec.to_builtins(state),
                "settings": self.settings,
                "metrics": msgspec.to_builtins(metrics_prefix(self._lines)),
                "data": self._data,
            },
            "sizes": {name: len(objects[name]) if name in objects else self.size(name) for name in sorted(needed)},
        }
        write_json(round_file(self.folder, model.server_round), checksummed(table))
        note_committed(self.folder, model.server_round)
        self._named[model.server_round] = frozenset(own), frozenset(needed)
        self._prune(state)

    def _check_finite(self, model: GlobalModel) -> None:
        """Refuse a model that could not be read again; what was checked in an earlier commit is not looked at again."""
        try:
            model.check_finite(self._finite)
        except ModelError as error:
            raise ModelError(
                f"round {model.server_round} is not committed: {error}. The rounds before it are saved"
            ) from error
        self._finite = {blob.name for blob in (*model.newest, *model.base_update)}

    def _prune(self, state: ServerState) -> None:
        """Keep the last rounds and the best; delete the others, then the objects that no round names any more.

        Of the last rounds all objects stay that are needed to go on from them, of an older best one the model's.
        """
        rounds = kept_rounds(self.folder)
        last = set(rounds[-self.keep :])
        kept = last | ({state.best_round} & set(rounds))
        named = _needed(state)
        for server_round in sorted(kept):
            own, needed = self._names(server_round)
            named |= needed if server_round in last else own
        for server_round in set(rounds) - kept:
            round_file(self.folder, server_round).unlink(missing_ok=True)
        if kept:
            prune_personal(self.folder, kept, state.run_id)
        prune_objects(self.folder, named)

    def _names(self, server_round: int) -> tuple[frozenset[str], frozenset[str]]:
        """The objects of a kept round's model, and all that its checkpoint names."""
        if server_round not in self._named:
            try:
                manifest = read_manifest(round_file(self.folder, server_round))
            except FormatError:
                raise
            except ModelError as error:
                raise ModelError(f"{error}. It is not needed to go on: restore it from a copy, or delete it") from error
            own = manifest.needed | ({manifest.carried} if manifest.carried else set())
            self._named[server_round] = own, frozenset(manifest.sizes)
        return self._named[server_round]


def _needed(state: ServerState) -> set[str]:
    """The objects that a state names: `RunState.needed` of what it is saved as."""
    return {*state.started_from, *state.merged, *(name for recipe in state.recipes for name in recipe.fetched)}


def saved_settings(folder: Path, server_round: int | None = None) -> Config | None:
    """Return the settings of the run in a folder: those of its last checkpoint, else those of config.toml.

    Args:
        folder: the run's.
        server_round: a kept round, where it is not to be the last.

    Returns:
        None where there is neither.

    Raises:
        ModelError: If the checkpoint was damaged.
        ConfigError: If there is none, and config.toml is no configuration.
    """
    rounds = kept_rounds(folder)
    if not rounds:
        file = folder / "config.toml"
        return load_config(file) if file.is_file() else None
    if server_round is None:
        check_last(folder, rounds[-1])
    file = find_manifest(folder, rounds[-1] if server_round is None else server_round)
    try:
        run = read_manifest(file).run
    except FormatError:
        raise
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.?')}. {whole_instead(folder, file)}") from error
    assert run is not None  # read_manifest asks for it
    if not run.settings:
        return None
    try:
        return from_dict(tomllib.loads(run.settings))
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"{file}: run.settings is not TOML: {error}") from error


def committed_rows(folder: Path, server_round: int) -> list[dict[str, Any]]:
    """Return the rows of metrics that a kept round was committed with.

    Raises:
        ModelError: If the checkpoint is damaged, or rows are missing or were altered.
    """
    run = read_manifest(round_file(folder, server_round)).run
    assert run is not None  # read_manifest asks for it
    path = folder / METRICS
    try:
        lines = read_metrics(path, ModelError)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; restore it from a copy") from None
    check_metrics(lines, run.metrics, path)
    return [parse_row(line, f"{path}, line {n}", ModelError) for n, line in enumerate(lines[: run.metrics.rows], 1)]
