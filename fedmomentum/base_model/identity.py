"""`BaseIdentity`: identifies a base model by its name and the hash of its content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmomentum.base_model.bundled import cache_directory
from fedmomentum.base_model.checkpoint_files import checkpoint_files, read_config
from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.formats.manifest import Base, Quantization
from fedmomentum.utils.io import damage_hint, sha256, write_json
from fedmomentum.utils.schema import Hash, Schema, parse_json
from fedmomentum.utils.text import printable

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Common names of the embeddings and the head, which may be a single tensor.
TIED_NAMES = ("lm_head.weight", "embed_out.weight", "embed_tokens.weight", "wte.weight")


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model an adapter or a global model belongs to.

    Attributes:
        name: The user's name for it: a directory, a hub name, or the bundled model's name.
        revision: The revision of the hub repository, if one was requested.
        sha256: Hash over the sorted (name, shape, stored dtype, bytes) of the checkpoint's tensors,
            counting tied ones once; None if adapters were combined without their base.
        tokenizer_sha256: Hash over the tokenizer's files and chat template.
        labels: Labels of a sequence classifier, in the order of its head's outputs; together with
            the checkpoint, they determine the head that training starts from. Empty for a language
            model, or if adapters were combined without their base.
        quantization: How weights were quantized on loading; None if they were not, even if they are
            stored quantized.
    """

    name: str
    revision: str | None = None
    sha256: str | None = None
    tokenizer_sha256: str | None = None
    labels: tuple[str, ...] = ()
    quantization: Quantization | None = None

    @classmethod
    def of(cls, base: Base) -> BaseIdentity:
        """Return the identity in a manifest."""
        return cls(
            base.name,
            base.revision,
            base.sha256,
            base.tokenizer_sha256,
            base.labels,
            base.quantization,
        )

    def record(self) -> dict[str, Any]:
        """Return the identity for a manifest, omitting `quantization` if None, as old ones do."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.quantization is None:
            del fields["quantization"]
        else:
            fields["quantization"] = self.quantization.record()
        return fields

    def check(self, other: BaseIdentity) -> None:
        """Reject a base model other than this one; an unknown hash, or no labels, match any.

        Raises:
            ModelError: If hashes or labels are known on both sides and differ, or the quantization
                differs.
        """
        if self.sha256 and other.sha256 and self.sha256 != other.sha256:
            raise ModelError(
                f"the base model differs: wanted {self.name} with SHA-256 {self.sha256[:16]}..., "
                f"got {other.name} with {other.sha256[:16]}...; use the base that the run was made "
                "with"
            )
        if self.labels and other.labels and self.labels != other.labels:
            raise ModelError(
                f"the classifier's labels differ: wanted {_shown(self.labels)}; got "
                f"{_shown(other.labels)}. Give all parties the same model.labels, in this order, "
                "and the data that the run began with"
            )
        # Adapters combined without their base have no hash, and do not know the quantization.
        if self.sha256 and other.sha256 and self.quantization != other.quantization:
            raise ModelError(
                f"the base model is quantized differently on loading: wanted "
                f"{self.quantization or 'no quantization'}, got "
                f"{other.quantization or 'no quantization'}. Give all parties the same "
                "model.quantization: what was trained belongs to the weights as they were quantized"
            )


def _shown(labels: Sequence[str]) -> str:
    return printable(", ".join(map(repr, labels)), 300)


def identify(
    name: str,
    directory: Path,
    revision: str | None = None,
    quantization: Quantization | None = None,
) -> BaseIdentity:
    """Return the identity of the model in a directory, loaded with this quantization.

    The hash covers the stored tensors, and is cached by the files' paths, sizes and times.

    Raises:
        ModelError: If there are no weights, or they cannot be read.
    """
    files = checkpoint_files(directory)
    is_tied = bool(read_config(directory).get("tie_word_embeddings"))
    cache_key = sha256(repr(_file_facts(files, is_tied)).encode())
    cache_file = cache_directory() / "identities" / f"{cache_key}.json"
    digest = _read_cached(cache_file)
    if digest is None:
        digest = _hash_tensors(files, is_tied=is_tied)
        # If the cache cannot be written, the next run hashes again.
        with contextlib.suppress(OSError):
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache_file, {"sha256": digest})
    return BaseIdentity(
        name, revision, digest, _hash_tokenizer(directory), quantization=quantization
    )


def _file_facts(files: Sequence[Path], is_tied: bool) -> list[str | int]:
    """Return metadata that changes whenever a file is replaced or modified."""
    facts: list[str | int] = [is_tied]
    for file in files:
        status = file.stat()
        facts += [
            str(file.resolve()),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        ]
    return facts


class _CachedHash(Schema, frozen=True):
    sha256: Hash


def _read_cached(file: Path) -> str | None:
    """Return the hash in a cache file; None if the file is missing or damaged."""
    try:
        return parse_json(file.read_bytes(), _CachedHash, str(file)).sha256
    except (OSError, FedMomentumError):
        return None


def _hash_tensors(files: Sequence[Path], *, is_tied: bool) -> str:
    """Return the hash of all tensors, counting identical tied ones once."""
    lines = []
    tied_contents = set()
    for file in files:
        for name, tensor in _tensors(file):
            content = sha256(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if is_tied and name.endswith(TIED_NAMES):
                if content in tied_contents:
                    continue
                tied_contents.add(content)
                name = "tied embedding"  # a file may store it under either name
            lines.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {content}")
    return sha256("\n".join(sorted(lines)).encode())


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise ModelError(f"{file} is not safetensors: {error}{damage_hint(file)}") from error


def _hash_tokenizer(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        file = directory / name
        if file.is_file():
            digest.update(f"{file.name} {sha256(file.read_bytes())}\n".encode())
    return digest.hexdigest()
