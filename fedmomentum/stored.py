"""What a base model's directory holds: the files that transformers reads, their tensors, and what rules it out.

Only JSON and safetensors headers are read here, so every check is cheap and comes before a model is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedmomentum.errors import ModelError
from fedmomentum.schema import printable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATING = {"F64", "F32", "F16", "BF16"}
"""safetensors' names of the dtypes whose numbers are the weights themselves."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# torch's distributed checkpoint; transformers prefers it to the other files, and we do not read it.
_DISTRIBUTED_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it.

    Attributes:
        file: The safetensors file that holds it.
        dtype: safetensors' name of its dtype, such as ``BF16``.
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` as a dictionary, empty where there is none.

    Raises:
        ModelError: If it is not a JSON object.
    """
    return read_json_object(folder / "config.json")


def read_json_object(file: Path) -> dict[str, Any]:
    """Return a file's JSON object, empty where there is no such file.

    Raises:
        ModelError: If it is not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{file} is not JSON: {printable(str(error))}; download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}; wanted a JSON object. Download the model again")
    return value


# ── files and tensors ────────────────────────────────────────────────────────────────────────────────────────────


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from a model directory, and no others.

    These are the file that the configuration names, else ``model.safetensors``, else the shards that
    ``model.safetensors.index.json`` lists. Whatever else lies there (a consolidated copy, a variant, a stale shard, an
    adapter) belongs to no loaded model, and so neither to its identity nor to its weights.

    Raises:
        ModelError: If there are none, a shard is missing, or only pickled weights are there.
    """
    named = read_config(folder).get("transformers_weights")
    if isinstance(named, str):
        chosen = _inside(folder, named)
        return _shards(folder, chosen) if chosen.name.endswith(".index.json") else [chosen]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _shards(folder, folder / INDEX_FILE)
    hint = ""
    if list(folder.glob("*.bin")):
        hint = ", which holds pickled weights only: convert them with save_pretrained"
    elif others := sorted(file.name for file in folder.glob("*.safetensors")):
        hint = f"; transformers does not read {', '.join(others[:3])} without an index that lists it"
    raise ModelError(f"no {SINGLE_FILE} and no {INDEX_FILE} in {folder}{hint}")


def _inside(folder: Path, name: str) -> Path:
    """The file of that name in the directory; links are followed, as the hub's cache is made of them."""
    is_plain = name not in ("", ".", "..") and "/" not in name and "\\" not in name and "\0" not in name
    if not is_plain or not (folder / name).is_file():
        raise ModelError(
            f"{folder} has no file {printable(name)!r}, which its configuration or index names; download the model "
            "again"
        )
    return folder / name


def _shards(folder: Path, index: Path) -> list[Path]:
    listed = read_json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ModelError(f"{index} has no weight_map of tensor names to file names; download the model again")
    return [_inside(folder, name) for name in sorted(set(listed.values()))]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint by its stored name.

    Raises:
        ModelError: If a file is not safetensors, or two files hold a tensor of the same name.
    """
    found: dict[str, StoredTensor] = {}
    for file in checkpoint_files(folder):
        for name, tensor in _tensors_of(file):
            if name in found:
                raise ModelError(
                    f"{found[name].file.name} and {file.name} in {folder} both hold {printable(name)}; one of them is "
                    "from another model. Download the model again"
                )
            found[name] = tensor
    return found


def _tensors_of(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                yield name, StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not safetensors: {error}") from error


# ── what rules a directory out ───────────────────────────────────────────────────────────────────────────────────


def refuse_unusable(folder: Path) -> None:
    """Refuse a directory whose weights would be loaded as something else than what is stored.

    Raises:
        ModelError: If the base is quantized, an embedding model, an adapter together with a model, or a distributed
            checkpoint.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), which transformers would put on the model; use the "
            "directory of the base model alone"
        )
    if distributed := sorted(file.name for file in folder.iterdir() if _DISTRIBUTED_FILE.fullmatch(file.name)):
        raise ModelError(
            f"{folder} is a distributed checkpoint ({distributed[0]}); load it with transformers and write it by "
            "save_pretrained"
        )
    _refuse_quantized(folder)
    _refuse_embedding_model(folder)


def _refuse_quantized(folder: Path) -> None:
    """Quantized weights are codes. Without their scales they are no weights, and scales have no place in a plain model.

    transformers can turn some back into floating point, but then what is loaded is not what is stored.
    """
    advice = (
        "quantized base models are not supported. Use the model's release in bfloat16, float16 or float32, or "
        "dequantize it with transformers and save_pretrained"
    )
    config = read_config(folder)
    nested = [value for value in config.values() if isinstance(value, dict)]
    for table in [config, *nested]:
        for key in QUANTIZATION_KEYS:
            if table.get(key):
                settings = table[key]
                method = settings.get("quant_method") if isinstance(settings, dict) else settings
                raise ModelError(f"{folder} is quantized ({key}: {printable(str(method))}); {advice}")
    for name, tensor in stored_tensors(folder).items():
        # Integers and booleans may be masks and positions; `base.load_base` checks that none of them is a weight.
        if tensor.dtype not in FLOATING and tensor.dtype[0] in "FC":
            raise ModelError(f"{folder} stores {printable(name)} in {tensor.dtype}; {advice}")


def _refuse_embedding_model(folder: Path) -> None:
    """sentence-transformers lists a model's parts in modules.json; one that pools gives vectors and no next token."""
    file = folder / "modules.json"
    if not file.is_file():
        return
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return
    kinds = [str(part.get("type", "")) for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    if any(kind.rpartition(".")[2] == "Pooling" for kind in kinds):
        raise ModelError(
            f"{folder} is an embedding model (modules.json names a pooling layer), not a causal language model; use "
            "the language model that it was made from"
        )
