"""Memory for the activations of a training step, measured by running it on fake tensors."""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedmomentum.base_model.weight_slots import WeightSlot, find_owners
from fedmomentum.training.isolation import sdpa_backend_for
from fedmomentum.utils.modules import inner_model

if TYPE_CHECKING:
    from fedmomentum.base_model.skeleton import Skeleton

# Numbers of layers to run of a deep model; the cost of the others is extrapolated.
FEW_LAYERS = 2
SOME_LAYERS = 4

# A measurement takes about a second. The runs of a comparison need the same ones over and over.
_MEASURED: dict[tuple[type, str, tuple[str, ...], StepShape], int] = {}


@dataclass(frozen=True)
class StepShape:
    """What determines the memory of a step.

    Attributes:
        rows: Rows per batch.
        length: Tokens per row.
        positions: How many of these are projected to the vocabulary.
        dtype: The dtype of the base model.
        in_float32: Whether the adapted modules are held in float32.
        rank: The rank of the adapter.
        dropout: The adapter's dropout.
        checkpointing: Whether layers are recomputed in the backward pass.
        trained: Paths of the fully trained modules, in float32.
        is_training: Whether there is a backward pass.
    """

    rows: int
    length: int
    positions: int
    dtype: torch.dtype
    in_float32: bool
    rank: int
    dropout: float = 0.0
    checkpointing: bool = False
    trained: tuple[str, ...] = ()
    is_training: bool = True


class _LiveBytes(TorchDispatchMode):
    """Counter of the bytes of live tensors, now and at their peak."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        # Weights, and views of them, are not activations.
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count the tensors that it creates."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, storage.nbytes())

    def _remove(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.now -= num_bytes


class _LoraStandIn(nn.Module):
    """A linear layer plus LoRA factors, which computes like PEFT's layer."""

    def __init__(self, layer: nn.Module, shape: StepShape) -> None:
        super().__init__()
        self.base_layer = layer
        self.dropout: nn.Module = nn.Dropout(shape.dropout) if shape.dropout else nn.Identity()
        weight: Any = layer.weight
        out_size, in_size = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]
        self.A = nn.Parameter(torch.empty(shape.rank, in_size))
        self.B = nn.Parameter(torch.empty(out_size, shape.rank))

    def forward(self, x: Tensor) -> Tensor:
        """Add the factors' product, computed in float32, to the layer's result."""
        result: Tensor = self.base_layer(x)
        low = F.linear(self.dropout(x.to(self.A.dtype)), self.A)
        return (result + F.linear(low, self.B) * 2.0).to(result.dtype)


def step_bytes(skeleton: Skeleton, modules: Collection[str], shape: StepShape) -> int:
    """Return the peak memory of activations and gradients in one step, in bytes.

    Optimizer state and weights are not included. Of a deep model, only a few layers are run, and
    the others are assumed to cost as much. The result is kept for the life of the process.

    Args:
        skeleton: The base model.
        modules: Paths of the adapted linear modules.
        shape: Batch, dtype and adapter.

    Raises:
        RuntimeError: If the model does not run without its weights.
    """
    key = (type(skeleton.model), _description(skeleton.model), tuple(modules), shape)
    if key not in _MEASURED:
        _MEASURED[key] = _measure(skeleton, modules, shape)
    return _MEASURED[key]


def _description(model: Any) -> str:
    """Return all of a model's configuration that determines its modules, as JSON."""
    values = json.loads(model.config.to_json_string(use_diff=False))
    del values["_name_or_path"]
    # Transformers leaves the kernel out.
    values["attention"] = model.config._attn_implementation
    return json.dumps(values)


def _measure(skeleton: Skeleton, modules: Collection[str], shape: StepShape) -> int:
    """Run the step, of a deep model with few layers and with some, and return its peak memory."""
    num_layers = getattr(skeleton.model.config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(num_layers, int) or num_layers <= SOME_LAYERS:
        return _run(skeleton.build(shape.dtype), modules, shape, None)
    few = _run(skeleton.build(shape.dtype), modules, shape, FEW_LAYERS)
    some = _run(skeleton.build(shape.dtype), modules, shape, SOME_LAYERS)
    per_layer = (some - few) / (SOME_LAYERS - FEW_LAYERS)
    return int(some + per_layer * (num_layers - SOME_LAYERS))


def _run(
    skeleton: Skeleton, modules: Collection[str], shape: StepShape, num_layers: int | None
) -> int:
    """Run a step of the model, truncated to its first layers, and return its peak memory."""
    model: Any = skeleton.model
    if num_layers is not None:
        depth = model.config.get_text_config().num_hidden_layers
        for part in model.modules():
            # There may be several such lists: encoder and decoder, or per-layer extras.
            if isinstance(part, nn.ModuleList) and len(part) == depth:
                del part[num_layers:]
    with skeleton.active():
        _adapt(model, modules, shape)
        model.train(shape.is_training)
        if shape.checkpointing and shape.is_training:
            inner_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        live = _LiveBytes([*model.parameters(), *model.buffers()])
        grad = torch.enable_grad() if shape.is_training else torch.no_grad()
        with _attention(model, shape), grad, live:
            loss = _forward(model, shape)
            if loss is not None:
                loss.backward()
    return live.peak


def _adapt(model: Any, modules: Collection[str], shape: StepShape) -> None:
    """Add factors to the adapted modules, and upcast weights that are held in float32."""
    model.requires_grad_(False)
    present = dict(model.named_modules())
    adapted = [path for path in modules if path in present]
    if shape.in_float32 and shape.dtype.itemsize < 4:
        for path, owner in find_owners(model, adapted).items():
            WeightSlot.of(path, owner).upcast()
    for path in adapted:
        model.set_submodule(path, _LoraStandIn(model.get_submodule(path), shape))
    for path in shape.trained:
        if path in present:
            model.get_submodule(path).float().requires_grad_(True)


def _attention(model: nn.Module, shape: StepShape) -> AbstractContextManager[Any]:
    """Select the same attention kernel as training."""
    return sdpa_backend_for(model, shape.length) if shape.is_training else nullcontext()


def _forward(model: Any, shape: StepShape) -> Tensor | None:
    """Run a forward pass over a batch without padding; return its loss when training.

    The logits are freed on return, as in training.
    """
    inputs: Mapping[str, Any] = {
        "input_ids": torch.zeros(shape.rows, shape.length, dtype=torch.long)
    }
    # Request the same logits as training does; sequence classifiers have one row of logits each.
    parameters = inspect.signature(model.forward).parameters
    if "logits_to_keep" in parameters:
        first = shape.length - shape.positions
        inputs = {**inputs, "logits_to_keep": torch.arange(first, shape.length)}
    if "use_cache" in parameters:
        inputs = {**inputs, "use_cache": False}
    logits = model(**inputs).logits
    if not shape.is_training:
        return None
    # The last position predicts nothing; slicing it off makes a copy below, as in training.
    if logits.ndim == 3 and shape.positions > 1:
        logits = logits[:, -shape.positions : -1]
    flat = logits.float().flatten(0, -2)
    labels = torch.zeros(flat.shape[0], dtype=torch.long)
    return F.cross_entropy(flat, labels, reduction="sum")
