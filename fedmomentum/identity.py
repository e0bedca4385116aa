"""Which base model: named, found on disk or on the hub, and identified by its content."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedmomentum.embedded import cache_folder, smollm2_folder
from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.files import sha256, write_json
from fedmomentum.schema import Hash, Schema, parse_json
from fedmomentum.stored import checkpoint_files, read_config

EMBEDDED_NAME = "smollm2-135m-instruct"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model an adapter or a global model belongs to.

    Attributes:
        name: how the user named it: a folder, a hub name, or the embedded model's name.
        revision: of the hub repository, if one was asked for.
        sha256: over the sorted (name, shape, stored dtype, bytes) of the checkpoint's tensors, tied ones once;
            None where adapters were combined without their base at hand.
        tokenizer_sha256: over the tokenizer's files and chat template.
    """

    name: str
    revision: str | None = None
    sha256: str | None = None
    tokenizer_sha256: str | None = None

    def check(self, other: BaseIdentity) -> None:
        """Refuse another base than this one; an unknown hash fits any.

        Raises:
            ModelError: both hashes are known and differ.
        """
        if self.sha256 and other.sha256 and self.sha256 != other.sha256:
            raise ModelError(
                f"the base model differs: wanted {self.name} with SHA-256 {self.sha256[:16]}..., got {other.name} with "
                f"{other.sha256[:16]}...; use the base that the run was made with"
            )


# ── found and identified ─────────────────────────────────────────────────────────────────────────────────────────


def resolve_base(name: str, revision: str | None = None) -> Path:
    """The local folder of a base model: a folder, the embedded model, or a hub name (from the hub or its cache).

    Raises:
        ModelError: there is no such folder, nor can the hub be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if name == EMBEDDED_NAME:
        return smollm2_folder(print)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"no folder {name}; give a folder with config.json and model.safetensors, or a hub name")
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many kinds, all of which mean: not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"base model {name!r} is neither a folder nor the embedded {EMBEDDED_NAME!r}, and the hub gave: {reason}. "
            "Without a network, give the path of a downloaded model folder"
        ) from error


def identify(name: str, folder: Path, revision: str | None = None) -> BaseIdentity:
    """Return the identity of the model in a directory.

    The hash is kept in a cache by the files' paths, sizes and times.

    Raises:
        ModelError: If there are no weights, or they cannot be read.
    """
    files = checkpoint_files(folder)
    is_tied = bool(read_config(folder).get("tie_word_embeddings"))
    facts: list[str | int] = [is_tied]
    for file in files:
        status = file.stat()
        facts += [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    cache = cache_folder() / "identities" / f"{sha256(repr(facts).encode())}.json"
    digest = _cached(cache)
    if digest is None:
        digest = _hash_tensors(files, tied=is_tied)
        with contextlib.suppress(OSError):  # a home that may not be written costs the time of the next hash
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, {"sha256": digest})
    tokenizer = hashlib.sha256()
    for file in (folder / name for name in TOKENIZER_FILES):
        if file.is_file():
            tokenizer.update(f"{file.name} {sha256(file.read_bytes())}\n".encode())
    return BaseIdentity(name, revision, digest, tokenizer.hexdigest())


class _CachedHash(Schema, frozen=True):
    sha256: Hash


def _cached(file: Path) -> str | None:
    """The hash in a file of the cache; None where there is none, or the file is damaged."""
    try:
        return parse_json(file.read_bytes(), _CachedHash, str(file)).sha256
    except (OSError, FedMomentumError):
        return None


def _hash_tensors(files: Sequence[Path], *, tied: bool) -> str:
    lines, seen = [], set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    tensor = opened.get_tensor(name)
                    content = sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
                    if tied and name.endswith(
                        ("lm_head.weight", "embed_out.weight", "embed_tokens.weight", "wte.weight")
                    ):
                        if content in seen:
                            continue
                        seen.add(content)
                        name = "tied embedding"  # whichever of the two names the file stores
                    lines.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {content}")
        except SafetensorError as error:
            raise ModelError(f"{file} is not safetensors: {error}") from error
    return sha256("\n".join(sorted(lines)).encode())
