"""PEFT adapters in and out: folders. With `peft_live` the only file that imports peft.

That import takes seconds, so it is made by what writes a folder; reading one does without.

What a configuration field means for the product `scaling * B A` is decided here, once: the fields known to be
harmless are listed, every other one must hold its default, and is refused by name where it does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmomentum.adapter import PREFIX, Adapter, to_tensors
from fedmomentum.adapter_config import AdapterConfig
from fedmomentum.errors import AdapterError
from fedmomentum.files import is_finite, safetensors_bytes, write_atomically
from fedmomentum.lowrank import LowRank
from fedmomentum.records import read_file
from fedmomentum.schema import check_free_form, parse_json, printable

READ_FIELDS = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
"""Fields that change what the factors mean, and that we obey."""

HARMLESS_FIELDS = {
    # which modules, on what model: the tensors' own names say it
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "base_model_name_or_path", "revision", "task_type", "peft_type", "auto_mapping", "peft_version",
    # how the adapter was trained or is held, not what it adds
    "lora_dropout", "inference_mode", "runtime_config", "megatron_core",
    # how the base stores its weight; the factors are (rank, in) and (out, rank) either way
    "fan_in_fan_out",
}  # fmt: skip

HARMLESS_INIT = (True, False, "gaussian")
"""Initialisations that leave the base as it was (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA change it)."""

DEFAULTS = {"r": 8, "lora_alpha": 8, "bias": "none", "qalora_group_size": 16}
"""PEFT's defaults of the fields which are not harmless, where they are not empty (False, 0, None); a test compares."""

FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEADER = 2**24
"""Bytes of adapter_config.json, and of the header of the weights: 100,000 tensors have some 15 MB."""
MAX_SIDE = 2**22
"""Of a factor; vocabularies have some 300,000 entries."""
MAX_NAME = 512

EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
"""What models call their embeddings and their head."""


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def check_config(config: Mapping[str, Any], name: str) -> AdapterConfig:
    """Refuse an adapter configuration that asks for more than `W + scaling * B A`.

    Args:
        config: of an adapter's directory, a live model or a client; nothing in it is trusted.
        name: what to call the adapter in messages.

    Returns:
        The fields that decide something.

    Raises:
        AdapterError: If a field has a type or a value that it cannot have, or is off its default and not known to be
            harmless; naming the field, its value and what was wanted.
    """
    declared = AdapterConfig.of(config, name)
    if str(declared.peft_type or "LORA").rsplit(".", 1)[-1] != "LORA":
        raise AdapterError(f"{name}: peft_type is {_shown(declared.peft_type)}; only LORA adapters can be combined")
    if config.get("init_lora_weights", True) not in HARMLESS_INIT:
        raise AdapterError(
            f"{name}: init_lora_weights is {_shown(config['init_lora_weights'])}, which changes the base weights at "
            f"the start of training, so that this adapter does not fit the published base. Supported: {HARMLESS_INIT}"
        )
    known = READ_FIELDS | HARMLESS_FIELDS | {"init_lora_weights"}
    for key, value in config.items():
        if key in known or value == DEFAULTS.get(key) or not (value or DEFAULTS.get(key)):
            continue
        shown = printable(str(key), 100)
        raise AdapterError(
            f"{name}: the LoRA configuration has {shown} = {_shown(value)}; supported is only its default, "
            f"{DEFAULTS.get(key)!r}. Train without {shown}, or merge this adapter into its base with PEFT"
        )
    return declared


def _shown(value: Any) -> str:
    return printable(repr(value), 100)


def plain_config(adapter: Adapter) -> dict[str, Any]:
    """A LoRA configuration with the adapter's ranks and scalings, module by module, and nothing else.

    The commonest rank and alpha become `r` and `lora_alpha`; every module that differs is named in full in
    `rank_pattern` and `alpha_pattern`, longer paths first, so that none is taken for the end of another.
    """
    ranks = {module: matrix.rank for module, matrix in adapter.modules.items()}
    alphas = {module: adapter.scalings[module] * rank for module, rank in ranks.items()}
    alphas = {module: round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha for module, alpha in alphas.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    longest_first = sorted(ranks, key=lambda module: (-len(module), module))
    kept = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "modules_to_save", "lora_dropout")
    return {
        "peft_type": "LORA",
        **{key: adapter.config[key] for key in kept if adapter.config.get(key)},
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: ranks[module] for module in longest_first if ranks[module] != rank},
        "alpha_pattern": {module: alphas[module] for module in longest_first if alphas[module] != alpha},
        "inference_mode": True,
    }


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(sorted(set(values)), key=values.count)


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_adapter(folder: Path | str, name: str | None = None) -> Adapter:
    """Read a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`).

    Raises:
        AdapterError: no such files, pickled weights, a field we do not support, or tensors that are not the LoRA
            factors the configuration speaks of; with folder, field and tensor named.
    """
    folder = Path(folder)
    name = name or str(folder)
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file():
        raise AdapterError(f"{name}: no adapter_config.json in {folder}; wanted a folder written by PEFT")
    if not weights_file.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{name}: the weights are in adapter_model.bin, a pickle, which can run code when read. Load it with "
                "PEFT where you trust it and save_pretrained(..., safe_serialization=True)"
            )
        raise AdapterError(f"{name}: no adapter_model.safetensors in {folder}")
    data = read_file(config_file, max_bytes=MAX_HEADER, error=AdapterError)
    config = parse_json(data, dict[str, Any], f"{name}: adapter_config.json", AdapterError)
    check_free_form(config, f"{name}: adapter_config.json", AdapterError)
    declared = check_config(config, name)
    try:
        _check_header_length(weights_file, name)
        with safe_open(weights_file, framework="pt") as file:
            keys = list(file.keys())
            # The header tells shapes; what cannot be right is refused before a number is read.
            for key in keys:
                _check_shape(key, file.get_slice(key).get_shape(), name)
            tensors = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AdapterError(f"{name}: adapter_model.safetensors cannot be read: {error}") from error
    return _adapter(tensors, config, declared, name)


def _check_header_length(file: Path, name: str) -> None:
    """Refuse a header that would take seconds to parse."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_HEADER:
        raise AdapterError(
            f"{name}: adapter_model.safetensors claims a header of {length} bytes; at most {MAX_HEADER} are taken"
        )


def _check_shape(key: str, shape: Sequence[int], name: str) -> None:
    """Refuse a tensor's name that could not be shown, and factors larger than any layer has."""
    if len(key) > MAX_NAME or not key.isprintable():
        raise AdapterError(f"{name}: a tensor is called {printable(key, 100)!r}, which is no name of a module")
    if ".lora_" in key and any(side > MAX_SIDE for side in shape):
        raise AdapterError(f"{name}: tensor {key} claims the shape {tuple(shape)}; no layer is so large")


def from_peft_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Adapter:
    """An adapter from PEFT's tensors and configuration; the checks of `read_adapter`."""
    return _adapter(tensors, config, check_config(config, name), name)


def _adapter(tensors: Mapping[str, Tensor], config: Mapping[str, Any], declared: AdapterConfig, name: str) -> Adapter:
    factors: dict[str, dict[str, Tensor]] = {}
    saved = {}
    saved_modules = list(declared.modules_to_save or [])
    tensors = _once(tensors, name)
    if added := _added_embeddings(tensors, saved_modules):
        saved_modules += added
        config = {**config, "modules_to_save": saved_modules}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", path)
        if key.startswith(PREFIX) and found and tensor.ndim == 2:
            factors.setdefault(found[1], {})[found[2]] = tensor
        elif key.startswith(PREFIX) and _is_saved(path, saved_modules):
            saved[path] = tensor
        elif "lora_embedding" in key:
            raise AdapterError(f"{name}: tensor {key} adapts an embedding; only linear layers can be combined")
        else:
            listed = _shown(saved_modules) if saved_modules else "none"
            raise AdapterError(
                f"{name}: tensor {key} of shape {tuple(tensor.shape)} is neither a factor of a linear layer nor of a "
                f"module in modules_to_save ({listed}); it cannot be combined"
            )
    if not factors:
        raise AdapterError(f"{name}: the adapter holds no LoRA factors")
    ranks, alphas = declared.ranks(name), declared.alphas(name)
    modules, scalings = {}, {}
    for module, pair in sorted(factors.items()):
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"{name}: module {module} has lora_{next(iter(pair))} only; wanted both factors")
        for side, factor in pair.items():
            if factor.dtype not in FACTOR_DTYPES:
                raise AdapterError(f"{name}: lora_{side} of {module} is {factor.dtype}; wanted floating point")
            if not factor.numel():
                raise AdapterError(f"{name}: lora_{side} of {module} is empty, {tuple(factor.shape)}")
            if not is_finite(factor):
                raise AdapterError(f"{name}: lora_{side} of {module} holds NaN or Inf")
        try:
            matrix = LowRank(pair["B"], pair["A"])
        except ValueError as error:
            raise AdapterError(f"{name}: module {module}: {error}") from error
        wanted = ranks.find(module, declared.r)
        if matrix.rank != wanted:
            raise AdapterError(
                f"{name}: module {module} has rank {matrix.rank} and the configuration says {wanted}; "
                "the scaling would be wrong. Mend r or rank_pattern in adapter_config.json"
            )
        alpha = alphas.find(module, declared.lora_alpha)
        modules[module] = matrix
        scalings[module] = alpha / math.sqrt(matrix.rank) if declared.use_rslora else alpha / matrix.rank
    for key, tensor in saved.items():
        if tensor.is_complex() or (tensor.is_floating_point() and not is_finite(tensor)):
            raise AdapterError(f"{name}: tensor {key} of modules_to_save holds NaN, Inf or complex numbers")
    return Adapter(modules=modules, scalings=scalings, saved=saved, config=dict(config), name=name)


def _once(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors without the copies that PEFT adds where the vocabulary was resized.

    It then writes a saved module three times: by its name, as `modules_to_save`, and as the `original_module` that it
    was before training, which no model uses.
    """
    kept = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        owner, _, copy = module.rpartition(".")
        plain = tensors.get(f"{owner}.{leaf}")
        if plain is None or copy not in ("modules_to_save", "original_module"):
            kept[key] = tensor
        elif copy == "modules_to_save" and not torch.equal(plain, tensor):
            raise AdapterError(
                f"{name}: {key} and {owner}.{leaf} should be the same and differ; save the adapter again"
            )
    return kept


def _is_saved(path: str, saved_modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to a module in `modules_to_save`.

    PEFT's rule is that the module's path ends in the name, also in the middle of a word: `norm` is every layer norm.
    """
    parts = path.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(owner.endswith(name) for owner in owners for name in saved_modules if name)


def _added_embeddings(tensors: Mapping[str, Tensor], saved_modules: Sequence[str]) -> list[str]:
    """Embeddings and head that PEFT saves unasked, because tokens were added: they are modules to save all the same."""
    modules = [key.removeprefix(PREFIX).removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    tables = [module for module in modules if module.rpartition(".")[2] in EMBEDDING_NAMES]
    return sorted(m for m in tables if not any(m == name or m.endswith(f".{name}") for name in saved_modules))


def write_adapter(adapter: Adapter, folder: Path | str) -> None:
    """Write a plain PEFT adapter folder, with `plain_config`.

    Raises:
        AdapterError: If a tensor holds NaN or Inf; nothing is written then.
    """
    from peft import LoraConfig

    for key, tensor in to_tensors(adapter).items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise AdapterError(f"{adapter.name}: tensor {key} holds NaN or Inf; nothing was written")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", safetensors_bytes(to_tensors(adapter), ("format", "pt")))
    config = LoraConfig(**plain_config(adapter)).to_dict()
    config["target_modules"] = sorted(adapter.modules)  # a set in PEFT: sorted, equal adapters have equal files
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, default=str).encode())
