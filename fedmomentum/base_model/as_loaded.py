"""`AsLoadedWeights`: adapted modules as loaded, with merged updates in a side branch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmomentum.base_model.branched_layers import (
    BranchedLayer,
    adapted_in_place,
    branch_on,
    can_branch,
)
from fedmomentum.base_model.library_errors import translate_out_of_memory
from fedmomentum.base_model.pretrained import PretrainedWeights
from fedmomentum.base_model.side_branch import EMPTY, Int8Matrix, SideBranch, make_branch
from fedmomentum.base_model.weight_slots import WeightSlot, checked_slots
from fedmomentum.base_model.weights import Float32Weights, MergedPart, check_part
from fedmomentum.errors import ModelError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import Matrix
from fedmomentum.linalg.probes import probe


class AsLoadedWeights:
    """`BaseWeights` as loaded, in 16 bits or quantized, plus a side branch D.

    D is the sum of the merged parts: stacked factors while they take less than one byte per weight,
    then an int8 matrix with one scale per row, quantized from the float32 sum. However many parts
    there are, it deviates from that sum by 0.8 %, without bias, for one byte per weight. The
    layers' forward adds its product in float32 and rounds once.

    Modules whose forward cannot take a branch (experts, embeddings that scale, weights that PEFT
    adapts by a parametrization) are held in float32.

    Args:
        layers: As for `Float32Weights`. The weights are not replaced, so modules, and other models
            in the process, may keep sharing them.
        directory: The model's directory.
        tied: See `Float32Weights`.
        model: See `Float32Weights`; also needed if PEFT adapts parameters.

    Raises:
        ModelError: If a layer's type is not supported, or the checkpoint lacks its weight or holds
            a different one from what was loaded.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        directory: Path,
        tied: Mapping[str, Collection[str]] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.layers: Mapping[str, Any] = dict(layers)
        slots = checked_slots(layers)
        in_place = adapted_in_place(model)
        self._slots: dict[str, WeightSlot] = {}
        others: dict[str, nn.Module] = {}
        for module, slot in slots.items():
            if can_branch(slot) and id(slot.owner) not in in_place:
                self._slots[module] = slot
            else:
                others[module] = layers[module]
        self._float32_weights = Float32Weights(others, directory, tied, model)
        # A quantized weight is defined by what it dequantizes to, so it is not compared.
        unquantized = {name: slot for name, slot in self._slots.items() if not slot.is_quantized}
        self._stored = PretrainedWeights(unquantized, directory, tied, model)
        with translate_out_of_memory(f"reading the adapted modules of {directory}"):
            for module, stored in self._stored.iterate(unquantized):
                self._stored.check_loaded(module, stored, self._slots[module].loaded())
        self._forwards: dict[str, BranchedLayer] = {}
        for module, slot in self._slots.items():
            self._forwards[module] = branch_on(slot)
        self._applied_names: tuple[list[str], str | None] | None = ([], None)

    def shape(self, module: str) -> tuple[int, int]:
        """Return `(out, in)` of a module's weight."""
        slot = self._slots.get(module)
        return self._float32_weights.shape(module) if slot is None else slot.shape

    # ── pretrained weights ──

    def pretrained(self, module: str) -> Tensor:
        """Return the pretrained weight of a module, `(out, in)`, float32, on the CPU."""
        return next(self.iterate_pretrained([module]))[1]

    def iterate_pretrained(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield modules and their pretrained weights; every file is opened once."""
        modules = list(modules)
        for module, stored in self._iterate_stored(m for m in modules if m in self._slots):
            yield module, stored.to(device="cpu", dtype=torch.float32)
        yield from self._float32_weights.iterate_pretrained(
            m for m in modules if m not in self._slots
        )

    def _iterate_stored(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield modules and the stored weights they were loaded from, dequantized if necessary."""
        modules = list(modules)
        quantized = {module for module in modules if self._slots[module].is_quantized}
        yield from self._stored.iterate(m for m in modules if m not in quantized)
        for module in sorted(quantized):
            yield module, self._slots[module].loaded()

    # ── merged parts ──

    def reset(self) -> None:
        """Remove all branches."""
        for forward in self._forwards.values():
            forward.branch = EMPTY
        self._float32_weights.reset()
        self._applied_names = ([], None)

    def apply(self, base_update: Sequence[MergedPart], own: MergedPart | None = None) -> None:
        """Set every module's branch to the sum of `base_update`, plus `own` as factors.

        All parts are checked before the first branch changes. After an error in between (out of
        memory, Ctrl-C), the next call rebuilds all branches.

        Raises:
            ModelError: If a part changes a module that is not adapted, or has the wrong shape, or
                `own` is not factored.
        """
        parts = [*base_update] if own is None else [*base_update, own]
        for part in parts:
            check_part(part, self)
        names = ([part.name for part in base_update], own.name if own else None)
        if names == self._applied_names:
            return
        # Rebuild the 8-bit sum only if it has changed.
        is_same_sum = self._applied_names is not None and names[0] == self._applied_names[0]
        self._applied_names = None
        self._float32_weights.apply([self._float32_part(part) for part in parts])
        for module, forward in self._forwards.items():
            dense = forward.branch.dense if is_same_sum else None
            forward.branch = EMPTY  # frees the old one
            forward.branch = self._branch(module, base_update, own, dense)
        self._applied_names = names

    def _branch(
        self,
        module: str,
        base_update: Sequence[MergedPart],
        own: MergedPart | None,
        dense: Int8Matrix | None,
    ) -> SideBranch:
        """Return the branch of one module."""
        slot = self._slots[module]
        merged = [part.matrices[module] for part in base_update if module in part.matrices]
        added = own.matrices.get(module) if own is not None else None
        if added is not None and not isinstance(added, LowRank):
            raise ModelError(f"what is added to module {module} alone is dense; wanted factors")
        if not merged and added is None:
            return EMPTY
        like = torch.empty(0, dtype=slot.dtype, device=slot.device)
        return make_branch(merged, added, slot.shape, like, dense)

    def _float32_part(self, part: MergedPart) -> MergedPart:
        """Restrict a part to the modules whose weights are in float32."""
        layers = self._float32_weights.layers
        matrices = {name: matrix for name, matrix in part.matrices.items() if name in layers}
        return _RestrictedPart(part.name, matrices)

    # ── what the forward computes with ──

    def probe(self, module: str, U: Tensor, X: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Compute `diag(U^T (W + D) X)` for the weight as loaded and its branch."""
        if module not in self._slots:
            return self._float32_weights.probe(module, U, X, scratch)
        branch = self._forwards[module].branch
        return probe(self._slots[module].loaded(), U, X, scratch) + branch.probe(U, X, scratch)

    def inputs(self, module: str, X: Tensor) -> Tensor:
        """Return columns `(in, n)` on the layer's device, in the dtype of its products."""
        slot = self._slots.get(module)
        if slot is None:
            return self._float32_weights.inputs(module, X)
        return X.to(device=slot.device, dtype=slot.dtype)

    def outputs(self, module: str, X: Tensor) -> Tensor:
        """Return `(W + D) X` as computed by the layer's forward, before rounding."""
        if module not in self._slots:
            return self._float32_weights.outputs(module, X)
        forward = self._forwards[module]
        return forward.outputs(X, forward.branch)

    def pretrained_outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `outputs` returns without branches."""
        float32_inputs = {module: X for module, X in inputs.items() if module not in self._slots}
        outputs = self._float32_weights.pretrained_outputs(float32_inputs)
        for module, X in inputs.items():
            if module in self._slots:
                outputs[module] = self._forwards[module].outputs(X, EMPTY)
        return outputs


@dataclass(frozen=True)
class _RestrictedPart:
    """A `MergedPart` restricted to some modules."""

    name: str
    matrices: Mapping[str, Matrix]
