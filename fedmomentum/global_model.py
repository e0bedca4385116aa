"""`GlobalModel`: the one versioned object that a federation trains, and its folder.

The exact model is, per module, `W = base + sum(base_update) + scaling * B A` in float32. Saving, loading,
evaluating, exporting, resuming and sending all go through this object; the adapter alone is not the result.

The folder (format version 3)::

    global_model.json       the manifest: what belongs to the model, by content hash
    objects/<sha256>.safetensors

A run's folder holds many: `rounds/0003.json` is the manifest of round 3, and all share one `objects/`. The manifest's
fields are those of `manifest.Manifest`, on disk of `manifest.ModelFile`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmomentum.adapter import PREFIX, Adapter, split_tensors, to_tensors
from fedmomentum.aggregation.whole import AdapterAggregate
from fedmomentum.errors import FedMomentumError, FormatError, ModelError
from fedmomentum.files import is_finite, read_safetensors, safetensors_bytes, sha256, write_json
from fedmomentum.folders import MANIFEST as MANIFEST
from fedmomentum.folders import find_manifest, kept_rounds, read_manifest, round_file
from fedmomentum.identity import BaseIdentity
from fedmomentum.lowrank import LowRank, difference, weighted_sum, zeros
from fedmomentum.manifest import FORMAT, FORMAT_VERSION, Manifest, as_manifest
from fedmomentum.objects import check_name as check_name
from fedmomentum.objects import object_file as object_file
from fedmomentum.objects import object_size as object_size
from fedmomentum.objects import prune_objects as prune_objects
from fedmomentum.objects import read_object, save_objects
from fedmomentum.records import checksummed
from fedmomentum.sums import Matrix, exact_sum, plus
from fedmomentum.wire import DTYPES, dtype_of, narrowed, rounded, widened


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

    @classmethod
    def read(cls, folder: Path, name: str, size: int | None = None) -> Blob:
        """Read an object whose bytes are checked against its name, once; see `read_object`."""
        blob = cls(read_object(folder, name, size))
        blob.__dict__["name"] = name  # hashed a moment ago
        return blob

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Module to its matrix, `(out, in)`.

        Raises:
            PayloadError: the bytes are no safetensors.
            ModelError: tensors that are not of the form above, or not finite.
        """
        name = f"object {self.name[:16]}"
        tensors, _ = read_safetensors(self.data, name)
        found: dict[str, Matrix] = {}
        for key, tensor in tensors.items():
            _check_matrix(tensor, f"{name}: tensor {key}")
        for key in sorted(tensors):
            module, _, kind = key.rpartition(".")
            if kind == "dense":
                if module in found:
                    raise ModelError(f"{name} holds module {module} in factors and dense")
                found[module] = tensors[key]
            elif kind == "A" and f"{module}.B" in tensors:
                found[module] = _low_rank(tensors[f"{module}.B"], tensors[key], f"{name}: module {module}")
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
        """The model as JSON values: every part by content hash, and what is no tensor in full; see `Manifest`."""
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
    def from_manifest(
        cls, manifest: Manifest | Mapping[str, Any], fetch: Callable[[str], Blob], where: str
    ) -> GlobalModel:
        """Put a model together from its manifest and its objects.

        Args:
            manifest: as `manifest` made it; plain JSON values are checked first.
            fetch: hash to object; its bytes are checked against the hash here.
            where: what to call it in messages.

        Raises:
            ModelError: If it is not our format or another version of it, a field does not fit, an object does not
                match its hash or holds other tensors than it should, or another model version comes out than stated.
            PayloadError: If an object is no safetensors file.
        """
        manifest = as_manifest(manifest, where)

        def checked(name: str) -> Blob:
            blob = fetch(name)
            if blob.name != name:
                raise ModelError(f"{where}: object {name[:16]}... does not match its hash; it was damaged or altered")
            return blob

        # The adapter: its factors come in up to three objects, and in 16 bits where the run sends them so.
        tensors: dict[str, Tensor] = {}
        for name in manifest.adapter.names:
            part = read_safetensors(checked(name).data, where)[0]
            if twice := sorted(part.keys() & tensors.keys()):
                raise ModelError(f"{where}: tensor {twice[0]} comes twice among the adapter's objects")
            tensors |= part
        adapter_dtype = dtype_of(tensors)
        if adapter_dtype not in DTYPES.values():
            raise ModelError(f"{where}: the adapter's factors are {adapter_dtype}; wanted {', '.join(DTYPES)}")
        modules, saved = adapter_parts(widened(tensors, adapter_dtype, where), where)
        if modules.keys() != manifest.scalings.keys():
            raise ModelError(f"{where}: the manifest's scalings and the adapter's modules differ")
        adapter = Adapter(modules, manifest.scalings, saved, manifest.adapter_config, name="global adapter")

        # What was merged, and what is carried, changes the adapter's modules and no others.
        base_update = tuple(checked(name) for name in manifest.base_update)
        carried = [checked(manifest.carried)] if manifest.carried else []
        for blob in (*base_update, *carried):
            for module, matrix in blob.matrices.items():
                wanted = modules[module].shape if module in modules else None
                if tuple(matrix.shape) != wanted:
                    raise ModelError(
                        f"{where}: object {blob.name[:16]} changes module {module} {tuple(matrix.shape)}, which is not "
                        f"adapted or has another shape ({wanted})"
                    )
        model = cls(
            base=BaseIdentity(
                manifest.base.name, manifest.base.revision, manifest.base.sha256, manifest.base.tokenizer_sha256
            ),
            adapter=adapter,
            base_update=base_update,
            carried=carried[0].matrices if carried else {},
            server_round=manifest.round,
            method=manifest.method,
            personal=manifest.personal,
            adapter_dtype=adapter_dtype,
        )
        if model.version != manifest.version:
            raise ModelError(f"{where}: version {model.version[:16]} came out, {manifest.version[:16]} was stated")
        return model

    def save(self, folder: Path | str) -> None:
        """Write the model into `folder`: objects first, the manifest last, each atomically.

        Raises:
            ModelError: If a number is not finite; nothing is written then.
        """
        self.check_finite()
        folder, objects = Path(folder), self.objects()
        save_objects(objects, folder)
        sizes = {name: len(data) for name, data in sorted(objects.items())}
        write_json(folder / MANIFEST, checksummed({**self.manifest(), "sizes": sizes}))

    def check_finite(self, known: Collection[str] = ()) -> None:
        """Refuse a model that holds NaN or Inf, which nobody could read again.

        Args:
            known: hashes of merged parts that were looked at before.

        Raises:
            ModelError: naming the tensor.
        """
        adapter_parts(to_tensors(self.adapter), "the adapter")
        for blob in (*self.newest, *self.base_update, *([Blob.of(self.carried)] if self.carried else [])):
            if blob.name not in known:
                _ = blob.matrices

    @classmethod
    def load(cls, folder: Path | str, server_round: int | str = "last") -> GlobalModel:
        """Read a global model's folder, or a round of a run's folder.

        Args:
            folder: holds `global_model.json`, or a run's `rounds/`.
            server_round: for a run: a number, `last` or `best`.

        Raises:
            ModelError: If there is nothing of the kind, the round is not kept, or anything of it is damaged; where
                another round of the run is whole, the message says which.
        """
        folder = Path(folder)
        file = find_manifest(folder, server_round)
        try:
            return cls.read(folder, file)
        except FormatError:
            raise
        except FedMomentumError as error:
            raise ModelError(f"{str(error).rstrip('.?')}. {whole_instead(folder, file)}") from error

    @classmethod
    def read(cls, folder: Path, file: Path) -> GlobalModel:
        """Read the model of one manifest.

        Raises:
            ModelError: If anything of it is missing or damaged.
        """
        manifest = read_manifest(file)
        return cls.from_manifest(manifest, lambda name: Blob.read(folder, name, manifest.sizes.get(name)), str(file))


def _check_matrix(tensor: Tensor, name: str) -> None:
    """Refuse a tensor that is no finite float32 matrix."""
    if tensor.dtype != torch.float32 or tensor.ndim != 2:
        raise ModelError(f"{name} is {str(tensor.dtype)[6:]} {tuple(tensor.shape)}; wanted a float32 matrix")
    if not is_finite(tensor):
        raise ModelError(f"{name} holds NaN or Inf")


def _low_rank(B: Tensor, A: Tensor, name: str) -> LowRank:
    try:
        return LowRank(B, A)
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from error


def adapter_parts(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Return an adapter's modules and its saved tensors, of tensors under PEFT's names in float32.

    Raises:
        ModelError: If a factor lacks its counterpart, they do not fit each other, or a number is not finite.
    """
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ModelError(f"{where}: tensor {key[:200]} does not belong to an adapter; names begin with {PREFIX}")
        for kind, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_B.weight", ".lora_A.weight")):
            if key.endswith(kind) and key.removesuffix(kind) + other not in tensors:
                raise ModelError(f"{where}: tensor {key} comes without its other factor")
        if key.endswith((".lora_A.weight", ".lora_B.weight")):
            _check_matrix(tensor, f"{where}: tensor {key}")
        elif tensor.is_complex() or (tensor.is_floating_point() and not is_finite(tensor)):
            raise ModelError(f"{where}: tensor {key} holds NaN, Inf or complex numbers")
    try:
        return split_tensors(tensors)
    except ValueError as error:
        raise ModelError(f"{where}: {error}") from error


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


def object_names(manifest: Manifest | Mapping[str, Any]) -> set[str]:
    """The objects that a client needs of a manifest; what is carried is the server's own.

    Raises:
        ModelError: the manifest does not name them as it should.
    """
    return set(as_manifest(manifest, "the manifest").needed)


def version_of(base: BaseIdentity, names: Sequence[str]) -> str:
    """The version of a base with this `base_update`."""
    return sha256("\n".join([base.sha256 or f"{base.name}@{base.revision}", *names]).encode())


def whole_instead(folder: Path, damaged: Path) -> str:
    """What to do about a damaged model, in words: which other round of the run can be used, if there is one."""
    for server_round in reversed(kept_rounds(folder)):
        file = round_file(folder, server_round)
        try:
            if file != damaged:
                GlobalModel.read(folder, file)
                return (
                    f"Restore the file from a copy, or use round {server_round}, which is whole: --round {server_round}"
                )
        except FedMomentumError:
            continue
    return "Restore it from a copy"
