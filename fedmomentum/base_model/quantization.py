"""Quantized base models: stored quantization, quantization on loading, and library workarounds.

transformers, bitsandbytes and torchao do the work. This module decides what is supported and which
modules stay in floating point, and works around bugs of the libraries before a layer computes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmomentum.base_model.branched_layers import branch_on
from fedmomentum.base_model.checkpoint_files import FLOATING, read_config, stored_tensors
from fedmomentum.base_model.classifier import is_head
from fedmomentum.base_model.weight_slots import WeightSlot
from fedmomentum.errors import ModelError
from fedmomentum.formats.manifest import Quantization
from fedmomentum.lora.target_names import is_called
from fedmomentum.utils.quantized import (
    import_bitsandbytes,
    is_eight_bit,
    is_four_bit,
    quantized_layers,
    set_product_dtype,
)
from fedmomentum.utils.text import printable

NONE = "none"
"""The value of `model.quantization` for weights as they are stored."""
ON_LOADING: dict[str, Quantization] = {
    # QLoRA's: blocks of 64 weights, whose scales are quantized again.
    "nf4": Quantization(kind="nf4", double=True, block_size=64),
    # One scale per row.
    "int8": Quantization(kind="int8", double=False, block_size=0),
    "torchao-int8": Quantization(kind="torchao-int8", double=False, block_size=0),
}
"""Value of `model.quantization` to how the weights are quantized."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# The library that computes with each kind of quantization.
_LIBRARIES = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao-int8": "torchao",
}
_DEVICES = {"bitsandbytes": ("cpu", "cuda", "xpu"), "torchao": ("cpu", "cuda", "xpu")}
# bitsandbytes' default threshold above which an input is multiplied in 16 bits instead of 8.
OUTLIER_THRESHOLD = 6.0


# ── a directory that is quantized already ─────────────────────────────────────────────────────────


def stored_quantization(directory: Path) -> str | None:
    """Return how the weights in a directory are quantized; None if they are not.

    Returns:
        `nf4`, `fp4` or `int8`, as bitsandbytes stores them, or `torchao-int8`.

    Raises:
        ModelError: If they are quantized in a way that is not supported.
    """
    advice = (
        "supported are bitsandbytes' nf4, fp4 and int8 and torchao's int8 weights. Use the model's "
        "release in bfloat16, float16 or float32, with model.quantization to make it small; or "
        "dequantize it with transformers and save_pretrained"
    )
    # The configuration, or that of one part of a multimodal model, may name a method.
    config = read_config(directory)
    nested = [value for value in config.values() if isinstance(value, dict)]
    found = None
    for table in [config, *nested]:
        for key in QUANTIZATION_KEYS:
            settings = table.get(key)
            if not settings:
                continue
            is_own = table is config and key == "quantization_config"
            kind = stored_kind(settings) if is_own and isinstance(settings, dict) else None
            if kind is None:
                method = settings.get("quant_method") if isinstance(settings, dict) else settings
                raise ModelError(
                    f"{directory} is quantized ({key}: {printable(str(method))}) in a way that is "
                    f"not supported; {advice}"
                )
            found = kind
    # Integers and booleans may be masks or positions; `load_base` checks that none is a weight.
    for name, tensor in stored_tensors(directory).items():
        if tensor.dtype not in FLOATING and tensor.dtype[0] in "FC":
            raise ModelError(
                f"{directory} stores {printable(name)} in {tensor.dtype}; quantized weights of "
                f"this kind are not supported: {advice}"
            )
    return found


def stored_kind(settings: Mapping[str, Any]) -> str | None:
    """Return the kind of a stored quantization from its settings; None if unsupported."""
    method = settings.get("quant_method")
    if method == "torchao":
        return "torchao-int8" if _is_int8_by_row(settings) else None
    is_four = bool(settings.get("load_in_4bit"))
    is_eight = bool(settings.get("load_in_8bit"))
    # Older files do not name the library.
    if method not in (None, "bitsandbytes") or is_four == is_eight:
        return None
    if is_eight:
        return None if settings.get("llm_int8_has_fp16_weight") else "int8"
    # Codes packed as floats, for FSDP, would be mistaken for weights.
    if settings.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        return None
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    return kind if kind in ("nf4", "fp4") else None


def _is_int8_by_row(settings: Mapping[str, Any]) -> bool:
    """Return whether torchao's settings mean int8 weights of linear layers, one scale per row."""
    if settings.get("include_input_output_embeddings"):
        return False
    kinds = settings.get("quant_type")
    default = kinds.get("default") if isinstance(kinds, dict) and len(kinds) == 1 else None
    if not isinstance(default, dict) or default.get("_type") != "Int8WeightOnlyConfig":
        return False
    data = default.get("_data")
    granularity = data.get("granularity") if isinstance(data, dict) else None
    return isinstance(granularity, dict) and granularity.get("_type") == "PerRow"


# ── what can be done here ─────────────────────────────────────────────────────────────────────────


def check_quantization(
    directory: Path, quantization: Quantization | None, device: torch.device
) -> str | None:
    """Return how the loaded weights will be quantized, whether stored so or on loading.

    Args:
        directory: The base model's directory.
        quantization: How to quantize on loading; None to leave weights as stored.
        device: The model's device.

    Returns:
        The kind; None for floating-point weights.

    Raises:
        ModelError: If a quantized directory would be quantized again, its quantization is not
            supported, or a library is missing or does not support the device.
    """
    stored = stored_quantization(directory)
    if stored is not None and quantization is not None:
        raise ModelError(
            f"{directory} is quantized already ({stored}), and model.quantization = "
            f'"{quantization.kind}" would quantize it again; leave model.quantization out, or use '
            "the model's release in bfloat16"
        )
    kind = quantization.kind if quantization is not None else stored
    import_bitsandbytes()
    if kind is None:
        return None
    library = _LIBRARIES[kind]
    if find_spec(library) is None:
        raise ModelError(f"{kind} weights need {library}: pip install 'fedmomentum[quantization]'")
    if device.type not in _DEVICES[library]:
        raise ModelError(
            f"{library} cannot compute with {kind} weights on {device}; it can on "
            f"{', '.join(_DEVICES[library])}. Choose another model.device, or leave "
            "model.quantization out"
        )
    return kind


def quantizing_arguments(
    directory: Path,
    quantization: Quantization,
    auto_class: Any,
    label_arguments: Mapping[str, Any],
    trained: Collection[str],
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize a model on loading.

    Weights are loaded in the stored dtype, so that the codes do not depend on the dtype a party
    computes in; `cast_unquantized` does the rest.

    Args:
        directory: The base model's directory.
        quantization: How to quantize.
        auto_class: The class that loads the model.
        label_arguments: For a classifier, the arguments that set its labels.
        trained: Names of the fully trained modules.
    """
    from transformers import AutoConfig, BitsAndBytesConfig, TorchAoConfig

    config = AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False, **label_arguments
    )
    with torch.device("meta"):
        skeleton = auto_class.from_config(config)
    is_classifier = bool(label_arguments)
    skipped = find_skipped(skeleton, quantization, trained, is_classifier=is_classifier)
    arguments: dict[str, Any] = {"dtype": _stored_dtype(directory)}
    if quantization.kind == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double,
            llm_int8_skip_modules=skipped,
        )
        return {**arguments, "quantization_config": settings}
    if quantization.kind == "int8":
        settings = BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=OUTLIER_THRESHOLD,
            llm_int8_skip_modules=skipped,
        )
        return {**arguments, "quantization_config": settings}
    from torchao.quantization import Int8WeightOnlyConfig

    by_row = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)
    return {**arguments, "quantization_config": by_row}


def _stored_dtype(directory: Path) -> torch.dtype:
    """Return a dtype that represents all of a checkpoint's weights exactly."""
    stored = {tensor.dtype for tensor in stored_tensors(directory).values()} & FLOATING
    if stored == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if stored == {"F16"} else torch.float32


# ── which modules ─────────────────────────────────────────────────────────────────────────────────


def find_skipped(
    model: Any, quantization: Quantization, trained: Collection[str], *, is_classifier: bool
) -> list[str]:
    """Return the modules that are not quantized, by a rule that is the same for every party.

    These are the output head and whatever is tied to it, a classifier's head, fully trained
    modules, subclasses of `nn.Linear`, and layers whose rows are not a whole number of blocks,
    which bitsandbytes dequantizes wrongly on a CPU. Embeddings and stacks of experts are not linear
    layers, so they are not quantized either.

    Args:
        model: The model without weights, on the meta device.
        quantization: How the others are quantized.
        trained: Names or paths of the fully trained modules, as in `modules_to_save`.
        is_classifier: Whether it is a sequence classifier.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    skipped = set(get_keys_to_not_convert(model))
    for path, module in model.named_modules():
        is_own_class = isinstance(module, nn.Linear) and type(module) is not nn.Linear
        is_trained = any(is_called(path, name) for name in trained)
        is_of_head = is_classifier and isinstance(module, nn.Linear) and is_head(path, model)
        is_uneven = quantization.block_size > 0 and _row_size(module) % quantization.block_size != 0
        if is_own_class or is_trained or is_of_head or is_uneven:
            skipped.add(path)
    # The libraries interpret names as patterns.
    return sorted(re.escape(path) for path in skipped)


def find_unquantized(model: Any) -> list[str]:
    """Return a model's unquantized linear layers; empty if no layer is quantized."""
    quantized = dict(quantized_layers(model))
    if not quantized:
        return []
    paths = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and path not in quantized:
            paths.append(path)
    return sorted(paths)


def _row_size(module: nn.Module) -> int:
    """Return the number of inputs of a linear layer; 0 for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return int(module.weight.shape[0]) if isinstance(module, Conv1D) else 0


# ── after loading ─────────────────────────────────────────────────────────────────────────────────


def prepare_layers(
    directory: Path, model: Any, kind: str, quantization: Quantization | None, dtype: torch.dtype
) -> None:
    """Make the quantized layers of a loaded model compute in `dtype`, with library fixes.

    Args:
        directory: Where it was loaded from.
        model: The loaded model.
        kind: How its weights are quantized.
        quantization: How they were quantized on loading; None if they are stored this way.
        dtype: The dtype of their products.

    Raises:
        ModelError: If nothing was quantized, the block size is not the requested one, or a CPU
            would dequantize a layer wrongly.
    """
    layers = dict(quantized_layers(model))
    if not layers:
        raise ModelError(
            f"{directory}: {type(model).__name__} has no linear layers that can be quantized "
            f"({kind}); leave model.quantization out"
        )
    cast_unquantized(model, dtype)
    for path, layer in layers.items():
        set_product_dtype(layer, dtype)
        if is_four_bit(layer):
            state = layer.weight.quant_state
            if quantization is not None and state.blocksize != quantization.block_size:
                raise ModelError(
                    f"module {path} was quantized in blocks of {state.blocksize}, as bitsandbytes "
                    f"does on this device; wanted {quantization.block_size}. Quantize the model "
                    "where blocks have this size, save it, and give all parties that directory"
                )
            if layer.weight.device.type == "cpu" and layer.in_features % state.blocksize != 0:
                raise ModelError(
                    f"module {path} of {directory} has rows of {layer.in_features} weights in "
                    f"blocks of {state.blocksize}: bitsandbytes dequantizes a block of two rows to "
                    "other weights on a CPU. Use a GPU, or the model's release in bfloat16"
                )
            # On CPUs with AVX512-BF16, bitsandbytes repacks the weights in the first evaluation,
            # but backward passes and dequantization still treat them as unpacked.
            layer.support_avx512bf16_for_cpu = False
            # Backward passes dequantize to the state's dtype, forward passes to the input's.
            layer.compute_dtype = state.dtype = dtype
            layer.compute_type_is_set = True
        elif is_eight_bit(layer):
            # Otherwise the first forward pass takes codes and scales from a weight copies share.
            if layer.weight.CB is not None:
                layer.init_8bit_state()
            branch_on(WeightSlot.of(path, layer))


def refuse_quantized_head(directory: Path, model: Any) -> None:
    """Reject a classifier whose head is quantized by the directory's settings.

    Raises:
        ModelError: If it is, since the head is trained in full.
    """
    for path, _ in quantized_layers(model):
        if is_head(path, model):
            raise ModelError(
                f"the settings of {directory} quantize {path}, a part of the classifier's head, "
                "which is trained in full. Use the model's release in bfloat16 with "
                "model.quantization"
            )


def cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Cast everything unquantized to `dtype`, or to float32 where transformers keeps float32.

    Weights are quantized in their stored dtype, so that the codes do not depend on the dtype a
    party computes in. And if the directory is already quantized, transformers casts nothing.
    """
    kept = [re.compile(rf"(^|\.){re.escape(part)}(\.|$)") for part in model._get_dtype_plan(dtype)]
    quantized = {id(layer.weight) for _, layer in quantized_layers(model)}
    persistent = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in quantized or name not in persistent or not tensor.is_floating_point():
            continue
        in_float32 = any(pattern.search(name) for pattern in kept)
        tensor.data = tensor.data.to(torch.float32 if in_float32 else dtype)
    model.config.dtype = dtype
