"""A quantized base model, written dequantized: the basis of a merged export.

Merged weights are not quantized again: the merged change is a fraction of the step between two
codes, and would be rounded away.
"""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fedmomentum.base_model.checkpoint_files import INDEX_FILE
from fedmomentum.base_model.identity import identify
from fedmomentum.base_model.quantization import stored_quantization
from fedmomentum.errors import ModelError
from fedmomentum.global_model.base_loading import load_base_for
from fedmomentum.utils.io import write_json
from fedmomentum.utils.quantized import dequantize, quantized_layers

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel

CPU = torch.device("cpu")
SHARD_BYTES = 2**30
"""Bytes of float32 weights in memory at a time, unless a single one is larger."""
# Files beside the weights: the tokenizer's, and settings of generation.
_COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
# The largest difference between outputs of a layer and its dequantized weight, relative to norm.
TOLERANCE = 1e-4
NUM_INPUTS = 8


def base_quantization(model: GlobalModel, base_directory: Path) -> str | None:
    """Return the kind of quantization of a global model's base, on disk or on loading.

    Raises:
        ModelError: If it is stored in a way that is not supported.
    """
    quantization = model.base.quantization
    return quantization.kind if quantization is not None else stored_quantization(base_directory)


@contextmanager
def dequantized_base(
    model: GlobalModel, base_directory: Path, out: Path
) -> Iterator[tuple[GlobalModel, Path]]:
    """Yield the global model on the dequantized base, and the directory of that base.

    The directory lies beside `out`, in float32, and is removed afterwards.

    Args:
        model: A global model on a quantized base.
        base_directory: The base's directory.
        out: Where the export will be.

    Raises:
        ModelError: If the base cannot be loaded, or a layer computes with weights other than its
            dequantized ones.
    """
    target = out.resolve()
    directory = target.with_name(f".{target.name}.dequantized")
    shutil.rmtree(directory, ignore_errors=True)  # left by an export that was killed
    directory.mkdir(parents=True)
    try:
        base = load_base_for(model, base_directory, torch.float32, CPU)
        _write_dequantized(base, directory)
        del base
        gc.collect()
        for file in sorted(base_directory.iterdir()):
            is_weights = file.name == INDEX_FILE or file.name == "config.json"
            if file.is_file() and file.suffix in _COPIED_SUFFIXES and not is_weights:
                shutil.copyfile(file, directory / file.name)
        sha256 = identify(model.base.name, directory).sha256
        plain = replace(model.base, sha256=sha256, quantization=None)
        yield replace(model, base=plain), directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_dequantized(base: Any, directory: Path) -> None:
    """Write a quantized model as an ordinary float32 one, one shard at a time."""
    layers = dict(quantized_layers(base))
    persistent = base.state_dict().keys()
    names = [name for name, _ in base.named_parameters()]
    names += [name for name, _ in base.named_buffers() if name in persistent]
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    num_bytes = 0
    for name in names:
        path, _, leaf = name.rpartition(".")
        layer = layers.get(path) if leaf == "weight" else None
        tensor = base.get_parameter_or_buffer(name) if layer is None else _plain_weight(path, layer)
        shard[name] = tensor.detach().contiguous()
        num_bytes += tensor.nbytes
        if num_bytes >= SHARD_BYTES:
            _write_shard(directory, shard, weight_map)
            shard = {}
            num_bytes = 0
    _write_shard(directory, shard, weight_map)
    write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})

    # Describe what it is now: the same model, not quantized, in float32.
    config = copy.deepcopy(base.config)
    del config.quantization_config
    config.architectures = [type(base).__name__]
    config.dtype = torch.float32
    config.save_pretrained(directory)


def _write_shard(directory: Path, shard: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    """Write a file of tensors, and record in which file each of them is."""
    if not shard:
        return
    file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
    save_file(shard, directory / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shard, file)


def _plain_weight(path: str, layer: Any) -> Tensor:
    """Return a layer's dequantized weight in the form of an ordinary checkpoint.

    Raises:
        ModelError: If the layer's outputs are not those of this weight.
    """
    weight = dequantize(layer)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(NUM_INPUTS, weight.shape[1], generator=generator)
    bias = layer.bias.float() if layer.bias is not None else None
    expected = torch.nn.functional.linear(inputs, weight, bias)
    with torch.no_grad():
        outputs = layer(inputs)
    difference = float((outputs - expected).norm() / expected.norm().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise ModelError(
            f"module {path} computes with other weights than it dequantizes to (its outputs differ "
            f"by {difference:.3g} of their norm); nothing was exported. Update bitsandbytes or "
            "torchao"
        )
    return weight.mT if getattr(layer, "source_cls", None) is Conv1D else weight
