"""The adapted modules of a live base model, held so that merged updates are not rounded away.

The base model on disk is never changed. In memory only the adapted modules change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedmomentum.base_model.checkpoint_files import stored_tensors
from fedmomentum.base_model.load_checks import translate_out_of_memory
from fedmomentum.base_model.stored_experts import StoredExperts
from fedmomentum.base_model.stored_names import find_stored_names
from fedmomentum.base_model.weight_slots import WeightSlot
from fedmomentum.errors import ModelError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import Matrix


class MergedPart(Protocol):
    """Matrices that are merged into the base weights, in effective-weight units."""

    @property
    def name(self) -> str:
        """The SHA-256 of the part's bytes."""

    @property
    def matrices(self) -> Mapping[str, Matrix]:
        """Module to its matrix, `(out, in)`."""


class BaseWeights(Protocol):
    """The adapted modules of a live base model: pretrained weights plus merged parts.

    How they are held is an implementation's choice: as a float32 copy (`Float32Weights`), or as
    quantized weights with the parts in a side branch.
    """

    def apply(self, base_update: Sequence[MergedPart]) -> None:
        """Set every module to its pretrained weight plus the sum of the parts: all, or none."""

    def reset(self) -> None:
        """Set every module to its pretrained weight."""

    def weight(self, module: str) -> Tensor:
        """Return the live weight of a module, `(out, in)`."""


# ── in float32 ────────────────────────────────────────────────────────────────────────────────────


class Float32Weights:
    """`BaseWeights` as float32 weights: `W = pretrained + sum of the parts`.

    They are in float32 even if the rest of the model is in 16 bits: the residual of a round is
    about 3e-4 of a weight's norm, and rounding `W` to bfloat16 would keep about a fifth of it.

    The parts are added one after the other, so that adding the newest one gives the same bits as
    starting from the pretrained weights. A factored part `B A` is added in place, in
    `2 out in rank` operations, without a second matrix of the weight's size.

    Args:
        layers: Name of a matrix to the live module that holds its weight: `nn.Linear`, or `Conv1D`,
            whose weight is `(in, out)`, an embedding, or a module of experts. Each gets a weight of
            its own; modules that share the old one keep it.
        directory: The model's directory; its weights are read from memory-mapped files when
            needed.
        tied: See `tied_names`; needed if a layer shares its weight with one that is stored for
            both.
        model: The model as it was loaded, which knows under which names its weights are stored;
            needed if there are experts among the layers.

    Raises:
        ModelError: If a layer is of another kind, weights are quantized, or the checkpoint does
            not hold the layer's weight, or another one than was loaded.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        directory: Path,
        tied: Mapping[str, Collection[str]] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.layers: dict[str, Any] = dict(layers)
        self._slots = {module: WeightSlot.of(module, layer) for module, layer in layers.items()}
        experts = {slot.path for slot in self._slots.values() if slot.expert is not None}
        self._experts = StoredExperts(directory, model or nn.Module(), experts)
        files = {name: tensor.file for name, tensor in stored_tensors(directory).items()}
        paths = [slot.path for slot in self._slots.values() if slot.expert is None]
        converted = find_stored_names(model, files, paths)
        # Module to the file of its weight, and the weight's name in it.
        self._stored: dict[str, tuple[Path, str]] = {}
        for module, slot in self._slots.items():
            slot.check()
            name = converted.get(slot.path)
            if slot.expert is None and name is not None:
                self._stored[module] = (files[name], name)
            elif slot.expert is None:
                tied_to = (tied or {}).get(slot.path, ())
                self._stored[module] = _find_checkpoint_tensor(slot.path, files, tied_to)
        with translate_out_of_memory(f"the adapted modules of {directory} do not fit in float32"):
            # Making room for one parameter of a module casts its others.
            dtypes = {slot.path: slot.live.dtype for slot in self._slots.values()}
            loaded: dict[str, Tensor] = {}
            for module, weight in self.iterate_pretrained(self.layers):
                slot = self._slots[module]
                # The experts of a parameter come one after the other; the first makes room for all.
                if slot.path not in loaded:
                    loaded = {slot.path: slot.live}
                    slot.upcast()
                as_loaded = slot.matrix(loaded[slot.path]).to(dtypes[slot.path])
                self._check_loaded(module, weight, as_loaded, directory)
                self.weight(module).copy_(weight)
        self._applied_names: list[str] = []
        self._is_consistent = True

    def _check_loaded(self, module: str, stored: Tensor, loaded: Tensor, directory: Path) -> None:
        """Refuse a stored weight that is not the one in the model, in the model's dtype.

        The model computes with the latter. They differ if transformers changes a checkpoint on
        loading, or if the wrong tensor of the checkpoint was found.
        """
        as_loaded = stored.to(device=loaded.device, dtype=loaded.dtype)
        if not bool(stored.isfinite().all()):
            raise ModelError(
                f"the weight of {module} in {directory} holds NaN or Inf; download the model again"
            )
        if torch.equal(as_loaded, loaded):
            return
        difference = float((as_loaded.double() - loaded.double()).norm())
        norm = float(loaded.double().norm())
        file, name = self._stored.get(module, (directory, "what it makes of the parts"))
        raise ModelError(
            f"module {module}: transformers loads another weight than {name} in {file.name} (they "
            f"differ by {difference:.3g}, of norm {norm:.3g}). The checkpoint is stored in a form "
            "that transformers converts; load it with transformers and write it again by "
            "save_pretrained(..., save_original_format=False)"
        )

    # ── pretrained weights ──

    def pretrained(self, module: str) -> Tensor:
        """Return the pretrained weight of a module, `(out, in)`, float32, on the CPU."""
        return next(self.iterate_pretrained([module]))[1]

    def iterate_pretrained(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield modules and their pretrained weights; every file is opened once.

        Raises:
            ModelError: If a stored weight has another shape than the live one.
        """
        modules_by_file: dict[Path, list[str]] = {}
        experts_by_parameter: dict[str, list[str]] = {}
        for module in modules:
            if module in self._stored:
                modules_by_file.setdefault(self._stored[module][0], []).append(module)
            else:
                experts_by_parameter.setdefault(self._slots[module].path, []).append(module)
        for file, modules_in_file in modules_by_file.items():
            with safe_open(file, framework="pt") as opened:
                for module in modules_in_file:
                    name = self._stored[module][1]
                    tensor = opened.get_tensor(name)
                    yield module, self._matrix(module, name, tensor)
        # All experts of a parameter are read together: they may be stored in one tensor.
        for parameter, experts in experts_by_parameter.items():
            tensor = self._experts.read(parameter)
            for module in experts:
                yield module, self._matrix(module, parameter, tensor)

    def _matrix(self, module: str, name: str, tensor: Tensor) -> Tensor:
        """Return the matrix of a module in a stored tensor, in float32."""
        slot = self._slots[module]
        if tensor.shape != slot.live.shape:
            raise ModelError(
                f"{name} is {tuple(tensor.shape)} on disk and {tuple(slot.live.shape)} in the model"
            )
        return slot.matrix(tensor).to(torch.float32)

    # ── live weights ──

    def weight(self, module: str) -> Tensor:
        """Return the live weight of a module as `(out, in)`, a view."""
        slot = self._slots[module]
        return slot.matrix(slot.live)

    def reset(self) -> None:
        """Set every module to its pretrained weight."""
        self._is_consistent = False
        for module, weight in self.iterate_pretrained(self.layers):
            self.weight(module).copy_(weight)
        self._applied_names = []
        self._is_consistent = True

    def apply(self, base_update: Sequence[MergedPart]) -> None:
        """Set every module to its pretrained weight plus the sum of `base_update`.

        Parts that are applied already are not added again. All parts are checked before the first
        is added; weights that an error left between two parts (no memory, Ctrl-C) are reset first.

        Raises:
            ModelError: If a part changes a module that is not among these, or has another shape.
        """
        for part in base_update:
            self._check_part(part)
        names = [part.name for part in base_update]
        is_prefix = names[: len(self._applied_names)] == self._applied_names
        if not self._is_consistent or not is_prefix:
            self.reset()
        num_applied = len(self._applied_names)
        self._is_consistent = False
        for part in base_update[num_applied:]:
            for module, matrix in part.matrices.items():
                weight = self.weight(module)
                if isinstance(matrix, LowRank):
                    weight.addmm_(matrix.B.to(weight.device), matrix.A.to(weight.device))
                else:
                    weight += matrix.to(weight.device)
        self._applied_names = names
        self._is_consistent = True

    def _check_part(self, part: MergedPart) -> None:
        for module, matrix in part.matrices.items():
            shape = tuple(matrix.shape)
            if module not in self.layers or shape != tuple(self.weight(module).shape):
                raise ModelError(
                    f"base update {part.name[:16]} changes module {module} {shape}, which is not "
                    "adapted here or has another shape"
                )


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def _find_checkpoint_tensor(
    wanted: str, files: Mapping[str, Path], tied_to: Collection[str]
) -> tuple[Path, str]:
    """Return the file and the name under which a checkpoint stores the weight of this path.

    A model with a head has a prefix that one without does not have. Of tied weights one may be
    stored for all.
    """
    names = [name for name in files if name == wanted]
    if not names:
        names = [
            name for name in files if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")
        ]
    if not names:
        names = [name for name in files if name in tied_to]
    if len(names) != 1:
        stored = f"several tensors ({', '.join(names[:3])})" if names else "no tensor"
        raise ModelError(
            f"the checkpoint holds {stored} for {wanted}; wanted one. If transformers joins, "
            "splits or renames tensors of this model on loading, load it with transformers and "
            "write it again by save_pretrained(..., save_original_format=False)"
        )
    return files[names[0]], names[0]
