"""`GlobalModel`: the one versioned object that a federation trains, and its folder.

The exact model is, per module, `W = base + sum(base_update) + scaling * B A` in float32. Saving, loading,
evaluating, exporting, resuming and sending all go through this object; the adapter alone is not the result.

The folder (format version 2)::

    global_model.json       the manifest: what belongs to the model, by content hash
    objects/<sha256>.safetensors

A run's folder holds many: `rounds/0003.json` is the manifest of round 3, and all share one `objects/`. The manifest's
keys are those of `GlobalModel.manifest`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmomentum.adapter import Adapter, split_tensors, to_tensors
from fedmomentum.aggregation.whole import AdapterAggregate
from fedmomentum.errors import MissingObject, ModelError
from fedmomentum.files import read_safetensors, safetensors_bytes, sha256, write_atomically, write_json
from fedmomentum.identity import BaseIdentity
from fedmomentum.lowrank import LowRank, difference, weighted_sum, zeros
from fedmomentum.sums import Matrix, exact_sum, plus
from fedmomentum.wire import dtype_of, narrowed, rounded, widened

FORMAT = "fedmomentum global model"
FORMAT_VERSION = 2
MANIFEST = "global_model.json"
MANIFEST_KEYS = (
    "base", "base_update", "version", "adapter", "adapter_config", "scalings", "carried", "round", "method", "personal",
)  # fmt: skip


@dataclass(frozen=True)
class Blob:
    """Matrices by module, as the bytes that are sent and kept; their hash is their name.

    The tensors are `<module>.B` and `<module>.A` for a low-rank matrix, `<module>.dense` for a dense one, in
    float32 and in effective-weight units: they are added to the base with factor 1.
    """

    data: bytes = field(repr=False)

    @cached_property
    def name(self) -> str:
        """SHA-256 of the bytes."""
        return sha256(self.data)

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Module to its matrix, `(out, in)`.

        Raises:
            PayloadError: the bytes are no safetensors.
            ModelError: tensors that are not of the form above, or hold NaN or Inf.
        """
        name = f"object {self.name[:16]}"
        tensors, _ = read_safetensors(self.data, name)
        for key, tensor in tensors.items():
            if tensor.dtype != torch.float32 or tensor.ndim != 2:
                raise ModelError(f"{name}: {key} is {tensor.dtype} {tuple(tensor.shape)}; wanted a float32 matrix")
            if not bool(torch.isfinite(tensor).all()):
                raise ModelError(f"{name}: {key} holds NaN or Inf")
        found: dict[str, Matrix] = {}
        for key in sorted(tensors):
            module, _, kind = key.rpartition(".")
            if kind == "dense":
                if module in found:
                    raise ModelError(f"{name} holds module {module} in factors and dense")
                found[module] = tensors[key]
            elif kind == "A" and f"{module}.B" in tensors:
                try:
                    found[module] = LowRank(tensors[f"{module}.B"], tensors[key])
                except ValueError as error:
                    raise ModelError(f"{name}: module {module}: {error}") from error
            elif kind != "B" or f"{module}.A" not in tensors:
                raise ModelError(f"{name} holds {key}, which is no part of a base update")
        return found

    @classmethod
    def of(cls, matrices: Mapping[str, Matrix]) -> Blob:
        """The blob of these matrices, cast to float32."""
        tensors = {}
        for module, matrix in matrices.items():
            if isinstance(matrix, LowRank):
                tensors[f"{module}.B"] = matrix.B.to(torch.float32).cpu()
                tensors[f"{module}.A"] = matrix.A.to(torch.float32).cpu()
            else:
                tensors[f"{module}.dense"] = matrix.to(torch.float32).cpu()
        return cls(safetensors_bytes(tensors))


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """A base model's identity, everything merged into it so far, and the live adapter.

    Attributes:
        base: which base.
        adapter: the live adapter, counted with its own scaling.
        base_update: what was merged, oldest first; order and bytes are part of the version.
        carried: module to what the method keeps for its next sum; no part of the effective model.
        server_round: how many rounds made it; 0 is the untouched model with a fresh adapter.
        method: the method and its settings, as its `repr`.
        personal: the factors that the method leaves with each client, such as `B`. Where there are some, this model
            is nobody's: what the server has of them is what all clients started from (see `personal`).
        adapter_dtype: what the adapter's factors are sent and kept in; `adapter` holds what that leaves of them.
        newest: what the last round merged, also where it is consolidated by now; nothing in a model that was read.
    """

    base: BaseIdentity
    adapter: Adapter
    base_update: tuple[Blob, ...] = ()
    carried: Mapping[str, Matrix] = field(default_factory=dict)
    server_round: int = 0
    method: str = ""
    personal: str = ""
    adapter_dtype: torch.dtype = torch.float32
    newest: tuple[Blob, ...] = field(default=(), repr=False)

    # ── version ──

    @cached_property
    def version(self) -> str:
        """SHA-256 over the base's identity and the hashes of `base_update` in order; never over computed weights."""
        return version_of(self.base, [blob.name for blob in self.base_update])

    @cached_property
    def adapter_objects(self) -> dict[str, Blob]:
        """The adapter as the bytes that are sent and kept: all factors `B`, all factors `A`, and what else is `saved`.

        Apart, so that a factor that did not change is not sent again.
        """
        tensors, parts = narrowed(to_tensors(self.adapter), self.adapter_dtype), dict[str, dict[str, Tensor]]()
        for name, tensor in tensors.items():
            kind = "B" if ".lora_B.weight" in name else "A" if ".lora_A.weight" in name else "saved"
            parts.setdefault(kind, {})[name] = tensor
        return {kind: Blob(safetensors_bytes(part)) for kind, part in sorted(parts.items())}

    # ── the round ──

    def sent_in(self, dtype: torch.dtype) -> GlobalModel:
        """The same model, its adapter's factors in `dtype` from here on; for a fresh adapter, whose B is zero."""
        return replace(self, adapter=rounded(self.adapter, dtype), adapter_dtype=dtype)

    def after(self, aggregate: AdapterAggregate, method: str, *, exact: bool = True) -> GlobalModel:
        """The next round's model: the aggregate's adapter, its residual appended to `base_update`.

        The adapter is what arrives at the clients: with factors in 16 bits, what rounding takes from it goes into
        the residual, `s (B A - B' A')` of rank at most twice the adapter's, unless the method is inexact anyway.
        """
        adapter = rounded(aggregate.adapter, self.adapter_dtype)
        residual = dict(aggregate.residual)
        if exact and adapter is not aggregate.adapter:
            for module, matrix in aggregate.adapter.modules.items():
                lost = difference(matrix, adapter.modules[module]).scaled(adapter.scalings[module])
                whole = plus(residual[module].to(torch.float64), lost) if module in residual else lost
                whole = whole.recompress() if isinstance(whole, LowRank) else whole
                residual[module] = whole.to(torch.float32)
        newest = self._parts(residual)
        return replace(
            self,
            adapter=replace(adapter, config=self.adapter.config, name="global adapter"),
            base_update=self.base_update + newest,
            carried=aggregate.carried,
            server_round=self.server_round + 1,
            method=method,
            newest=newest,
        )

    def _parts(self, residual: Mapping[str, Matrix]) -> tuple[Blob, ...]:
        """The residual as blobs: two where its last components are those that `base_update` begins with.

        So FRLoRA takes off its start anew in every round without sending it anew.
        """
        if not residual:
            return ()
        known = self.base_update[0].matrices if self.base_update else {}
        front = {}
        for module, matrix in residual.items():
            part = known.get(module)
            if not isinstance(part, LowRank) or not isinstance(matrix, LowRank) or known.keys() != residual.keys():
                return (Blob.of(residual),)
            if part.rank >= matrix.rank:
                return (Blob.of(residual),)
            split = matrix.rank - part.rank
            if not torch.equal(matrix.B[:, split:], part.B) or not torch.equal(matrix.A[split:], part.A):
                return (Blob.of(residual),)
            front[module] = LowRank(matrix.B[:, :split].contiguous(), matrix.A[:split].contiguous())
        return Blob.of(front), self.base_update[0]

    # ── what it is ──

    def merged(self, module: str) -> LowRank | Tensor:
        """Everything merged into `module` so far, by `exact_sum`, in float64."""
        parts = [blob.matrices[module] for blob in self.base_update if module in blob.matrices]
        return exact_sum([], [], parts) if parts else zeros(self.adapter.modules[module].shape, dtype=torch.float64)

    def effective(self, module: str) -> LowRank | Tensor:
        """`sum(base_update) + scaling * B A`: what this model adds to the base weight of `module`, in float64."""
        merged, live = self.merged(module), self.adapter.effective(module)
        if isinstance(merged, LowRank):
            return weighted_sum([merged, live], [1.0, 1.0])
        return merged + live.dense()

    def merged_last(self) -> dict[str, Matrix]:
        """What the last round merged into each module; nothing in a model that was read."""
        return merged_matrices(self.newest)

    # ── folder ──

    def manifest(self) -> dict[str, Any]:
        """What `global_model.json` holds: every part by content hash, and what is no tensor in full."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "base": asdict(self.base),
            "base_update": [blob.name for blob in self.base_update],
            "version": self.version,
            "adapter": {kind: blob.name for kind, blob in self.adapter_objects.items()},
            "adapter_config": dict(self.adapter.config),
            "scalings": dict(self.adapter.scalings),
            "carried": Blob.of(self.carried).name if self.carried else None,
            "round": self.server_round,
            "method": self.method,
            "personal": self.personal,
        }

    def objects(self) -> dict[str, bytes]:
        """Every object of the manifest: hash to bytes."""
        blobs = [*self.base_update, *self.adapter_objects.values()]
        blobs += [Blob.of(self.carried)] if self.carried else []
        return {blob.name: blob.data for blob in blobs}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], fetch: Callable[[str], Blob], where: str) -> GlobalModel:
        """Put a model together from its manifest and its objects.

        Args:
            manifest: as `manifest` made it.
            fetch: hash to object; its bytes are checked against the hash here.
            where: what to call it in messages.

        Raises:
            ModelError: not our format, a newer one, an object that does not match its hash, or another version
                than the manifest states.
        """
        if manifest.get("format") != FORMAT:
            raise ModelError(f"{where} is not a {FORMAT} (format {manifest.get('format')!r})")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise ModelError(
                f"{where} has format_version {manifest.get('format_version')!r}; this fedmomentum reads "
                f"{FORMAT_VERSION}. Use the fedmomentum that wrote it, or a newer one"
            )
        lacking = [key for key in MANIFEST_KEYS if key not in manifest]
        if lacking:
            raise ModelError(f"{where}: the manifest lacks {lacking[0]}")

        def checked(name: str) -> Blob:
            blob = fetch(name)
            if blob.name != name:
                raise ModelError(f"{where}: object {name[:16]}... does not match its hash; it was damaged or altered")
            return blob

        object_names(manifest)
        tensors: dict[str, Tensor] = {}
        for name in manifest["adapter"].values():
            tensors |= read_safetensors(checked(name).data, where)[0]
        adapter_dtype = dtype_of(tensors)
        modules, saved = split_tensors(widened(tensors, adapter_dtype, where))
        if modules.keys() != manifest["scalings"].keys():
            raise ModelError(f"{where}: the manifest's scalings and the adapter's modules differ")
        adapter = Adapter(modules, manifest["scalings"], saved, manifest["adapter_config"], name="global adapter")
        carried = checked(manifest["carried"]).matrices if manifest["carried"] else {}
        model = cls(
            base=BaseIdentity(**manifest["base"]),
            adapter=adapter,
            base_update=tuple(checked(name) for name in manifest["base_update"]),
            carried=carried,
            server_round=manifest["round"],
            method=manifest["method"],
            personal=manifest["personal"],
            adapter_dtype=adapter_dtype,
        )
        if model.version != manifest["version"]:
            raise ModelError(f"{where}: version {model.version[:16]} came out, {manifest['version'][:16]} was stated")
        return model

    def save(self, folder: Path | str) -> None:
        """Write the model into `folder`: objects first, the manifest last, each atomically."""
        folder = Path(folder)
        save_objects(self.objects(), folder)
        write_json(folder / MANIFEST, self.manifest())

    @classmethod
    def load(cls, folder: Path | str, server_round: int | str = "last") -> GlobalModel:
        """Read a global model's folder, or a round of a run's folder.

        Args:
            folder: holds `global_model.json`, or a run's `rounds/`.
            server_round: for a run: a number, `last` or `best`.

        Raises:
            ModelError: nothing of the kind there, the round is not kept, or what `from_manifest` refuses.
        """
        folder = Path(folder)
        file = find_manifest(folder, server_round)
        return cls.from_manifest(read_manifest(file), lambda name: Blob(read_object(folder, name)), str(file))


def merged_matrices(blobs: Sequence[Blob]) -> dict[str, Matrix]:
    """Module to the sum of its matrices in the blobs."""
    parts = by_module(blobs)
    return {m: matrices[0] if len(matrices) == 1 else exact_sum([], [], matrices) for m, matrices in parts.items()}


def by_module(blobs: Sequence[Blob]) -> dict[str, list[Matrix]]:
    """Module, in sorted order, to its matrices in the blobs."""
    found: dict[str, list[Matrix]] = {}
    for blob in blobs:
        for module, matrix in blob.matrices.items():
            found.setdefault(module, []).append(matrix)
    return dict(sorted(found.items()))


def object_names(manifest: Mapping[str, Any]) -> set[str]:
    """The objects that a client needs of a manifest; what is carried is the server's own.

    Raises:
        ModelError: the manifest does not name them as it should.
    """
    update, adapter = manifest.get("base_update"), manifest.get("adapter")
    if not isinstance(update, (list, tuple)) or not isinstance(adapter, Mapping):
        raise ModelError("the manifest names no objects: wanted a list base_update and a table adapter")
    names = {*map(str, update), *map(str, adapter.values())}
    for name in names:
        check_name(name)
    return names


def version_of(base: BaseIdentity, names: Sequence[str]) -> str:
    """The version of a base with this `base_update`."""
    return sha256("\n".join([base.sha256 or f"{base.name}@{base.revision}", *names]).encode())


def object_file(folder: Path, name: str) -> Path:
    """Where an object lies; `name` is checked to be a hash, so that no path can hide in it.

    Raises:
        ModelError: not 64 hexadecimal digits.
    """
    check_name(name)
    return folder / "objects" / f"{name}.safetensors"


def check_name(name: Any) -> None:
    """Refuse what is no object's name.

    Raises:
        ModelError: not 64 hexadecimal digits.
    """
    if not isinstance(name, str) or len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        raise ModelError(f"{name!r} is no SHA-256; object names are hashes")


def save_objects(objects: Mapping[str, bytes], folder: Path) -> None:
    """Write the objects that are not there yet, or not whole."""
    (folder / "objects").mkdir(parents=True, exist_ok=True)
    for name, data in objects.items():
        file = object_file(folder, name)
        if not file.is_file() or file.stat().st_size != len(data) or file.read_bytes() != data:
            write_atomically(file, data)


def read_object(folder: Path, name: str) -> bytes:
    """The bytes of an object.

    Raises:
        MissingObject: it is not there.
    """
    return _existing(folder, name).read_bytes()


def object_size(folder: Path, name: str) -> int:
    """How many bytes an object has.

    Raises:
        MissingObject: it is not there.
    """
    return _existing(folder, name).stat().st_size


def _existing(folder: Path, name: str) -> Path:
    file = object_file(folder, name)
    if not file.is_file():
        raise MissingObject(f"{folder} lacks the object {name[:16]}...; was the folder copied in part?")
    return file


def prune_objects(folder: Path, keep: set[str]) -> None:
    """Delete the objects that are not to be kept."""
    for file in (folder / "objects").glob("*.safetensors"):
        if file.stem not in keep:
            file.unlink()


def read_manifest(file: Path) -> dict[str, Any]:
    """A manifest as JSON.

    Raises:
        ModelError: not JSON.
    """
    try:
        manifest = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ModelError(f"{file} holds no manifest")
    return manifest


def kept_rounds(folder: Path) -> list[int]:
    """The rounds of a run's folder that can be loaded, ascending."""
    return sorted(int(file.stem) for file in (folder / "rounds").glob("*.json") if file.stem.isdigit())


def find_manifest(folder: Path, server_round: int | str) -> Path:
    """The manifest of a global model's folder, or of one round of a run's.

    Raises:
        ModelError: there is none, with what there is.
    """
    if (folder / MANIFEST).is_file():
        return folder / MANIFEST
    if isinstance(server_round, str) and server_round.isdigit():
        server_round = int(server_round)
    if isinstance(server_round, str) and server_round not in ("last", "best"):
        raise ModelError(f"--round must be a number, last or best; got {server_round!r}")
    rounds = kept_rounds(folder)
    if not rounds:
        raise ModelError(f"{folder} is neither a global model (no {MANIFEST}) nor a run with a finished round")
    if server_round == "last":
        server_round = rounds[-1]
    elif server_round == "best":
        server_round = read_manifest(folder / "rounds" / f"{rounds[-1]:04d}.json").get("run", {}).get("best_round", -1)
    if server_round not in rounds:
        raise ModelError(f"{folder} keeps the rounds {rounds}; round {server_round} is not among them")
    return folder / "rounds" / f"{server_round:04d}.json"
