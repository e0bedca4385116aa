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
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from fedmomentum.adapter import split_tensors
from fedmomentum.consolidation import Recipe
from fedmomentum.diagnostics import Update
from fedmomentum.errors import ModelError
from fedmomentum.files import read_safetensors, write_atomically, write_json
from fedmomentum.global_model import (
    Blob,
    GlobalModel,
    find_manifest,
    kept_rounds,
    merged_matrices,
    object_names,
    object_size,
    prune_objects,
    read_manifest,
    read_object,
    save_objects,
)
from fedmomentum.personal import prune_personal
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
    """

    run_id: str
    held: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    best_round: int = -1
    best_loss: float | None = None
    started_from: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    recipes: tuple[Recipe, ...] = ()

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

    Raises:
        ModelError: another process has it open.
    """

    def __init__(self, folder: Path | str, *, keep: int = 3) -> None:
        self.folder, self.keep = Path(folder), keep
        self.rows: list[dict[str, Any]] = []
        (self.folder / "rounds").mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ModelError(
                f"{self.folder} is in use by another process; wait for it or choose another --out"
            ) from error
        self.spool = Spool(self.folder / "updates")

    def close(self) -> None:
        """Let others open the folder."""
        self.spool.clear()
        self._lock.close()

    def resume(self) -> tuple[GlobalModel, ServerState] | None:
        """The last finished round, or None in a fresh folder; what an interrupted round left is swept up.

        Raises:
            ModelError: a damaged folder.
        """
        rounds = kept_rounds(self.folder)
        for leftover in self.folder.rglob(".*.tmp"):
            leftover.unlink()
        if not rounds:
            return None
        manifest = read_manifest(find_manifest(self.folder, rounds[-1]))
        model = GlobalModel.load(self.folder, rounds[-1])
        run = manifest["run"]
        state = ServerState(
            **{
                **run,
                "held": {client: tuple(names) for client, names in run["held"].items()},
                **{key: tuple(run.get(key, ())) for key in ("started_from", "merged")},
                "recipes": msgspec.convert(run.get("recipes", ()), tuple[Recipe, ...]),
            }
        )
        self.rows = [row for row in self._read_rows() if row["round"] <= rounds[-1]]
        if [row["round"] for row in self.rows] != list(range(rounds[-1] + 1)):
            raise ModelError(f"{self.folder / 'metrics.jsonl'} lacks rows of the rounds up to {rounds[-1]}")
        self._prune(state)
        return model, state

    def _read_rows(self) -> list[dict[str, Any]]:
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def last_update(self, model: GlobalModel, state: ServerState) -> Update | None:
        """What the round that led to `model` changed of the effective weights; None in round 0.

        Read from the objects that the state names, so that it is the same to the bit after a kill.
        """
        if not state.started_from:
            return None
        where, tensors = f"the start of round {model.server_round}", dict[str, Tensor]()
        for name in state.started_from:
            tensors |= read_safetensors(read_object(self.folder, name), where)[0]
        modules, _ = split_tensors(widened(tensors, dtype_of(tensors), where))
        merged = merged_matrices([Blob(read_object(self.folder, name)) for name in state.merged])
        told = (self.rows[model.server_round] if model.server_round < len(self.rows) else {}).get("diagnostics") or {}
        return Update(replace(model.adapter, modules=modules), model.adapter, merged, told.get("update_norm"))

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Keep objects that the next manifest will name, to be sent before it is written; a crash leaves no trace."""
        save_objects(objects, self.folder)

    def read(self, name: str) -> bytes:
        """The bytes of an object.

        Raises:
            MissingObject: it is not there.
        """
        return read_object(self.folder, name)

    def size(self, name: str) -> int:
        """How many bytes an object has.

        Raises:
            MissingObject: it is not there.
        """
        return object_size(self.folder, name)

    def commit(self, model: GlobalModel, state: ServerState, row: dict[str, Any]) -> None:
        """Make a round durable: after this returns it survives a crash; before, the round before it does."""
        newest = {blob.name: blob.data for blob in model.newest}  # else perhaps only in what is consolidated
        save_objects({**newest, **model.objects()}, self.folder)
        self.rows.append(row)
        write_atomically(self.folder / "metrics.jsonl", "".join(f"{json.dumps(r)}\n" for r in self.rows).encode())
        write_json(
            self.folder / "rounds" / f"{model.server_round:04d}.json",
            {**model.manifest(), "run": msgspec.to_builtins(state)},
        )
        self._prune(state)

    def _prune(self, state: ServerState) -> None:
        """Keep the last rounds and the best; delete the others, then the objects that no round names any more."""
        rounds = kept_rounds(self.folder)
        kept = {*rounds[-self.keep :], *({state.best_round} & set(rounds))}
        for server_round in set(rounds) - kept:
            (self.folder / "rounds" / f"{server_round:04d}.json").unlink()
        named = {*state.started_from, *state.merged, *(name for recipe in state.recipes for name in recipe.fetched)}
        for server_round in kept:
            manifest = read_manifest(self.folder / "rounds" / f"{server_round:04d}.json")
            named |= {manifest["carried"], *object_names(manifest)}
        if kept:
            prune_personal(self.folder, kept, state.run_id)
        prune_objects(self.folder, {name for name in named if name})
