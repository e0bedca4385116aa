"""`GlobalModel`: the versioned model that a federation trains, and its directory.

The model's weight is, per module, `W = base + sum(base_update) + scaling * B A` in float32. Saving,
loading, evaluating, exporting, resuming and sending all use this object, since the adapter alone is
not the whole result.

The directory (format version 3)::

    global_model.json       the manifest: all parts of the model, by content hash
    objects/<sha256>.safetensors

A run's directory holds a manifest for every round that it keeps, such as `rounds/0003.json` for
round 3, and one `objects/` for all. Their fields are those of `formats.manifest`: `Manifest` on the
wire, `ModelFile` on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.errors import FedMomentumError, FormatError, ModelError
from fedmomentum.formats.directories import (
    MANIFEST,
    find_manifest,
    read_manifest,
    retained_rounds,
    round_file,
)
from fedmomentum.formats.manifest import FORMAT, FORMAT_VERSION, Manifest, as_manifest
from fedmomentum.global_model.objects import StoredObject, save_objects, sum_objects
from fedmomentum.global_model.parts import (
    ADAPTER_TITLE,
    Fetch,
    adapter_objects,
    check_changes,
    checked,
    read_adapter_objects,
    rounding_losses,
    split_adapter,
    without_tail,
)
from fedmomentum.linalg.low_rank import LowRank, weighted_sum, zeros
from fedmomentum.linalg.matrix import Matrix, add
from fedmomentum.linalg.weighted_sum import exact_sum
from fedmomentum.lora.adapter import Adapter, to_tensors
from fedmomentum.lora.half_precision import roundtrip
from fedmomentum.utils.io import sha256, write_json
from fedmomentum.utils.records import with_checksum

if TYPE_CHECKING:
    from fedmomentum.aggregation.aggregate import AggregationResult


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """A base model's identity, everything that was merged into it, and the live adapter.

    Attributes:
        base: The base model.
        adapter: The live adapter, applied with its own scaling.
        base_update: The merged parts, oldest first; order and bytes are part of the version.
        carried: Module to the residual that the method adds to its next sum; not part of the
            effective model.
        server_round: The number of completed rounds; 0 is the base model with a fresh adapter.
        method: The method and its settings, as its `repr`.
        personal: The factors that the method leaves with each client, such as `B`. If there are
            any, the server's copy of them is what all clients started from (see `personal`).
        adapter_dtype: The dtype in which the adapter's factors are sent and stored; `adapter` holds
            them as they arrive, in float32.
        newest: What the last round merged, even if it has been consolidated since; empty in a model
            that was read from disk.
    """

    base: BaseIdentity
    adapter: Adapter
    base_update: tuple[StoredObject, ...] = ()
    carried: Mapping[str, Matrix] = field(default_factory=dict)
    server_round: int = 0
    method: str = ""
    personal: str = ""
    adapter_dtype: torch.dtype = torch.float32
    newest: tuple[StoredObject, ...] = field(default=(), repr=False)

    # ── version ──

    @cached_property
    def version(self) -> str:
        """The SHA-256 over the base's identity and the hashes of `base_update` in order.

        Computed weights are not part of it, since their last bits differ between machines.
        """
        return version_of(self.base, [stored.name for stored in self.base_update])

    @cached_property
    def adapter_objects(self) -> dict[str, StoredObject]:
        """The adapter as the objects that are sent and stored; see `adapter_objects`."""
        return adapter_objects(self.adapter, self.adapter_dtype)

    # ── the round ──

    def with_wire_dtype(self, dtype: torch.dtype) -> GlobalModel:
        """Return the model with factors sent in `dtype`; for a fresh adapter, with B = 0."""
        return replace(self, adapter=roundtrip(self.adapter, dtype), adapter_dtype=dtype)

    def advance(
        self, aggregate: AggregationResult, method: str, *, exact: bool = True
    ) -> GlobalModel:
        """Return the next round's model: the aggregate's adapter, its residual in `base_update`.

        The adapter is what arrives at the clients. If its factors are sent in 16 bits, what
        rounding removes, `s (B A - B' A')` with at most twice the adapter's rank, is added to the
        residual.

        Args:
            aggregate: The method's result for the round.
            method: The method's `repr`.
            exact: Whether the method is exact; otherwise rounding is not compensated.
        """
        adapter = roundtrip(aggregate.adapter, self.adapter_dtype)
        residual = dict(aggregate.residual)
        # What rounding removes from the adapter goes into the base.
        if exact and adapter is not aggregate.adapter:
            for module, lost in rounding_losses(aggregate.adapter, adapter).items():
                total: Matrix = lost
                if module in residual:
                    total = add(residual[module].to(torch.float64), lost)
                if isinstance(total, LowRank):
                    total = total.recompress()
                residual[module] = total.to(torch.float32)
        newest = self._as_objects(residual)
        return replace(
            self,
            adapter=replace(adapter, config=self.adapter.config, name=ADAPTER_TITLE),
            base_update=self.base_update + newest,
            carried=aggregate.carried,
            server_round=self.server_round + 1,
            method=method,
            newest=newest,
        )

    def unchanged(self) -> GlobalModel:
        """Return the next round's model after a round without a result."""
        return replace(self, server_round=self.server_round + 1, newest=())

    def _as_objects(self, residual: Mapping[str, Matrix]) -> tuple[StoredObject, ...]:
        """Return the residual as objects: two if it ends with the first object of `base_update`.

        FRLoRA subtracts its start in every round, so it is stored and sent only once.
        """
        if not residual:
            return ()
        first = self.base_update[0].matrices if self.base_update else {}
        if first.keys() != residual.keys():
            return (StoredObject.of(residual),)
        heads = {}
        for module, matrix in residual.items():
            head = without_tail(matrix, first[module])
            if head is None:
                return (StoredObject.of(residual),)
            heads[module] = head
        return StoredObject.of(heads), self.base_update[0]

    # ── what it adds to the base weights ──

    def merged(self, module: str) -> Matrix:
        """Return the sum of everything that was merged into `module`, in float64."""
        terms = [
            stored.matrices[module] for stored in self.base_update if module in stored.matrices
        ]
        if not terms:
            return zeros(self.adapter.modules[module].shape, dtype=torch.float64)
        return exact_sum([], [], terms)

    def effective(self, module: str) -> Matrix:
        """Return `sum(base_update) + scaling * B A` of a module, `(out, in)`, in float64."""
        merged = self.merged(module)
        live = self.adapter.effective(module)
        if isinstance(merged, LowRank):
            return weighted_sum([merged, live], [1.0, 1.0])
        return merged + live.dense()

    def merged_last(self) -> dict[str, Matrix]:
        """Return what the last round merged, by module; empty in a model read from disk."""
        return sum_objects(self.newest)

    # ── manifest and objects ──

    def manifest(self) -> dict[str, Any]:
        """Return the model's manifest as JSON values, with every tensor by its object's hash."""
        carried = self._carried_object()
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base": self.base.record(),
            "base_update": [stored.name for stored in self.base_update],
            "version": self.version,
            "adapter": {kind: stored.name for kind, stored in self.adapter_objects.items()},
            "adapter_config": dict(self.adapter.config),
            "scalings": dict(self.adapter.scalings),
            "carried": carried.name if carried else None,
            "round": self.server_round,
            "method": self.method,
            "personal": self.personal,
        }

    def objects(self) -> dict[str, bytes]:
        """Return the bytes of every object in the manifest, keyed by hash."""
        stored_objects = [*self.base_update, *self.adapter_objects.values()]
        carried = self._carried_object()
        if carried:
            stored_objects.append(carried)
        return {stored.name: stored.data for stored in stored_objects}

    def _carried_object(self) -> StoredObject | None:
        return StoredObject.of(self.carried) if self.carried else None

    @classmethod
    def from_manifest(
        cls, manifest: Manifest | Mapping[str, Any], fetch: Fetch, where: str
    ) -> GlobalModel:
        """Assemble a model from its manifest and its objects.

        Args:
            manifest: The result of `manifest`; plain JSON values are checked first.
            fetch: From hash to object; the hash of its bytes is checked here.
            where: What messages call the model.

        Raises:
            ModelError: If it has another format or version, a field is invalid, an object does not
                match its hash or holds unexpected tensors, or the model's version is not the stated
                one.
            PayloadError: If an object is not a safetensors file.
        """
        # Parse, checking every part against its hash.
        manifest = as_manifest(manifest, where)
        fetch = checked(fetch, where)
        adapter, adapter_dtype = read_adapter_objects(manifest, fetch, where)
        base_update = tuple(fetch(name) for name in manifest.base_update)
        carried = fetch(manifest.carried) if manifest.carried else None
        changes = (*base_update, carried) if carried else base_update
        check_changes(changes, adapter, where)

        # Assemble, and compare the version with the stated one.
        model = cls(
            base=BaseIdentity.of(manifest.base),
            adapter=adapter,
            base_update=base_update,
            carried=carried.matrices if carried else {},
            server_round=manifest.round,
            method=manifest.method,
            personal=manifest.personal,
            adapter_dtype=adapter_dtype,
        )
        if model.version != manifest.version:
            raise ModelError(
                f"{where}: the parts give version {model.version[:16]}, but the manifest states "
                f"{manifest.version[:16]}"
            )
        return model

    # ── directory ──

    def save(self, directory: Path | str) -> None:
        """Write the model to a directory: objects first, the manifest last, each atomically.

        Raises:
            ModelError: If a number is not finite; nothing is written.
        """
        self.check_finite()
        directory = Path(directory)
        objects = self.objects()
        save_objects(objects, directory)
        sizes = {name: len(data) for name, data in sorted(objects.items())}
        write_json(directory / MANIFEST, with_checksum({**self.manifest(), "sizes": sizes}))

    def check_finite(self, known: Collection[str] = ()) -> None:
        """Refuse a model that holds NaN or Inf, since it could not be read again.

        Args:
            known: Hashes of merged objects that were checked before.

        Raises:
            ModelError: If a tensor is not finite; the message names it.
        """
        split_adapter(to_tensors(self.adapter), "the adapter")
        carried = self._carried_object()
        changes = [*self.newest, *self.base_update]
        if carried:
            changes.append(carried)
        for stored in changes:
            if stored.name not in known:
                _ = stored.matrices  # parsing checks them

    @classmethod
    def load(cls, directory: Path | str, server_round: int | str = "last") -> GlobalModel:
        """Read a saved global model, or a round of a run.

        Args:
            directory: A directory with `global_model.json`, or a run's directory with `rounds/`.
            server_round: For a run: a number, `last` or `best`.

        Raises:
            ModelError: If there is no model, the round is not kept, or a file is damaged; if
                another round of the run is undamaged, the message names it.
        """
        directory = Path(directory)
        file = find_manifest(directory, server_round)
        try:
            return cls.read(directory, file)
        except FormatError:
            raise
        except FedMomentumError as error:
            advice = suggest_undamaged_round(directory, file)
            raise ModelError(f"{str(error).rstrip('.?')}. {advice}") from error

    @classmethod
    def read(cls, directory: Path, file: Path) -> GlobalModel:
        """Read the model of one manifest.

        Raises:
            ModelError: If a file is missing or damaged.
        """
        manifest = read_manifest(file)

        def fetch(name: str) -> StoredObject:
            return StoredObject.read(directory, name, manifest.sizes.get(name))

        return cls.from_manifest(manifest, fetch, str(file))


# ── versions and rounds ───────────────────────────────────────────────────────────────────────────


def object_names(manifest: Manifest | Mapping[str, Any]) -> set[str]:
    """Return the hashes of the objects in a manifest that a client needs.

    Raises:
        ModelError: If the manifest is not valid.
    """
    return set(as_manifest(manifest, "the manifest").needed)


def version_of(base: BaseIdentity, names: Sequence[str]) -> str:
    """Return the version of a base model with a `base_update` that has these hashes."""
    base_name = base.sha256 or f"{base.name}@{base.revision}"
    # Labels define what a classifier's outputs mean; the prefix keeps them distinct from hashes.
    labels = [f"label {label!r}" for label in base.labels]
    quantization = [f"quantization {base.quantization}"] if base.quantization else []
    return sha256("\n".join([base_name, *labels, *quantization, *names]).encode())


def suggest_undamaged_round(directory: Path, damaged: Path) -> str:
    """Return advice on a damaged model: another round of the run that can be loaded, if any."""
    for server_round in reversed(retained_rounds(directory)):
        file = round_file(directory, server_round)
        if file == damaged:
            continue
        try:
            GlobalModel.read(directory, file)
        except FedMomentumError:
            continue
        return (
            f"Restore the file from a copy, or use round {server_round}, which is undamaged: "
            f"--round {server_round}"
        )
    return "Restore it from a copy"
