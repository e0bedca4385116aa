"""`Adapter`: a whole LoRA adapter as matrices, and its tensors by PEFT's names. torch only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedmomentum.errors import AdapterError
from fedmomentum.lowrank import LowRank

PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: what it adds to module m is `scalings[m] * modules[m]`.

    Attributes:
        modules: module path to its factors as PEFT stores them: A `(rank, in)`, B `(out, rank)`, also where the
            base layer keeps its weight transposed (Conv1D).
        scalings: module path to `lora_alpha / rank` (or `/ sqrt(rank)`), from the adapter's own configuration.
        saved: tensors trained in full (`modules_to_save`, such as a classification head), by tensor name.
        config: the adapter's PEFT configuration, as JSON values.
        name: what to call it in messages: a folder, a client.
    """

    modules: Mapping[str, LowRank]
    scalings: Mapping[str, float]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = "adapter"

    def effective(self, module: str) -> LowRank:
        """What this adapter adds to the weight of `module`: `scaling * B A`, `(out, in)`, in float64."""
        return self.modules[module].to(torch.float64).scaled(self.scalings[module])

    def num_numbers(self) -> int:
        """How many numbers the adapter holds, saved modules included."""
        factors = sum(m.B.numel() + m.A.numel() for m in self.modules.values())
        return factors + sum(tensor.numel() for tensor in self.saved.values())

    def digest(self) -> str:
        """SHA-256 over scalings and tensors: equal content, equal digest, whatever the name."""
        sha = hashlib.sha256(repr(sorted(self.scalings.items())).encode())
        for key, tensor in sorted(to_tensors(self).items()):
            sha.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
        return sha.hexdigest()


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names (`base_model.model.<module>.lora_A.weight`), contiguous."""
    tensors = {}
    for module, matrix in adapter.modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = matrix.A.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = matrix.B.contiguous()
    for name, tensor in adapter.saved.items():
        tensors[PREFIX + name] = tensor.contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], *, like: Adapter, name: str) -> Adapter:
    """An adapter of exactly the form of `like` from tensors that came over the wire.

    Raises:
        AdapterError: a tensor that is missing or unknown, of another shape or dtype, or not finite; the message
            names `name`, the tensor, what came and what was wanted.
    """
    wanted = to_tensors(like)
    for key in sorted(wanted.keys() | tensors.keys()):
        if key not in tensors:
            raise AdapterError(f"{name}: tensor {key} is missing")
        if key not in wanted:
            raise AdapterError(f"{name}: tensor {key} is unknown; this run trains {len(wanted)} tensors, not that one")
        got, want = tensors[key], wanted[key]
        if got.shape != want.shape:
            raise AdapterError(f"{name}: tensor {key} has shape {tuple(got.shape)}; wanted {tuple(want.shape)}")
        if got.dtype != want.dtype:
            raise AdapterError(f"{name}: tensor {key} has dtype {got.dtype}; wanted {want.dtype}")
        if not bool(torch.isfinite(got).all()):
            raise AdapterError(f"{name}: tensor {key} holds NaN or Inf; its training diverged, or its data is broken")
    modules = {
        module: LowRank(tensors[f"{PREFIX}{module}.lora_B.weight"], tensors[f"{PREFIX}{module}.lora_A.weight"])
        for module in like.modules
    }
    saved = {key: tensors[PREFIX + key] for key in like.saved}
    return replace(like, modules=modules, saved=saved, name=name)


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """The inverse of `to_tensors`: modules and saved tensors, for tensors that we wrote ourselves."""
    modules, saved = {}, {}
    for key in sorted(tensors):
        path = key.removeprefix(PREFIX)
        if path.endswith(".lora_A.weight"):
            module = path.removesuffix(".lora_A.weight")
            modules[module] = LowRank(tensors[f"{PREFIX}{module}.lora_B.weight"], tensors[key])
        elif not path.endswith(".lora_B.weight"):
            saved[path] = tensors[key]
    return modules, saved
