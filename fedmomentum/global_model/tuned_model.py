"""`TunedModel`: a plain transformers model that can be switched to a global model and back.

Exports, `evaluate` and `generate` all use it to combine merged parts, adapter and fully trained
modules on a plain model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedmomentum.base_model.base_weights import make_merged_weights
from fedmomentum.base_model.loading import tied_names
from fedmomentum.base_model.streamed import StreamedTensor
from fedmomentum.base_model.weight_format import FLOAT32
from fedmomentum.base_model.weight_slots import find_owners
from fedmomentum.errors import AdapterError, ModelError
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.lora.adapter import check_size
from fedmomentum.lora.module_names import weight_path
from fedmomentum.utils.modules import cast_around, outermost_owners

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel


@dataclass(frozen=True, eq=False)
class _Slot:
    """A tensor's place in a module.

    Attributes:
        owner: The module.
        name: The tensor's name in it.
        base: The tensor of the base model.
        tuned: The tensor of the global model.
    """

    owner: nn.Module
    name: str
    base: Tensor
    tuned: Tensor

    def put(self, tensor: Tensor) -> None:
        """Put a tensor in this place; other modules that share the present one keep it."""
        if self.name in self.owner._parameters:
            table: dict[str, Any] = self.owner._parameters
        else:
            table = self.owner._buffers
        table[self.name] = tensor
        if self.name == "weight":
            # Keep the module's own record of its size up to date.
            if isinstance(self.owner, nn.Embedding):
                self.owner.num_embeddings = tensor.shape[0]
            elif isinstance(self.owner, nn.Linear):
                self.owner.out_features = tensor.shape[0]


class TunedModel:
    """A base model that can become the global model: merged parts, adapter, fully trained modules.

    A fully trained module has its own tensor. So a head that is tied to the embeddings is untied
    while the model is tuned, and the embeddings keep theirs, as in training. If tokens were added
    before training, trained embeddings have more rows than the base's; the tuned model's vocabulary
    grows accordingly.

    Args:
        base: The base model as `load_base` returns it. From now on, this object holds the weights
            of its adapted modules.
        directory: The base model's directory.
        model: The global model.
        tied: The base's `tied_names` at loading, if its modules have been untied since.
        weight_format: The format of its adapted weights; see `make_base_weights`.

    Raises:
        ModelError: If the base lacks an adapted module, or its weight is not that in the directory.
        AdapterError: If a fully trained tensor has no place in the model, a different shape, or is
            not finite; or if the adapter's products overflow float32.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        directory: Path,
        model: GlobalModel,
        tied: Mapping[str, Collection[str]] | None = None,
        *,
        weight_format: str = FLOAT32,
    ) -> None:
        self.base = base
        adapter = model.adapter
        check_size(adapter)
        self._dtype = base.dtype
        layers = find_owners(base, adapter.modules)
        adapted = {weight_path(module) for module in adapter.modules}
        self._slots = [
            self._slot(name, tensor, adapted) for name, tensor in sorted(adapter.saved.items())
        ]
        self._owners = outermost_owners(adapter.saved)
        self._neighbor_slots = self._make_neighbor_slots(adapter.saved)
        tied = tied_names(base) if tied is None else tied
        self.base_weights = make_merged_weights(
            layers, directory, weight_format=weight_format, model=base, tied=tied
        )
        # The adapter is added like any other part, and last.
        self._base_update = model.base_update
        self._live = StoredObject.of({m: adapter.effective(m) for m in adapter.modules})

        # What `apply` changes and `restore` undoes.
        self._handles: list[RemovableHandle] = []
        self._vocabulary_sizes: list[tuple[Any, int]] = []
        self._is_tuned = False

    # ── slots ──

    def _slot(self, name: str, tensor: Tensor, adapted: Collection[str]) -> _Slot:
        """Find the place for a fully trained tensor.

        Raises:
            AdapterError: If there is none, or the tensor does not fit.
        """
        path, _, leaf = name.rpartition(".")
        if name in adapted:
            raise AdapterError(
                f"module {path} is both adapted and saved in full (modules_to_save); only one of "
                "them is possible"
            )
        owner, live = self._find(path, leaf)
        if owner is None or live is None:
            raise AdapterError(
                f"{name} of modules_to_save has no place in {type(self.base).__name__}"
            )
        if not bool(tensor.isfinite().all()):
            raise AdapterError(f"{name} of modules_to_save holds NaN or Inf")
        # Embeddings and head may have more rows, for added tokens.
        is_table = any(owner is table for table in _token_tables(self.base))
        is_resized_table = is_table and tensor.shape[1:] == live.shape[1:]
        if tensor.shape != live.shape and not is_resized_table:
            raise AdapterError(
                f"{name} of modules_to_save is {tuple(tensor.shape)}; {type(self.base).__name__} "
                f"has {tuple(live.shape)}"
            )
        dtype = torch.float32 if live.is_floating_point() else live.dtype
        tuned = tensor.to(device=live.device, dtype=dtype)
        if isinstance(live, nn.Parameter):
            tuned = nn.Parameter(tuned, requires_grad=False)
        return _Slot(owner, leaf, live, tuned)

    def _find(self, path: str, leaf: str) -> tuple[nn.Module | None, Tensor | None]:
        """Return the module at a path and its named parameter or buffer; None if missing."""
        try:
            owner = self.base.get_submodule(path)
        except AttributeError:
            return None, None
        parameter = owner._parameters.get(leaf)
        return owner, parameter if parameter is not None else owner._buffers.get(leaf)

    def _make_neighbor_slots(self, saved: Collection[str]) -> list[_Slot]:
        """Return slots for the other tensors of modules that hold fully trained ones.

        Such modules compute in float32, so their untrained tensors are cast to it.
        """
        slots = []
        for path in self._owners:
            for name, live in self.base.get_submodule(path).named_parameters(prefix=path):
                if name not in saved:
                    owner, _, leaf = name.rpartition(".")
                    upcast = nn.Parameter(live.detach().float(), requires_grad=False)
                    slots.append(_Slot(self.base.get_submodule(owner), leaf, live, upcast))
        return slots

    @property
    def saved(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The fully trained tensors, sorted by name: pairs of the base's and the global model's."""
        return ((slot.base, slot.tuned) for slot in self._slots)

    # ── base or global model ──

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Become the global model within the block."""
        try:
            self.apply()
            yield
        finally:
            self.restore()

    def apply(self) -> None:
        """Become the global model.

        Raises:
            ModelError: If the global model changes a module that the base does not have, or if
                embeddings and head would have different numbers of tokens.
        """
        self.base_weights.apply(self._base_update, self._live)
        if self._is_tuned:
            return
        self._is_tuned = True
        # Fully trained modules compute in float32 within a model of any dtype.
        for slot in self._slots + self._neighbor_slots:
            slot.put(slot.tuned)
        for path in self._owners:
            self._handles += cast_around(self.base.get_submodule(path), self._dtype)
        self._set_vocabulary()

    def restore(self) -> None:
        """Become the base model again; tied weights are tied again."""
        self.base_weights.apply([])
        for slot in self._slots + self._neighbor_slots:
            slot.put(slot.base)
        for handle in self._handles:
            handle.remove()
        for config, size in self._vocabulary_sizes:
            config.vocab_size = size
        self._handles = []
        self._vocabulary_sizes = []
        self._is_tuned = False

    def _set_vocabulary(self) -> None:
        """Set the number of tokens in the model's configuration, if tables were resized."""
        if all(slot.base.shape == slot.tuned.shape for slot in self._slots):
            return
        sizes = [int(table.weight.shape[0]) for table in _token_tables(self.base)]
        if len(set(sizes)) > 1:
            raise ModelError(
                f"the adapter was trained after tokens were added: its model has {sizes[0]} "
                f"embeddings and, without a head of its own, {sizes[1]} outputs. Train with both "
                "in modules_to_save, embeddings and head"
            )
        # The text part of a multimodal model has its own configuration.
        configs = {id(c): c for c in (self.base.config, self.base.config.get_text_config())}
        for config in configs.values():
            size = getattr(config, "vocab_size", None)
            if size is not None:
                self._vocabulary_sizes.append((config, size))
                config.vocab_size = sizes[0]


def record_untied_weights(model: PreTrainedModel) -> None:
    """Record in the model's configuration that its head does not share the embeddings' weight.

    A model whose head was trained separately must not be tied on loading, which the configuration
    decides. All other tied weights then need their own copies.
    """
    embeddings, *head = _token_tables(model)
    if not head or head[0].weight is embeddings.weight:
        return
    configs: list[Any] = [model.config]
    while configs:
        config = configs.pop()
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        for name in getattr(config, "sub_configs", {}):
            if getattr(config, name, None):
                configs.append(getattr(config, name))
    for name in tied_names(model):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        copied = owner.get_parameter(leaf).detach()
        # A streamed tensor is read again whenever it is used, so it needs no copy.
        if not isinstance(copied, StreamedTensor):
            copied = copied.clone()
        owner._parameters[leaf] = nn.Parameter(copied, requires_grad=False)


def _token_tables(model: Any) -> list[Any]:
    """Return the model's embeddings, and its head if it has one."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [table for table in tables if table is not None]
