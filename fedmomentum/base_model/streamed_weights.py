"""`StreamedWeights`: adapted modules of a model whose parameters are streamed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedmomentum.base_model.pretrained import PretrainedWeights
from fedmomentum.base_model.streamed import MatrixSum, StreamedTensor, WeightSource
from fedmomentum.base_model.weight_slots import WeightSlot, checked_slots
from fedmomentum.base_model.weights import MergedPart, check_part


class StreamedWeights:
    """`MergedWeights` that are computed on use: pretrained weight plus merged parts.

    They have the same bits as `Float32Weights` but are not in memory: for each operation, a weight
    is computed from the file and the parts.

    Args:
        layers: As for `Float32Weights`, of a model with streamed parameters.
        directory: The model's directory.
        tied: See `Float32Weights`.
        model: See `Float32Weights`.

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
        self._slots = checked_slots(layers)
        stored_weights = PretrainedWeights(self._slots, directory, tied, model)
        self._loaded: dict[str, Tensor] = {}
        for slot in self._slots.values():
            # Modules that share the old weight keep it; the experts of a parameter share this one.
            if slot.path not in self._loaded:
                live = getattr(slot.owner, slot.parameter)
                self._loaded[slot.path] = live.source.stored
                self._put(slot, WeightSource(live.source.stored))
        for module, stored in stored_weights.iterate(self.layers):
            slot = self._slots[module]
            stored_weights.check_loaded(module, stored, slot.matrix(self._loaded[slot.path]))

    def _put(self, slot: WeightSlot, source: WeightSource) -> None:
        """Set a module's weight to a streamed one with this source."""
        tensor = StreamedTensor(source, slot.device)
        setattr(slot.owner, slot.parameter, nn.Parameter(tensor, requires_grad=False))

    def shape(self, module: str) -> tuple[int, int]:
        """Return `(out, in)` of a module's weight."""
        return self._slots[module].shape

    def pretrained(self, module: str) -> Tensor:
        """Return the pretrained weight of a module, `(out, in)`, float32, on the CPU."""
        return self._read(module, WeightSource(self._loaded[self._slots[module].path]))

    def weight(self, module: str) -> Tensor:
        """Return the current weight of a module, `(out, in)`, float32, on the CPU."""
        slot = self._slots[module]
        return self._read(module, getattr(slot.owner, slot.parameter).source)

    def _read(self, module: str, source: WeightSource) -> Tensor:
        slot = self._slots[module]
        read = source.read() if slot.expert is None else source.of_expert(slot.expert).read()
        return read.mT if slot.is_transposed else read

    def reset(self) -> None:
        """Set every module to its pretrained weight."""
        self.apply([])

    def apply(self, base_update: Sequence[MergedPart], own: MergedPart | None = None) -> None:
        """Set every module to its pretrained weight plus the sum of `base_update` and `own`.

        Raises:
            ModelError: If a part changes a module that is not adapted, or has the wrong shape.
        """
        parts = [*base_update] if own is None else [*base_update, own]
        for part in parts:
            check_part(part, self)
        sums: dict[str, list[MatrixSum]] = {}
        for module, slot in self._slots.items():
            matrices = [part.matrices[module] for part in parts if module in part.matrices]
            of_parameter = sums.setdefault(slot.path, [])
            if matrices:
                of_parameter.append(MatrixSum(slot.expert, slot.is_transposed, matrices))
        for slot in {slot.path: slot for slot in self._slots.values()}.values():
            self._put(slot, WeightSource(self._loaded[slot.path], sums[slot.path]))
