"""Merged parts beside the weights as they were loaded: what arrives, bits, gradients, copies."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmomentum.base_model.as_loaded import AsLoadedWeights
from fedmomentum.base_model.weights import BaseWeights
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import Matrix, to_dense
from fedmomentum.utils.tensors import safetensors_bytes

OUT, IN = 48, 64
RESIDUAL = 3e-4
"""The norm of a round's residual over that of the weight, as measured in real runs."""


@dataclass
class Part:
    name: str
    matrices: Mapping[str, Matrix]


def layer_of(kind: str, dtype: torch.dtype) -> nn.Module:
    if kind == "conv1d":
        return Conv1D(OUT, IN).to(dtype)
    if kind == "embedding":
        return nn.Embedding(OUT, IN, dtype=dtype)
    return nn.Linear(IN, OUT, bias=kind == "bias", dtype=dtype)


def held(folder, kind="bias", dtype=torch.bfloat16, holding=AsLoadedWeights, seed=0):
    """One layer with its checkpoint, held; the layer and its matrix's name."""
    torch.manual_seed(seed)
    layer = layer_of(kind, dtype).requires_grad_(False)
    layer.weight.data.copy_(torch.randn(layer.weight.shape) / IN**0.5)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data.copy_(torch.randn(OUT))
    (folder / "model.safetensors").write_bytes(
        safetensors_bytes({"layer.weight": layer.weight.detach()})
    )
    name = "layer[embedding]" if kind == "embedding" else "layer"
    return holding({name: layer}, folder), layer, name


def residuals(weights: BaseWeights, name: str, count: int, rank: int = 6, dense=()) -> list[Part]:
    """Parts of random directions, each `RESIDUAL` of the weight's norm."""
    generator = torch.Generator().manual_seed(7)
    norm = float(weights.pretrained(name).norm())
    parts = []
    for index in range(count):
        B = torch.randn(OUT, rank, generator=generator)
        A = torch.randn(rank, IN, generator=generator)
        part = LowRank(B * (RESIDUAL * norm / float((B @ A).norm())), A)
        matrix = part.dense() if index in dense else part
        parts.append(Part(f"{index:064x}", {name: matrix}))
    return parts


def total(parts: list[Part], name: str) -> torch.Tensor:
    return sum(to_dense(part.matrices[name]).double() for part in parts)


def merged_of(weights: BaseWeights, name: str) -> torch.Tensor:
    """What the forward adds to the pretrained weight, `(out, in)`, from its own outputs."""
    X = weights.inputs(name, torch.eye(IN))
    before = weights.pretrained_outputs({name: X})[name]
    return weights.outputs(name, X).double() - before.double()


@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d", "embedding"])
@pytest.mark.parametrize("count", [1, 3, 50])
def test_small_residuals_arrive_in_the_forward_of_a_16_bit_layer(tmp_path, kind, count):
    weights, _, name = held(tmp_path, kind)
    parts = residuals(weights, name, count)
    weights.apply(parts)
    wanted = total(parts, name)
    got = merged_of(weights, name)
    assert float((got * wanted).sum() / wanted.square().sum()) == pytest.approx(1, abs=0.002)
    assert float((got - wanted).norm() / wanted.norm()) < 0.01
