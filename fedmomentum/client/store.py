"""What a client keeps between tasks: the objects of global models, and its own state.

A client keeps every object that it receives, so that the server need not send it again. If it can,
it builds objects that were not sent: a fresh adapter from its seed, a snapshot from its parts.
Content hashes verify that the result has the expected bits.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from fedmomentum.errors import FedMomentumError, MissingObject
from fedmomentum.global_model.client_state import ClientState, ClientStateFiles
from fedmomentum.global_model.consolidation import rebuild_snapshot
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject, prune_objects, save_objects
from fedmomentum.global_model.parts import adapter_objects
from fedmomentum.lora.adapter import Adapter, fresh_adapter
from fedmomentum.lora.half_precision import wire_dtype
from fedmomentum.protocol.adapter_terms import FreshAdapter
from fedmomentum.protocol.messages import DescribeRequest, MissingObjects, Task
from fedmomentum.protocol.secure_messages import SumRequest
from fedmomentum.utils.seeding import module_seed

if TYPE_CHECKING:
    from fedmomentum.formats.manifest import Recipe


LOG = logging.getLogger("fedmomentum")
S = TypeVar("S", bound=ClientState)


@dataclass
class ClientStore:
    """A client's objects on disk and in memory, and its state from earlier rounds.

    Attributes:
        directory: Where its files are, under `objects` and one directory for each kind of state.
        is_private: Whether no other client or run keeps files in this directory, so that files no
            longer needed can be deleted.
        retained_rounds: In a private store, state is kept for this many of the newest rounds, plus
            one.
        cache: Parsed objects by hash; the clients of one process may share it.
    """

    directory: Path
    is_private: bool = False
    retained_rounds: int = 3
    cache: dict[str, StoredObject] = field(default_factory=dict, repr=False)

    # ── global models ──

    def receive(self, task: Task, template: Adapter) -> GlobalModel | MissingObjects:
        """Save a task's objects, build those not sent, and return the task's global model.

        Args:
            task: A task that involves a global model.
            template: An adapter with the run's modules, shapes and ranks.

        Returns:
            The global model; or the objects that are still missing, which the server must send.

        Raises:
            ModelError: If the manifest or an object is invalid.
        """
        request = task.request
        if isinstance(request, DescribeRequest | SumRequest):
            raise TypeError("such a task names no global model")
        needed = set(request.needed)

        # Keep what was sent, but only what the request names.
        named = needed.union(*(recipe.fetched for recipe in request.recipes))
        self._save({name: data for name, data in task.objects.items() if name in named})

        # Build what was not sent.
        if request.fresh is not None:
            self._make_fresh_adapter(request.fresh, template, needed)
        self._make_snapshots(request.recipes, template)

        missing = [name for name in sorted(needed) if not self.has(name)]
        if missing:
            return MissingObjects(missing=missing)
        return GlobalModel.from_manifest(request.manifest, self.read, f"round {task.server_round}")

    def _make_fresh_adapter(
        self, fresh: FreshAdapter, template: Adapter, needed: Collection[str]
    ) -> None:
        """Initialize the round's adapter from its seed, and save its objects that are needed."""
        modules = {}
        for module, matrix in template.modules.items():
            seed = module_seed(fresh.seed, fresh.server_round, module)
            generator = torch.Generator().manual_seed(seed)
            modules[module] = fresh_adapter(
                matrix.shape, matrix.rank, generator, dtype=torch.float32
            )
        adapter = replace(template, modules=modules, saved={})
        for stored in adapter_objects(adapter, wire_dtype(fresh.dtype)).values():
            if stored.name in needed:
                self._save({stored.name: stored.data})

    def _make_snapshots(self, recipes: Sequence[Recipe], template: Adapter) -> None:
        """Build missing snapshots whose parts are available, oldest first.

        If the result has the wrong hash, it is dropped, and the server sends the snapshot.
        """
        if not recipes:
            return
        newest = recipes[-1].makes
        if self.has(newest):
            # If another client in this process built it, it may only be in the shared cache.
            self._save({newest: self.read(newest).data})
            return
        shapes = {module: matrix.shape for module, matrix in template.modules.items()}
        for recipe in recipes:
            sources = (*recipe.summed, recipe.ties)
            if self.has(recipe.makes) or not all(self.has(name) for name in sources):
                continue
            try:
                parts = [self.read(name) for name in recipe.summed]
                snapshot = rebuild_snapshot(parts, self.read(recipe.ties), shapes)
            except FedMomentumError as error:
                LOG.warning("snapshot %s... cannot be made here: %s", recipe.makes[:16], error)
                continue
            if snapshot.name == recipe.makes:
                self._save({snapshot.name: snapshot.data})
            else:
                LOG.warning(
                    "snapshot %s... came out as %s...; the server is asked to send it",
                    recipe.makes[:16],
                    snapshot.name[:16],
                )

    # ── objects ──

    def read(self, name: str) -> StoredObject:
        """Return an object, which is read and verified once per process.

        Raises:
            MissingObject: If it is missing or damaged.
        """
        if name not in self.cache:
            self.cache[name] = StoredObject.read(self.directory, name)
        return self.cache[name]

    def has(self, name: str) -> bool:
        """Return whether an object is available and undamaged."""
        try:
            self.read(name)
        except MissingObject:
            return False
        return True

    def evict(self, retained: Collection[str]) -> None:
        """Drop all objects but these from memory, and from disk if the directory is private."""
        for name in self.cache.keys() - set(retained):
            del self.cache[name]
        if self.is_private:
            prune_objects(self.directory, set(retained))

    def keep(self, objects: Mapping[str, bytes]) -> None:
        """Save received objects by their hashes, which are verified on reading.

        Raises:
            ModelError: If a name is not a hash.
        """
        self._save(dict(objects))

    def _save(self, objects: dict[str, bytes]) -> None:
        save_objects(objects, self.directory)

    # ── the client's state ──

    def load_state(
        self, state_type: type[S], run_id: str, client_id: str, last_round: int
    ) -> S | None:
        """Return a client's state as of a round; None if there is none that old.

        Raises:
            ModelError: If its file is damaged.
        """
        return ClientStateFiles(self.directory, run_id, state_type).load(client_id, last_round)

    def save_state(self, state: ClientState) -> None:
        """Save a client's state after a round, so that a repeated next round can start from it.

        In a run's directory, checkpoints determine which rounds are kept; a private store keeps the
        newest.
        """
        files = ClientStateFiles(self.directory, state.run_id, type(state))
        files.save(state)
        if self.is_private:
            files.retain_newest(state.client, self.retained_rounds + 1)
