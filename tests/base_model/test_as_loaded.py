"""Merged parts beside the weights as they were loaded: what arrives, bits, gradients, copies."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmomentum.base_model import side_branch
from fedmomentum.base_model.as_loaded import AsLoadedWeights
from fedmomentum.base_model.weight_format import resolve_weight_format
from fedmomentum.base_model.weights import BaseWeights, Float32Weights
from fedmomentum.errors import ModelError
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


def held(folder, kind="bias", dtype=torch.bfloat16, kind_of_weights=AsLoadedWeights, seed=0):
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
    return kind_of_weights({name: layer}, folder), layer, name


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_branch_is_factors_while_they_are_smaller_then_int8(tmp_path, dtype):
    """And its error does not grow with the number of parts."""
    weights, _, name = held(tmp_path, dtype=dtype)
    parts = residuals(weights, name, 50)
    # 48 x 64 bytes in int8; a part of rank 6 has 112 x 6 elements of 2 or 4 bytes.
    num_factored = OUT * IN // (6 * (OUT + IN) * dtype.itemsize + 1)
    branch = weights._forwards[name]
    for count in (num_factored, num_factored + 1, 10, 50):
        weights.apply(parts[:count])
        is_factored = branch.branch.dense is None
        assert is_factored == (count <= num_factored), count
        wanted = total(parts[:count], name)
        error = (merged_of(weights, name) - wanted).norm() / wanted.norm()
        assert float(error) < 0.01, count
    assert branch.branch.dense.values.dtype == torch.int8
    # As few bytes as they report, and a dense part is never kept as factors.
    weights.apply(residuals(weights, name, 1, dense=(0,)))
    assert branch.branch.dense is not None and branch.branch.factors is None


def state(weights: AsLoadedWeights, name: str) -> list[torch.Tensor]:
    branch = weights._forwards[name].branch
    tensors = [branch.dense.values, branch.dense.scales] if branch.dense else []
    return tensors + ([branch.factors.B, branch.factors.A] if branch.factors else [])


@pytest.mark.parametrize("kind_of_weights", [AsLoadedWeights, Float32Weights])
def test_part_by_part_gives_the_bits_of_all_at_once(tmp_path, kind_of_weights):
    """Also with a client's own parts in between, and after an error."""
    stepwise, layer, name = held(tmp_path, kind_of_weights=kind_of_weights)
    at_once, other_layer, _ = held(tmp_path, kind_of_weights=kind_of_weights)
    parts = residuals(at_once, name, 12, dense=(5,))
    own = residuals(at_once, name, 20)[-1]
    x = torch.randn(7, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    for count in range(1, 13):
        stepwise.apply(parts[:count], own if count % 3 else None)
        at_once.reset()
        at_once.apply(parts[:count], own if count % 3 else None)
        assert torch.equal(layer(x), other_layer(x))
        if kind_of_weights is AsLoadedWeights:
            assert all(map(torch.equal, state(stepwise, name), state(at_once, name)))
    stepwise.apply([])
    at_once.reset()
    assert torch.equal(layer(x), other_layer(x))


def test_a_clients_own_part_stays_in_factors_and_outside_the_sum(tmp_path):
    weights, _, name = held(tmp_path)
    parts = residuals(weights, name, 12)
    own = residuals(weights, name, 13)[-1]
    weights.apply(parts)
    before = weights._forwards[name].branch.dense
    weights.apply(parts, own)
    branch = weights._forwards[name].branch
    assert branch.dense is before and branch.factors.rank == own.matrices[name].rank
    wanted = total([*parts, own], name)
    assert float((merged_of(weights, name) - wanted).norm() / wanted.norm()) < 0.01
    with pytest.raises(ModelError, match="dense"):
        weights.apply(parts, Part("f" * 64, {name: own.matrices[name].dense()}))


def wide_product(left, right, *, out_dtype=None):
    """What `torch.mm` gives on a GPU: inputs of one dtype, sums in another."""
    assert left.dtype == right.dtype and out_dtype in (None, torch.float32)
    return left.to(out_dtype or left.dtype) @ right.to(out_dtype or left.dtype)


def wide_sum(total, left, right, *, out_dtype, out):
    """What `torch.addmm` gives on a GPU."""
    assert total.dtype == out_dtype == torch.float32 and out is total
    return total.add_(wide_product(left, right, out_dtype=out_dtype))


@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 12])
@pytest.mark.parametrize("device", ["cpu", "as on a gpu"])
def test_output_and_gradient_are_those_of_one_dense_weight(
    tmp_path, monkeypatch, kind, dtype, count, device
):
    if device != "cpu":
        # Products in 16 bits that are added in float32, which a CPU has no kernel for.
        monkeypatch.setattr(side_branch, "_multiplies_narrow", lambda x: True)
        monkeypatch.setattr(torch, "mm", wide_product)
        monkeypatch.setattr(torch, "addmm", wide_sum)
    weights, layer, name = held(tmp_path, kind, dtype)
    # Larger than a residual, so that a gradient without the branch would be wrong.
    parts = [
        Part(p.name, {name: p.matrices[name].scaled(1e3)}) for p in residuals(weights, name, count)
    ]
    weights.apply(parts, parts[0])
    dense = weights.pretrained(name) + (total(parts, name) + total(parts[:1], name)).float()
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    probe = torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(2))
    x.requires_grad_()
    output = layer(x)
    (output.float() * probe).sum().backward()
    reference = x.detach().float().requires_grad_()
    bias = layer.bias.float() if getattr(layer, "bias", None) is not None else 0.0
    wanted = reference @ dense.T + bias
    (wanted * probe).sum().backward()
    tolerance = 0.012 if dtype != torch.float32 or count > 1 else 1e-5
    assert output.dtype == x.grad.dtype == dtype
    deviation = output.detach().float() - wanted.detach()
    assert float(deviation.norm() / wanted.detach().norm()) < tolerance
    assert float((x.grad.float() - reference.grad).norm() / reference.grad.norm()) < tolerance


def test_a_16_bit_output_is_rounded_once_not_twice(tmp_path):
    """A 16-bit output is the float32 sum rounded once: a branch beside a rounded output would be lost in it."""
    weights, layer, name = held(tmp_path, "bias")
    parts = residuals(weights, name, 1)
    weights.apply(parts)
    branch = weights._forwards[name].branch
    x = torch.randn(64, IN, generator=torch.Generator().manual_seed(1)).bfloat16()
    summed = weights.pretrained(name) + branch.factors.B.float() @ branch.factors.A.float()
    once = (x.float() @ summed.T + layer.bias.float()).bfloat16()
    assert float((layer(x) == once).float().mean()) > 0.999
    plain = x @ layer.weight.T + layer.bias
    twice = plain + (x.float() @ total(parts, name).float().T).bfloat16()
    assert float((twice == plain).float().mean()) > 0.8  # what adding afterwards would have done


def test_without_parts_the_layer_is_the_one_that_was_loaded(tmp_path):
    weights, layer, name = held(tmp_path, "bias")
    stored = layer.weight.detach().clone()
    x = torch.randn(9, IN).bfloat16()
    plain = nn.functional.linear(x, stored, layer.bias)
    assert torch.equal(layer(x), plain)
    weights.apply(residuals(weights, name, 9))
    assert not torch.equal(layer(x), plain) and torch.equal(layer.weight, stored)
    weights.apply([])
    assert torch.equal(layer(x), plain)


def test_a_copy_has_a_branch_of_its_own(tmp_path):
    weights, layer, name = held(tmp_path, "bias")
    weights.apply(residuals(weights, name, 9))
    x = torch.randn(9, IN).bfloat16()
    copied = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(copied(x), before) and copied.weight is not layer.weight
    weights.apply([])
    assert torch.equal(copied(x), before) and not torch.equal(layer(x), before)
    with torch.no_grad():
        copied.weight.zero_()
    assert not torch.equal(copied(x), before)  # its own weight, too


def test_only_the_branch_is_kept_for_the_backward_pass(tmp_path):
    weights, layer, name = held(tmp_path, "bias")
    weights.apply(residuals(weights, name, 12))
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(3, IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum().backward()
    assert not any(tensor.numel() >= OUT * IN for tensor in kept)


def test_parts_that_do_not_fit_are_refused_before_anything_changes(tmp_path):
    weights, layer, name = held(tmp_path)
    parts = residuals(weights, name, 3)
    weights.apply(parts)
    x = torch.randn(9, IN).bfloat16()
    before = layer(x)
    other = LowRank(torch.ones(OUT, 2), torch.ones(2, IN + 1))
    with pytest.raises(ModelError, match="another shape"):
        weights.apply([*parts, Part("e" * 64, {name: other})])
    with pytest.raises(ModelError, match="not adapted here"):
        weights.apply([*parts, Part("e" * 64, {"other": parts[0].matrices[name]})])
    assert torch.equal(layer(x), before)


def test_another_weight_than_the_stored_one_is_refused(tmp_path):
    _, layer, _ = held(tmp_path)
    with torch.no_grad():
        layer.weight[3, 4] += 1
    with pytest.raises(ModelError, match="transformers loads another weight"):
        AsLoadedWeights({"layer": layer}, tmp_path)


class Rounding(nn.Linear):
    """A layer that rounds its weight and its input to ten bits, as TF32 does."""

    def forward(self, x):
        rounded = []
        for tensor in (x, self.weight):
            bits = tensor.contiguous().view(torch.int32) + 0x1000
            rounded.append(bits.bitwise_and(-0x2000).view(torch.float32))
        return nn.functional.linear(*rounded)


def test_a_forward_that_rounds_weights_shows_in_its_outputs(tmp_path):
    """A float32 weight from a 16-bit checkpoint holds a residual; what TF32 computes with does not."""
    stored = (torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / 8).bfloat16()
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"layer.weight": stored}))
    layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    layer.weight.data.copy_(stored)
    weights = Float32Weights({"layer": layer}, tmp_path)
    parts = residuals(weights, "layer", 1)
    wanted = total(parts, "layer")

    def share() -> float:
        return float((merged_of(weights, "layer") * wanted).sum() / wanted.square().sum())

    weights.apply(parts)
    assert share() == pytest.approx(1, abs=1e-4)
    layer.__class__ = Rounding
    assert share() < 0.95
    in_store = layer.weight.detach() - weights.pretrained("layer")
    assert float((in_store - wanted).norm() / wanted.norm()) < 1e-3


# ── the choice ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("on_gpu", "dtype", "is_quantized", "wanted"),
    [
        (False, torch.bfloat16, False, "float32"),
        (True, torch.bfloat16, False, "as-loaded"),
        (True, torch.float16, False, "as-loaded"),
        (True, torch.float32, False, "float32"),
        (False, torch.float32, True, "as-loaded"),
    ],
)
def test_auto_holds_narrow_weights_of_a_gpu_and_quantized_ones_as_loaded(
    on_gpu, dtype, is_quantized, wanted
):
    facts = {"on_gpu": on_gpu, "dtype": dtype, "is_quantized": is_quantized}
    assert resolve_weight_format("auto", **facts) == wanted
    assert resolve_weight_format("as-loaded", **facts) == "as-loaded"
    if not is_quantized:
        assert resolve_weight_format("float32", **facts) == "float32"
