"""A live base model that becomes a whole global model and the untouched base again.

The one place where merged parts, adapter and fully trained modules come together on a plain transformers model:
exports, `evaluate` and `generate` all use it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedmomentum.aggregation.whole import check_size
from fedmomentum.base import HeldBase, tied_names
from fedmomentum.errors import AdapterError, ModelError
from fedmomentum.global_model import Blob, GlobalModel
from fedmomentum.precision import cast_around, outermost_owners


@dataclass(frozen=True)
class _Slot:
    """A tensor's place in a module, with what is there in the untouched and in the tuned model."""

    owner: nn.Module
    name: str
    untouched: Tensor
    tuned: Tensor

    def put(self, tensor: Tensor) -> None:
        """Place a tensor here, and nowhere else: whoever shared the old one keeps it."""
        table = self.owner._parameters if self.name in self.owner._parameters else self.owner._buffers
        table[self.name] = tensor  # type: ignore[assignment]
        if self.name == "weight":  # what such modules say of their own size
            if isinstance(self.owner, nn.Embedding):
                self.owner.num_embeddings = tensor.shape[0]
            elif isinstance(self.owner, nn.Linear):
                self.owner.out_features = tensor.shape[0]


class TunedModel:
    """A base model that can be the global model: its merged parts, its adapter and its fully trained modules.

    A fully trained module has a tensor of its own. So a head that is tied to the embeddings is untied while the model
    is tuned, and the embeddings keep theirs, as in training. Embeddings trained after tokens were added are longer
    than the base's; the model has as many tokens as they have.

    Args:
        base: The base model as `load_base` gives it. Its adapted modules are held in float32 from here on.
        folder: The base's directory.
        model: The global model.
        tied: The base's `tied_names` when it was loaded, where its modules were held once before.

    Raises:
        ModelError: If the base lacks an adapted module, or holds another weight than its directory.
        AdapterError: If a fully trained tensor has no place in the model, another shape, or is not finite; or if the
            adapter's products are beyond float32.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        folder: Path,
        model: GlobalModel,
        tied: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.base = base
        adapter = model.adapter
        check_size(adapter)
        self._dtype = base.dtype
        layers = {module: _submodule(base, module) for module in adapter.modules}
        self._slots = [self._slot(name, tensor, layers) for name, tensor in sorted(adapter.saved.items())]
        self._owners = outermost_owners(adapter.saved)
        self._beside = self._slots_beside(adapter.saved)
        self.held = HeldBase(layers, folder, tied_names(base) if tied is None else tied)
        live = Blob.of({module: adapter.effective(module) for module in adapter.modules})
        self._update = (*model.base_update, live)
        self._handles: list[RemovableHandle] = []
        self._sizes: list[tuple[Any, int]] = []
        self._is_tuned = False

    def _slot(self, name: str, tensor: Tensor, layers: dict[str, nn.Module]) -> _Slot:
        path, _, leaf = name.rpartition(".")
        if path in layers:
            raise AdapterError(f"module {path} is adapted and saved in full (modules_to_save); one of them is wrong")
        try:
            owner = self.base.get_submodule(path)
        except AttributeError:
            owner = nn.Module()
        live: Tensor | None = owner._parameters.get(leaf)
        if live is None:
            live = owner._buffers.get(leaf)
        if live is None:
            raise AdapterError(f"{name} of modules_to_save has no place in {type(self.base).__name__}")
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{name} of modules_to_save holds NaN or Inf")
        is_table = owner is self.base.get_input_embeddings() or owner is self.base.get_output_embeddings()
        if tensor.shape != live.shape and not (is_table and tensor.shape[1:] == live.shape[1:]):
            raise AdapterError(
                f"{name} of modules_to_save is {tuple(tensor.shape)}; {type(self.base).__name__} has "
                f"{tuple(live.shape)}"
            )
        dtype = torch.float32 if live.is_floating_point() else live.dtype
        tuned = tensor.to(device=live.device, dtype=dtype)
        if isinstance(live, nn.Parameter):
            tuned = nn.Parameter(tuned, requires_grad=False)
        return _Slot(owner, leaf, live, tuned)

    def _slots_beside(self, saved: Collection[str]) -> list[_Slot]:
        """The other tensors of modules that compute in float32, untrained, in float32."""
        slots = []
        for path in self._owners:
            for name, live in self.base.get_submodule(path).named_parameters(prefix=path):
                if name not in saved:
                    owner, _, leaf = name.rpartition(".")
                    wide = nn.Parameter(live.detach().float(), requires_grad=False)
                    slots.append(_Slot(self.base.get_submodule(owner), leaf, live, wide))
        return slots

    @property
    def saved(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The fully trained tensors: each in the untouched and in the tuned model."""
        return ((slot.untouched, slot.tuned) for slot in self._slots)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Be the global model for a while."""
        try:
            self.apply()
            yield
        finally:
            self.restore()

    def apply(self) -> None:
        """Become the global model.

        Raises:
            ModelError: If the global model changes a module that the base lacks, or if embeddings and head would have
                different numbers of tokens.
        """
        self.held.apply(self._update)
        if self._is_tuned:
            return
        self._is_tuned = True
        for slot in self._slots + self._beside:
            slot.put(slot.tuned)
        for path in self._owners:
            self._handles += cast_around(self.base.get_submodule(path), self._dtype)
        self._set_vocabulary()

    def restore(self) -> None:
        """Become the untouched base again; what was tied is tied again."""
        self.held.apply([])
        for slot in self._slots + self._beside:
            slot.put(slot.untouched)
        for handle in self._handles:
            handle.remove()
        for config, size in self._sizes:
            config.vocab_size = size
        self._handles, self._sizes, self._is_tuned = [], [], False

    def _set_vocabulary(self) -> None:
        """Have the configuration say how many tokens the model has now."""
        if all(slot.untouched.shape == slot.tuned.shape for slot in self._slots):
            return
        tables = [self.base.get_input_embeddings(), self.base.get_output_embeddings()]
        sizes = [int(table.weight.shape[0]) for table in tables if table is not None]
        if len(set(sizes)) > 1:
            raise ModelError(
                f"the adapter was trained after tokens were added: its model has {sizes[0]} embeddings and, without a "
                f"head of its own, {sizes[1]} outputs. Train with both in modules_to_save, embeddings and head"
            )
        configs = {id(c): c for c in (self.base.config, self.base.config.get_text_config())}
        self._sizes = [(c, c.vocab_size) for c in configs.values() if getattr(c, "vocab_size", None) is not None]
        for config, _ in self._sizes:
            config.vocab_size = sizes[0]


def write_down_ties(model: PreTrainedModel) -> None:
    """Have the configuration say whether the head shares the embeddings' weight, and give all others their own.

    A model whose head was trained apart must not be tied when it is loaded: the configuration decides that.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return
    tables: list[Any] = [model.config]
    while tables:
        config = tables.pop()
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        tables += [getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None)]
    for name in tied_names(model):  # none is tied to anything any more
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        owner._parameters[leaf] = nn.Parameter(owner._parameters[leaf].detach().clone(), requires_grad=False)  # type: ignore[union-attr]


def _submodule(model: nn.Module, module: str) -> nn.Module:
    try:
        return model.get_submodule(module)
    except AttributeError as error:
        raise ModelError(f"the base model has no module {module}; is it the base of this adapter?") from error
