"""The adapted modules of a live base model, held so that merged updates are not rounded away.

The base model on disk never changes. In memory, only the adapted modules change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmomentum.base_model.forward_probes import layer_outputs, outputs_with
from fedmomentum.base_model.library_errors import translate_out_of_memory
from fedmomentum.base_model.pretrained import PretrainedWeights
from fedmomentum.base_model.weight_slots import checked_slots
from fedmomentum.errors import ModelError
from fedmomentum.linalg.matrix import Matrix, add_to_weight_
from fedmomentum.linalg.probes import probe


class MergedPart(Protocol):
    """Matrices that are merged into the base weights, in effective-weight units."""

    @property
    def name(self) -> str:
        """The SHA-256 of the part's bytes."""

    @property
    def matrices(self) -> Mapping[str, Matrix]:
        """Module to its matrix, `(out, in)`."""


class MergedWeights(Protocol):
    """The adapted modules of a live base model, whose weights can be set to any sum of parts."""

    layers: Mapping[str, Any]
    """Name of a matrix to the live module that holds its weight."""

    def apply(self, base_update: Sequence[MergedPart], own: MergedPart | None = None) -> None:
        """Set every module to its pretrained weight plus the sum of the parts: all, or none.

        Args:
            base_update: The merged parts, oldest first.
            own: A low-rank part that is added last and is not part of the base update: the tail of
                a client of lower rank, or an adapter.
        """

    def reset(self) -> None:
        """Set every module to its pretrained weight."""

    def shape(self, module: str) -> tuple[int, int]:
        """Return `(out, in)` of a module's weight."""

    def pretrained(self, module: str) -> Tensor:
        """Return the pretrained weight of a module, `(out, in)`, float32, on the CPU."""


class BaseWeights(MergedWeights, Protocol):
    """The adapted modules of a live base model: pretrained weights plus merged parts.

    Implementations choose how to hold them: as a float32 copy (`Float32Weights`), or as loaded,
    with the parts in a side branch (`AsLoadedWeights`).
    """

    def iterate_pretrained(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield modules and their pretrained weights, as `pretrained` returns them."""

    # ── what the forward computes with ──

    def probe(self, module: str, U: Tensor, X: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Compute `diag(U^T W X)` for the weight that the forward multiplies by; see `probe`."""

    def inputs(self, module: str, X: Tensor) -> Tensor:
        """Return columns `(in, n)` as the module's layer receives them: on its device, rounded."""

    def outputs(self, module: str, X: Tensor) -> Tensor:
        """Return `W X` `(out, n)`, plus a constant, as the layer's forward computes it.

        This is the result before rounding to the 16 bits of the surrounding model, a rounding that
        is unbiased.

        Args:
            module: The module.
            X: What `inputs` returned.
        """

    def pretrained_outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `outputs` returns for these modules and inputs if nothing is merged."""


# ── in float32 ────────────────────────────────────────────────────────────────────────────────────


class Float32Weights:
    """`BaseWeights` as float32 weights: `W = pretrained + sum of the parts`.

    They are float32 even if the rest of the model is 16-bit: the residual of a round is about 3e-4
    of a weight's norm, and rounding `W` to bfloat16 would keep only about a fifth of it.

    The parts are added one by one, so that adding the newest one yields the same bits as starting
    over from the pretrained weights. A factored part `B A` is added in place, in `2 out in rank`
    operations, without a second matrix of the weight's size.

    Args:
        layers: Name of a matrix to the live module that holds its weight: an `nn.Linear`, a
            `Conv1D`, whose weight is `(in, out)`, an embedding, or a module of experts. Each gets
            its own new weight; modules that shared the old one keep it.
        directory: The model's directory; its weights are read from memory-mapped files when
            needed.
        tied: See `tied_names`; needed if a layer's tied weight is stored under another name.
        model: The model as loaded, which knows the stored names of its weights; needed if the
            layers include experts.

    Raises:
        ModelError: If a layer's type is not supported, weights are quantized, or the checkpoint
            lacks a layer's weight or holds a different one from what was loaded.
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
        # Remember the original dtypes: upcasting one parameter of a module also casts its others,
        # but inputs and outputs of its layers stay in the model's dtype.
        self._dtypes = {module: slot.live.dtype for module, slot in self._slots.items()}
        self._stored = PretrainedWeights(self._slots, directory, tied, model)
        with translate_out_of_memory(f"the adapted modules of {directory} do not fit in float32"):
            loaded: dict[str, Tensor] = {}
            for module, stored in self._stored.iterate(self.layers):
                slot = self._slots[module]
                # The experts of a parameter are consecutive; the first one upcasts for all.
                if slot.path not in loaded:
                    loaded = {slot.path: slot.live}
                    slot.upcast()
                as_loaded = slot.matrix(loaded[slot.path]).to(self._dtypes[module])
                self._stored.check_loaded(module, stored, as_loaded)
                self.weight(module).copy_(stored)
        self._applied_names: list[str] = []
        self._is_consistent = True

    def shape(self, module: str) -> tuple[int, int]:
        """Return `(out, in)` of a module's weight."""
        out_size, in_size = self.weight(module).shape
        return out_size, in_size

    # ── pretrained weights ──

    def pretrained(self, module: str) -> Tensor:
        """Return the pretrained weight of a module, `(out, in)`, float32, on the CPU."""
        return next(self.iterate_pretrained([module]))[1]

    def iterate_pretrained(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield modules and their pretrained weights, opening each file once.

        Raises:
            ModelError: If a stored weight's shape differs from the live one's.
        """
        for module, stored in self._stored.iterate(modules):
            yield module, stored.to(torch.float32)

    # ── live weights ──

    def weight(self, module: str) -> Tensor:
        """Return a view of a module's live weight, `(out, in)`."""
        slot = self._slots[module]
        return slot.matrix(slot.live)

    def reset(self) -> None:
        """Set every module to its pretrained weight."""
        self._is_consistent = False
        for module, stored in self._stored.iterate(self.layers):
            self.weight(module).copy_(stored)
        self._applied_names = []
        self._is_consistent = True

    def apply(self, base_update: Sequence[MergedPart], own: MergedPart | None = None) -> None:
        """Set every module to its pretrained weight plus the sum of `base_update` and `own`.

        Parts that are already applied are not added again. All parts are checked before the first
        one is added; weights left inconsistent by an error (out of memory, Ctrl-C) are reset first.

        Raises:
            ModelError: If a part changes a module that is not adapted, or has the wrong shape.
        """
        parts = [*base_update] if own is None else [*base_update, own]
        for part in parts:
            check_part(part, self)
        names = [part.name for part in parts]
        is_prefix = names[: len(self._applied_names)] == self._applied_names
        if not self._is_consistent or not is_prefix:
            self.reset()
        num_applied = len(self._applied_names)
        self._is_consistent = False
        for part in parts[num_applied:]:
            for module, matrix in part.matrices.items():
                add_to_weight_(self.weight(module), matrix)
        self._applied_names = names
        self._is_consistent = True

    # ── what the forward computes with ──

    def probe(self, module: str, U: Tensor, X: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Compute `diag(U^T W X)` for the live weight."""
        return probe(self.weight(module), U, X, scratch)

    def inputs(self, module: str, X: Tensor) -> Tensor:
        """Return columns `(in, n)` on the layer's device, in the dtype of the model around it."""
        return X.to(device=self._slots[module].live.device, dtype=self._dtypes[module])

    def outputs(self, module: str, X: Tensor) -> Tensor:
        """Return `W X` as the layer's forward computes it, before its outputs are rounded."""
        return layer_outputs(self._slots[module], X)

    def pretrained_outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the layers' outputs with their pretrained weights, swapped in one at a time."""
        outputs = {}
        for module, stored in self._stored.iterate(inputs):
            outputs[module] = outputs_with(self._slots[module], stored, inputs[module])
        return outputs


def check_part(part: MergedPart, weights: MergedWeights) -> None:
    """Reject a part that does not fit the adapted modules.

    Raises:
        ModelError: If it changes a module that is not adapted, or has the wrong shape.
    """
    for module, matrix in part.matrices.items():
        shape = tuple(matrix.shape)
        if module not in weights.layers or shape != weights.shape(module):
            raise ModelError(
                f"base update {part.name[:16]} changes module {module} {shape}, which is not "
                "adapted here or has another shape"
            )
