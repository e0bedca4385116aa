"""PEFT adapter directories: read without PEFT, and written with its configuration.

Writing imports peft, which takes seconds. `peft_config` decides what a configuration means for the
product `scaling * B A`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmomentum.errors import AdapterError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import PREFIX, Adapter
from fedmomentum.lora.adapter_config import AdapterConfig, json_value
from fedmomentum.lora.hub_adapter import CONFIG_FILE, PICKLE_TEXT, PICKLED_FILE, find_adapter
from fedmomentum.lora.module_names import EMBEDDING, split_expert
from fedmomentum.lora.peft_config import check_config, plain_config
from fedmomentum.lora.peft_layout import (
    check_layout_version,
    split_stack,
    to_peft_tensors,
    with_equal_experts,
)
from fedmomentum.utils.io import damage_hint, write_atomically
from fedmomentum.utils.records import read_file
from fedmomentum.utils.schema import check_free_form, parse_json
from fedmomentum.utils.tensors import is_finite, safetensors_bytes
from fedmomentum.utils.text import first_few, printable, short_repr

FACTOR_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Bytes of adapter_config.json, and of the header of the weights: 100,000 tensors need 15 MB.
MAX_HEADER = 2**24
# Size of a factor's longest side; vocabularies have about 300,000 entries.
MAX_SIDE = 2**22
# Characters in a tensor's name; a module path has about 50.
MAX_NAME = 512
# Common names of embeddings and heads.
EMBEDDING_NAMES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_EMBEDDING_FACTOR = re.compile(r"(.+)\.lora_embedding_([AB])")


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def read_adapter(directory: Path | str, name: str | None = None) -> Adapter:
    """Read a PEFT adapter directory (`adapter_config.json`, `adapter_model.safetensors`).

    Args:
        directory: The directory; or a name on the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`.
        name: The adapter's name in messages; by default the directory.

    Raises:
        HubError: If the hub does not provide it.
        AdapterError: If a file is missing, weights are pickled, a field is not supported, or the
            tensors are not the LoRA factors that the configuration describes; the message names
            the directory, field and tensor.
    """
    name = name or str(directory)
    directory = find_adapter(directory, name)
    config = _read_config(directory, name)
    declared = check_config(config, name)
    tensors = _read_tensors(directory, name)
    return _assemble(tensors, config, declared, name)


def from_peft_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> Adapter:
    """Build an adapter from PEFT's tensors and configuration.

    Raises:
        AdapterError: As `read_adapter`.
    """
    return _assemble(tensors, config, check_config(config, name), name)


def _read_config(directory: Path, name: str) -> dict[str, Any]:
    """Read adapter_config.json, whose fields are checked later."""
    file = directory / "adapter_config.json"
    if not directory.exists():
        where = name if name == str(directory) else f"{name}: {directory}"
        raise AdapterError(f"{where} does not exist; wanted a directory written by PEFT")
    if not file.is_file():
        what = f"no {CONFIG_FILE} in {directory}"
        if not directory.is_dir():
            what = f"{directory} is not a directory"
        raise AdapterError(
            f"{name}: {what}; wanted a directory written by PEFT{_describe_other(directory)}"
        )
    data = read_file(file, max_bytes=MAX_HEADER, error=AdapterError)
    where = f"{name}: adapter_config.json"
    config = parse_json(data, dict[str, Any], where, AdapterError)
    check_free_form(config, where, AdapterError)
    return config


def _describe_other(directory: Path) -> str:
    """Return the end of a message that says what a directory without an adapter holds."""
    if (directory / "global_model.json").is_file() or (directory / "rounds").is_dir():
        return (
            ". It holds a run or a global model, which `fedmomentum export DIRECTORY --to adapter` "
            "writes as an adapter"
        )
    # PEFT writes an adapter of another name than "default" into a subdirectory.
    found = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG_FILE}"))
    if found:
        return f". It holds adapters in subdirectories; give one of them: {first_few(found)}"
    return ". It holds a model, not an adapter" if (directory / "config.json").is_file() else ""


def _read_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """Read adapter_model.safetensors, checking names and shapes before any tensor."""
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        if (directory / PICKLED_FILE).exists():
            raise AdapterError(f"{name}: {PICKLE_TEXT}")
        raise AdapterError(f"{name}: no adapter_model.safetensors in {directory}")
    try:
        _check_header_length(file, name)
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            # The header has the shapes, so reject impossible ones before reading any tensor.
            for key in keys:
                _check_shape(key, opened.get_slice(key).get_shape(), name)
            return {key: opened.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AdapterError(
            f"{name}: adapter_model.safetensors cannot be read: {error}{damage_hint(file)}"
        ) from error


def _check_header_length(file: Path, name: str) -> None:
    """Reject a header that would take seconds to parse."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_HEADER:
        raise AdapterError(
            f"{name}: adapter_model.safetensors claims a header of {length} bytes, and at most "
            f"{MAX_HEADER} are supported{damage_hint(file)}"
        )


def _check_shape(key: str, shape: Sequence[int], name: str) -> None:
    """Reject tensor names that cannot be displayed, and factors larger than any real layer's."""
    if len(key) > MAX_NAME or not key.isprintable():
        raise AdapterError(
            f"{name}: a tensor is called {printable(key, 100)!r}, which is no name of a module"
        )
    if ".lora_" in key and any(side > MAX_SIDE for side in shape):
        raise AdapterError(
            f"{name}: tensor {key} claims the shape {tuple(shape)}; no layer is so large"
        )


# ── from tensors to an adapter ────────────────────────────────────────────────────────────────────


def _assemble(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], declared: AdapterConfig, name: str
) -> Adapter:
    """Build an adapter from tensors, each of which must be recognized.

    Args:
        tensors: The tensors, under PEFT's names.
        config: PEFT's configuration.
        declared: Its fields that matter.
        name: The adapter's name in messages.
    """
    tensors = _without_copies(tensors, name)
    saved_modules = list(declared.modules_to_save or [])
    added_modules = _added_embeddings(tensors, saved_modules)
    if added_modules:
        saved_modules += added_modules
        config = {**config, "modules_to_save": saved_modules}

    factors, saved = _classify(tensors, saved_modules, name)
    if not factors:
        raise AdapterError(f"{name}: the adapter holds no LoRA factors")
    modules, scalings = _name_factors(factors, declared, name)
    twice = sorted(module for module in modules if module + EMBEDDING in modules)
    if twice:
        raise AdapterError(f"{name}: module {twice[0]} is adapted twice, as linear and embedding")
    if any(split_expert(module)[1] is not None for module in modules):
        check_layout_version(config.get("peft_version"), name)
    for key, tensor in saved.items():
        if tensor.is_complex() or (tensor.is_floating_point() and not is_finite(tensor)):
            raise AdapterError(
                f"{name}: tensor {key} of modules_to_save holds NaN, Inf or complex numbers"
            )
    return Adapter(modules=modules, scalings=scalings, saved=saved, config=dict(config), name=name)


def _name_factors(
    factors: Mapping[str, Mapping[str, Tensor]], declared: AdapterConfig, name: str
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """Return the matrices and scalings of all modules, with every expert as a separate module.

    Args:
        factors: The factors by the path of PEFT's wrapper.
        declared: The configuration.
        name: The adapter's name in messages.

    Raises:
        AdapterError: If the factors are not the ones that the configuration describes.
    """
    ranks = declared.ranks(name)
    alphas = declared.alphas(name)
    located = declared.targets.locate(factors, name)
    modules: dict[str, LowRank] = {}
    scalings: dict[str, float] = {}
    for path, pair in sorted(factors.items()):
        # PEFT looks up ranks by the path of a module or a parameter.
        target = located.get(path, path.removesuffix(EMBEDDING))
        matrix = _pair_factors(pair, path, name)
        rank = ranks.find(target, declared.r)
        alpha = alphas.find(target, declared.lora_alpha)
        module = target.removesuffix(".weight") if path in located else path
        is_matrix = path not in located or (target.endswith(".weight") and matrix.rank == rank)
        if is_matrix and matrix.rank != rank:
            raise AdapterError(
                f"{name}: module {module} has rank {matrix.rank} and the configuration says "
                f"{rank}; the scaling would be wrong. Correct r or rank_pattern in "
                "adapter_config.json"
            )
        matrices = {module: matrix} if is_matrix else split_stack(matrix, rank, target, name)
        modules |= matrices
        scaling = alpha / (math.sqrt(rank) if declared.use_rslora else rank)
        scalings |= dict.fromkeys(matrices, scaling)
    return modules, scalings


def _classify(
    tensors: Mapping[str, Tensor], saved_modules: Sequence[str], name: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split tensors into the factors of each module and the fully trained tensors.

    Raises:
        AdapterError: If a tensor is neither.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        matched = _FACTOR.fullmatch(path)
        embedding = _EMBEDDING_FACTOR.fullmatch(path)
        if key.startswith(PREFIX) and matched and tensor.ndim == 2:
            factors.setdefault(matched[1], {})[matched[2]] = tensor
        elif key.startswith(PREFIX) and embedding and tensor.ndim == 2:
            # PEFT swaps the roles for embeddings; here the factor that starts at zero is always B.
            kind = "B" if embedding[2] == "A" else "A"
            factors.setdefault(embedding[1] + EMBEDDING, {})[kind] = tensor.mT.contiguous()
        elif key.startswith(PREFIX) and _is_saved(path, saved_modules):
            saved[path] = tensor
        elif _is_adapted_table(path, tensors):
            continue  # the untrained base weight, which PEFT saves too
        else:
            listed = short_repr(saved_modules) if saved_modules else "none"
            raise AdapterError(
                f"{name}: tensor {key} of shape {tuple(tensor.shape)} is neither a factor of a "
                f"linear layer nor of a module in modules_to_save ({listed}); it is not supported"
            )
    return factors, saved


def _is_adapted_table(path: str, tensors: Collection[str]) -> bool:
    """Return whether this is the base weight of an adapted embedding or head."""
    module = path.removesuffix(".base_layer.weight")
    if module == path or module.rpartition(".")[2] not in EMBEDDING_NAMES:
        return False
    kinds = ("lora_A.weight", "lora_embedding_A")
    return any(f"{PREFIX}{module}.{kind}" in tensors for kind in kinds)


def _pair_factors(pair: Mapping[str, Tensor], module: str, name: str) -> LowRank:
    """Return the validated factors of one module."""
    if pair.keys() != {"A", "B"}:
        raise AdapterError(
            f"{name}: module {module} has lora_{next(iter(pair))} only; wanted both factors"
        )
    for kind, factor in pair.items():
        if factor.dtype not in FACTOR_DTYPES:
            raise AdapterError(
                f"{name}: lora_{kind} of {module} is {factor.dtype}; wanted floating point"
            )
        if not factor.numel():
            raise AdapterError(f"{name}: lora_{kind} of {module} is empty, {tuple(factor.shape)}")
        if not is_finite(factor):
            raise AdapterError(f"{name}: lora_{kind} of {module} holds NaN or Inf")
    try:
        return LowRank(pair["B"], pair["A"])
    except ValueError as error:
        raise AdapterError(f"{name}: module {module}: {error}") from error


def _without_copies(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors without the copies that PEFT adds if the vocabulary was resized.

    In that case it writes a saved module three times: under its name, as `modules_to_save`, and as
    `original_module`, its state before training, which is never used.
    """
    result = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        owner, _, copy = module.rpartition(".")
        original = tensors.get(f"{owner}.{leaf}")
        if original is None or copy not in ("modules_to_save", "original_module"):
            result[key] = tensor
        elif copy == "modules_to_save" and not torch.equal(original, tensor):
            raise AdapterError(
                f"{name}: {key} and {owner}.{leaf} should be the same and differ; save the adapter "
                "again"
            )
    return result


def _is_saved(path: str, saved_modules: Sequence[str]) -> bool:
    """Return whether a tensor belongs to a module in `modules_to_save`.

    By PEFT's rule, the module's path ends in the name, even in the middle of a word: `norm` matches
    every layer norm.
    """
    parts = path.split(".")
    for end in range(1, len(parts)):
        owner = ".".join(parts[:end])
        if any(owner.endswith(name) for name in saved_modules if name):
            return True
    return False


def _added_embeddings(tensors: Mapping[str, Tensor], saved_modules: Sequence[str]) -> list[str]:
    """Return embeddings and head that PEFT saves automatically because tokens were added.

    They are fully trained modules even though the configuration does not name them.
    """
    added = []
    for key in tensors:
        if not key.endswith(".weight"):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".weight")
        is_named = any(module == name or module.endswith(f".{name}") for name in saved_modules)
        if module.rpartition(".")[2] in EMBEDDING_NAMES and not is_named:
            added.append(module)
    return sorted(added)


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


def write_adapter(adapter: Adapter, directory: Path | str) -> None:
    """Write a plain PEFT adapter directory, with the configuration of `plain_config`.

    Raises:
        AdapterError: If a tensor contains NaN or Inf, in which case nothing is written.
    """
    from peft import LoraConfig

    adapter = with_equal_experts(adapter)
    tensors = to_peft_tensors(adapter)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise AdapterError(
                f"{adapter.name}: tensor {key} holds NaN or Inf; nothing was written"
            )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = safetensors_bytes(tensors, ("format", "pt"))
    write_atomically(directory / "adapter_model.safetensors", data)
    plain = plain_config(adapter)
    lora_config: Any = LoraConfig(**plain)
    config = json_value(lora_config.to_dict())
    config["target_modules"] = plain["target_modules"]
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    write_atomically(directory / "adapter_config.json", text.encode())
