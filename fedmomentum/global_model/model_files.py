"""Write a model of streamed parameters as transformers does, with one shard in memory at a time.

`save_pretrained` would read all parameters before writing the first: whatever transformers changes
on loading (fused experts, renamed tensors), it changes back for the whole model at once. Here, the
same transformers functions receive tensors without data, which only record the operations.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedmomentum.base_model.checkpoint_files import INDEX_FILE, SINGLE_FILE
from fedmomentum.base_model.streamed import StreamedTensor, changes_any
from fedmomentum.errors import ModelError
from fedmomentum.utils.io import write_json

CPU = torch.device("cpu")
SHARD_BYTES = 2**29
"""Bytes of weights in one file, unless a single one is larger."""


# ── in the dtype of the files ─────────────────────────────────────────────────────────────────────


def _stored_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Return the floating-point tensors that are written to disk, each once.

    This excludes buffers that the model computes on loading.
    """
    persistent = model.state_dict().keys()
    tensors = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in persistent and tensor.is_floating_point():
            tensors.append((name, tensor))
    return tensors


def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round every weight to its value on disk, except those that transformers keeps in float32.

    Args:
        model: A transformers model in float32, whose parameters may be streamed.
        dtype: The dtype on disk.
    """
    if dtype == torch.float32:
        return
    float32_modules = [
        *(model._keep_in_fp32_modules or ()),
        *(model._keep_in_fp32_modules_strict or ()),
    ]
    for name, tensor in _stored_tensors(model):
        if any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in float32_modules):
            continue
        if isinstance(tensor, StreamedTensor):
            tensor.source = replace(tensor.source, rounded_to=dtype)
        else:
            tensor.data = tensor.data.to(dtype).to(torch.float32)


def save_model(model: Any, base_directory: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the rounded model in `dtype`, with the base model's generation settings.

    The model in memory is unusable afterwards.
    """
    if getattr(model.config, "auto_map", None) is not None:
        del model.config.auto_map  # it names code in the base's directory, which is not copied
    _cast(model, dtype)
    settings = base_directory / "generation_config.json"
    has_settings = model.can_generate() and settings.is_file()
    if has_settings:
        # transformers refuses to write the settings of some base models, so they are copied.
        model.generation_config = type(model.generation_config)()
    # First only the configuration, then the weights.
    model.save_pretrained(out, state_dict={})
    _write_weights(model, out)
    if has_settings:
        shutil.copyfile(settings, out / settings.name)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast every tensor that `dtype` can represent exactly; others stay in float32 on disk."""
    streamed: dict[int, nn.Parameter] = {}
    for _, tensor in _stored_tensors(model):
        if isinstance(tensor, StreamedTensor):
            if tensor.source.rounded_to == dtype or _holds(dtype, tensor.read()):
                cast = StreamedTensor(tensor.source, tensor.device, dtype)
                streamed[id(tensor)] = nn.Parameter(cast, requires_grad=False)
        elif _holds(dtype, tensor.data):
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = streamed.get(id(parameter), parameter)


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Return whether a dtype can represent all elements of a tensor."""
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


class RecordedTensor(Tensor):
    """A tensor without data: its shape, and how to compute it.

    Operations on it return recorded tensors, too. An operation that uses it to change another
    tensor is computed at once.

    Args:
        shaped: A tensor on the meta device, of the same shape and dtype.
        compute: Returns the data.
        sources: Names of the parameters that it is computed from.
    """

    shaped: Tensor
    compute: Callable[[], Tensor]
    sources: tuple[str, ...]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls, shaped: Tensor, compute: Callable[[], Tensor], sources: tuple[str, ...]
    ) -> RecordedTensor:
        """Create a tensor with a shape and a dtype but no data."""
        tensor: RecordedTensor = Tensor._make_wrapper_subclass(
            cls, shaped.shape, strides=shaped.stride(), dtype=shaped.dtype, device=CPU
        )
        tensor.shaped = shaped
        tensor.compute = compute
        tensor.sources = sources
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RecordedTensor({tuple(self.shape)}, {self.dtype}, of {', '.join(self.sources)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        """Record an operation."""
        inputs = (args, kwargs or {})

        def run() -> Any:
            computed = tree_map_only(RecordedTensor, lambda tensor: tensor.compute(), inputs)
            return func(*computed[0], **computed[1])

        if changes_any(cls, func, args):
            raise ModelError(
                f"transformers changes tensors in place ({func}) when it gives the weights of this "
                "model the form of its checkpoint; such a model cannot be exported"
            )
        if func._schema.is_mutable:
            return run()
        found: list[str] = []
        tree_map_only(RecordedTensor, lambda tensor: found.extend(tensor.sources), inputs)
        sources = tuple(dict.fromkeys(found))
        shaped_args, shaped_kwargs = tree_map_only(Tensor, _shaped, inputs)
        shaped = func(*shaped_args, **shaped_kwargs)
        if isinstance(shaped, Tensor):
            return cls(shaped, run, sources)
        # If there are several results, each is computed separately.
        return type(shaped)(
            cls(part, lambda index=index: run()[index], sources)  # type: ignore[misc]
            for index, part in enumerate(shaped)
        )


def _shaped(tensor: Tensor) -> Tensor:
    """Return a meta tensor with a tensor's shape and dtype."""
    return tensor.shaped if isinstance(tensor, RecordedTensor) else tensor.to("meta")


class _Reader:
    """Reads parameters and keeps the last one, as a stack of experts is written one by one.

    Args:
        parameters: The tensors of a model, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._last: tuple[str, Tensor] | None = None

    def recorded(self, name: str) -> Tensor:
        """Return a recorded tensor for a parameter, which is not read yet."""
        tensor = self._parameters[name]
        shaped = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return RecordedTensor(shaped, lambda: self._read(name), (name,))

    def _read(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # frees it
            tensor = self._parameters[name]
            read = tensor.read() if isinstance(tensor, StreamedTensor) else tensor
            self._last = (name, read.cpu())
        return self._last[1]

    def forget(self) -> None:
        """Free what was kept."""
        self._last = None


def _write_weights(model: Any, out: Path) -> None:
    """Write the weights of a model into a directory, under the names used in checkpoints.

    Args:
        model: A transformers model, whose parameters may be streamed.
        out: The directory.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    # Store one of each group of tied weights. For tensors without data, transformers finds ties in
    # the live parameters.
    shaped = {}
    for name, tensor in state.items():
        shaped[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    names = remove_tied_weights_from_state_dict(shaped, model)

    reader = _Reader(state)
    recorded = {name: reader.recorded(name) for name in names}
    stored: dict[str, Any] = revert_weight_conversion(model, recorded)
    # Write tensors that come from the same parameter together.
    positions = {name: position for position, name in enumerate(names)}
    stored = dict(sorted(stored.items(), key=lambda item: _position(item[1], positions)))
    num_bytes = sum(tensor.nbytes for tensor in stored.values())
    shards = _split(stored)
    weight_map: dict[str, str] = {}
    for number, names_in_file in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = SINGLE_FILE if len(shards) == 1 else file
        weight_map |= dict.fromkeys(names_in_file, file)
        shard = {name: _computed(stored.pop(name)) for name in names_in_file}
        reader.forget()
        save_file(shard, out / file, metadata={"format": "pt"})
    if len(shards) > 1:
        metadata = {"total_parameters": model.num_parameters(), "total_size": num_bytes}
        write_json(out / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})


def _split(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of tensors grouped by file, in their order."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += tensor.nbytes
    return shards


def _computed(tensor: Tensor) -> Tensor:
    """Return the data of a tensor, contiguous and not shared with any other."""
    data = tensor.compute() if isinstance(tensor, RecordedTensor) else tensor
    if data._is_view():
        return data.clone(memory_format=torch.contiguous_format)
    return data.contiguous()


def _position(tensor: Tensor, positions: Mapping[str, int]) -> int:
    """Return the position of the first parameter that a stored tensor is computed from."""
    sources = tensor.sources if isinstance(tensor, RecordedTensor) else ()
    return min((positions[name] for name in sources), default=len(positions))
