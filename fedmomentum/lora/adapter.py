"""`Adapter`: a LoRA adapter as matrices, and its tensors under PEFT's names. torch only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedmomentum.errors import AdapterError
from fedmomentum.linalg.low_rank import LowRank

# PEFT's prefix to a module's path in the names of saved tensors.
PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter, which adds `scalings[m] * modules[m]` to the weight of module m.

    Attributes:
        modules: Module path to its factors as PEFT stores them: A `(rank, in)`, B `(out, rank)`,
            even if the base layer stores its weight transposed (Conv1D).
        scalings: Module path to `lora_alpha / rank` (or `/ sqrt(rank)`), from the adapter's
            configuration.
        saved: Fully trained tensors (`modules_to_save`, such as a classification head) by name.
        config: The adapter's PEFT configuration, as JSON values.
        name: Its name in messages, such as a directory or a client.
    """

    modules: Mapping[str, LowRank]
    scalings: Mapping[str, float]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = "adapter"

    def effective(self, module: str) -> LowRank:
        """Return `scaling * B A` of a module, `(out, in)`, in float64."""
        return self.modules[module].to(torch.float64).scaled(self.scalings[module])

    def num_parameters(self) -> int:
        """Return the number of elements of all factors and saved tensors."""
        factors = sum(matrix.B.numel() + matrix.A.numel() for matrix in self.modules.values())
        return factors + sum(tensor.numel() for tensor in self.saved.values())

    def digest(self) -> str:
        """Return the SHA-256 of scalings and tensors, independent of the adapter's name."""
        sha = hashlib.sha256(repr(sorted(self.scalings.items())).encode())
        for key, tensor in sorted(to_tensors(self).items()):
            sha.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
        return sha.hexdigest()


def to_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the adapter's tensors under PEFT's names, contiguous.

    For example, factor A of a module is named `base_model.model.<module>.lora_A.weight`.
    """
    tensors = {}
    for module, matrix in adapter.modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = matrix.A.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = matrix.B.contiguous()
    for name, tensor in adapter.saved.items():
        tensors[PREFIX + name] = tensor.contiguous()
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], *, like: Adapter, name: str) -> Adapter:
    """Return an adapter with exactly the layout of `like`, from tensors received over the network.

    Raises:
        AdapterError: If a tensor is missing or unknown, has a different shape or dtype, or is not
            finite; the message contains `name`, the tensor, and what was received and expected.
    """
    expected = to_tensors(like)
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors:
            raise AdapterError(f"{name}: tensor {key} is missing")
        if key not in expected:
            raise AdapterError(
                f"{name}: tensor {key} is unknown; this run trains {len(expected)} tensors, not "
                "that one"
            )
        _check_like(tensors[key], expected[key], f"{name}: tensor {key}")
    modules = {}
    for module in like.modules:
        B = tensors[f"{PREFIX}{module}.lora_B.weight"]
        modules[module] = LowRank(B, tensors[f"{PREFIX}{module}.lora_A.weight"])
    saved = {key: tensors[PREFIX + key] for key in like.saved}
    return replace(like, modules=modules, saved=saved, name=name)


def _check_like(tensor: Tensor, expected: Tensor, name: str) -> None:
    """Reject a tensor whose shape or dtype differs from the expected, or that is not finite."""
    if tensor.shape != expected.shape:
        raise AdapterError(
            f"{name} has shape {tuple(tensor.shape)}; wanted {tuple(expected.shape)}"
        )
    if tensor.dtype != expected.dtype:
        raise AdapterError(f"{name} has dtype {tensor.dtype}; wanted {expected.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError(f"{name} holds NaN or Inf; its training diverged, or its data is broken")


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Return the modules and saved tensors, as the inverse of `to_tensors`, without checks."""
    modules = {}
    saved = {}
    for key in sorted(tensors):
        path = key.removeprefix(PREFIX)
        if path.endswith(".lora_A.weight"):
            module = path.removesuffix(".lora_A.weight")
            modules[module] = LowRank(tensors[f"{PREFIX}{module}.lora_B.weight"], tensors[key])
        elif not path.endswith(".lora_B.weight"):
            saved[path] = tensors[key]
    return modules, saved


def fresh_adapter(
    shape: tuple[int, int],
    rank: int,
    generator: torch.Generator | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> LowRank:
    """Return LoRA's initialization: B zero, A uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5)).

    A is sampled in float64 on the generator's device, so that the same seed yields the same bits on
    every machine.

    Args:
        shape: `(out, in)`.
        rank: The rank.
        generator: Samples A; None for a generator seeded with 0.
        dtype: The dtype of the factors.
        device: The device of the factors.
    """
    generator = generator or torch.Generator().manual_seed(0)
    out_size, in_size = shape
    sample = torch.rand(
        rank, in_size, generator=generator, dtype=torch.float64, device=generator.device
    )
    A = ((sample * 2 - 1) / math.sqrt(in_size)).to(device, dtype)
    return LowRank(A.new_zeros(out_size, rank), A)


# The largest norm of a factor or of a module's update; its square still fits into float32.
MAX_NORM = 1e18


def check_size(adapter: Adapter) -> None:
    """Reject factors whose products, squared and summed, would exceed the range of float32.

    Raises:
        AdapterError: If there are any; the message names the adapter and the module.
    """
    for module, matrix in adapter.modules.items():
        scaling = adapter.scalings[module]
        norm_B = float(torch.linalg.vector_norm(matrix.B.to(torch.float64)))
        norm_A = float(torch.linalg.vector_norm(matrix.A.to(torch.float64)))
        largest = max(norm_B, norm_A, scaling * norm_B, scaling * norm_B * norm_A)
        if not largest < MAX_NORM:  # also if it is NaN
            raise AdapterError(
                f"{adapter.name}: module {module} has factors of norm {norm_B:.3g} and "
                f"{norm_A:.3g} and scaling {scaling:.3g}, too large for sums in float32 (at most "
                f"{MAX_NORM:g}); its training diverged. Leave this adapter out"
            )
