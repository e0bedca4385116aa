"""The files of a base model's directory: which ones transformers reads, and what is not supported.

Only JSON and safetensors headers are read here, so all checks are cheap and can run before a model
is loaded.
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
from fedmomentum.utils.io import damage_hint
from fedmomentum.utils.text import printable

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# safetensors' names of floating-point dtypes, whose elements are the weights themselves.
FLOATING = {"F64", "F32", "F16", "BF16"}
# Maximum number of file names listed in a message.
MAX_SHOWN = 3
# torch's distributed checkpoints: transformers prefers them to other files; we do not read them.
_DISTRIBUTED_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it.

    Attributes:
        file: The safetensors file that holds it.
        dtype: Safetensors' name of its dtype, such as `BF16`.
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_config(directory: Path) -> dict[str, Any]:
    """Return `config.json` as a dictionary; empty if there is none.

    Raises:
        ModelError: If it is not a JSON object.
    """
    return read_json_object(directory / "config.json")


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no such file.

    Raises:
        ModelError: If it is not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(
            f"{file} is not JSON: {printable(str(error))}; download the model again"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(
            f"{file} holds a {type(value).__name__}; wanted a JSON object. Download the model again"
        )
    return value


# ── files and tensors ─────────────────────────────────────────────────────────────────────────────


def checkpoint_files(directory: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from a model directory.

    These are the file named by the configuration, else `model.safetensors`, else the shards listed
    in `model.safetensors.index.json`. Any other file (a consolidated copy, a variant, a stale
    shard, an adapter) is not loaded, so it belongs neither to the identity nor to the weights.

    Raises:
        ModelError: If there are none, a shard is missing, or there are only pickled weights.
    """
    configured = read_config(directory).get("transformers_weights")
    if isinstance(configured, str):
        file = _file_in(directory, configured)
        return _shards(directory, file) if file.name.endswith(".index.json") else [file]
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        return _shards(directory, directory / INDEX_FILE)
    hint = ""
    others = sorted(file.name for file in directory.glob("*.safetensors"))
    if list(directory.glob("*.bin")):
        hint = ", which holds pickled weights only: convert them with save_pretrained"
    elif others:
        shown = ", ".join(others[:MAX_SHOWN])
        hint = f"; transformers does not read {shown} without an index that lists it"
    raise ModelError(f"no {SINGLE_FILE} and no {INDEX_FILE} in {directory}{hint}")


def _file_in(directory: Path, name: str) -> Path:
    """Return the file with a name in the directory; the name must not lead outside.

    Symlinks are followed, since the hub's cache consists of them.
    """
    has_separator = any(separator in name for separator in ("/", "\\", "\0"))
    if name in ("", ".", "..") or has_separator or not (directory / name).is_file():
        raise ModelError(
            f"{directory} has no file {printable(name)!r}, which its configuration or index names; "
            "download the model again"
        )
    return directory / name


def _shards(directory: Path, index: Path) -> list[Path]:
    """Return the files that an index lists."""
    weight_map = read_json_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(
            f"{index} has no weight_map of tensor names to file names; download the model again"
        )
    return [_file_in(directory, name) for name in sorted(set(weight_map.values()))]


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return all tensors of the checkpoint by their stored names.

    Raises:
        ModelError: If a file is not safetensors, or two files hold a tensor of the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in checkpoint_files(directory):
        for name, tensor in _tensors_of(file):
            if name in tensors:
                raise ModelError(
                    f"{tensors[name].file.name} and {file.name} in {directory} both hold "
                    f"{printable(name)}; one of them is from another model. Download the model "
                    "again"
                )
            tensors[name] = tensor
    return tensors


def _tensors_of(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                header = opened.get_slice(name)
                yield name, StoredTensor(file, header.get_dtype(), tuple(header.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not safetensors: {error}{damage_hint(file)}") from error


# ── unsupported directories ───────────────────────────────────────────────────────────────────────


def refuse_unusable(directory: Path, *, is_classifier: bool = False) -> None:
    """Reject a directory from which something other than the stored weights would be loaded.

    Args:
        directory: The model's directory.
        is_classifier: Whether it is loaded as a sequence classifier, for which the encoder of an
            embedding model may be used.

    Raises:
        ModelError: If the base is an embedding model, an adapter together with a model, or a
            distributed checkpoint.
    """
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"{directory} holds an adapter (adapter_config.json), which transformers would put on "
            "the model; use the directory of the base model alone"
        )
    names = sorted(file.name for file in directory.iterdir())
    distributed = [name for name in names if _DISTRIBUTED_FILE.fullmatch(name)]
    if distributed:
        raise ModelError(
            f"{directory} is a distributed checkpoint ({distributed[0]}); load it with "
            "transformers and write it by save_pretrained"
        )
    if not is_classifier:
        _refuse_embedding_model(directory)


def _refuse_embedding_model(directory: Path) -> None:
    """Reject a model that pools its outputs into one vector.

    sentence-transformers lists a model's parts in modules.json; if it lists pooling, the model does
    not predict next tokens.
    """
    file = directory / "modules.json"
    if not file.is_file():
        return
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError):
        return
    if not isinstance(parts, list):
        return
    kinds = [str(part.get("type", "")) for part in parts if isinstance(part, dict)]
    if any(kind.rpartition(".")[2] == "Pooling" for kind in kinds):
        raise ModelError(
            f"{directory} is an embedding model (modules.json names a pooling layer), not a causal "
            "language model; use the language model that it was made from"
        )
