"""Forwards of live layers that add a side branch to the weight as loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmomentum.base_model.side_branch import EMPTY, BranchedProduct, SideBranch, multiply
from fedmomentum.base_model.weight_slots import WeightSlot
from fedmomentum.lora.module_names import is_embedding
from fedmomentum.utils.quantized import is_eight_bit

# Number of embedding rows that a probe multiplies at a time.
CHUNK_ROWS = 4096


class BranchedLayer:
    """Replacement for a layer's `forward`; without a branch it computes what the original does.

    It belongs to the layer: a deep copy of the layer has its own copy, which shares the branch's
    tensors until it gets another branch.

    Args:
        slot: The place of the weight W, with which the layer computes `x W^T + bias`.
    """

    def __init__(self, slot: WeightSlot) -> None:
        self.slot = slot
        self.branch: SideBranch = EMPTY
        self._plain = slot.owner.forward
        # In evaluation and on a GPU, bitsandbytes' int8 rounds inputs to 8 bits, except in columns
        # with a large value in any row of the batch. The output would then depend on the batch, and
        # on whether anything was merged, so such layers always use the dequantized weight.
        self._rounds_inputs = is_eight_bit(slot.owner)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        if self.branch.is_empty and not self._rounds_inputs:
            output: Tensor = self._plain(x)
            return output
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for the weight plus the branch."""
        dtype = self.slot.dtype
        # Follow autocast, as the layer's own product would.
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        bias = getattr(self.slot.owner, "bias", None)
        product: Any = BranchedProduct.apply
        y: Tensor = product(flat, partial(self.slot.loaded, dtype), self.branch, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def outputs(self, X: Tensor, branch: SideBranch) -> Tensor:
        """Return `(W + D) X` `(out, n)` before rounding, for any branch D."""
        return multiply(X.mT, self.slot.loaded(X.dtype), branch).mT


class BranchedEmbedding(BranchedLayer):
    """Replacement for an embedding's `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows of the weight plus the branch for the tokens x."""
        return self._rows(x, self.branch).to(self.slot.dtype)

    def outputs(self, X: Tensor, branch: SideBranch) -> Tensor:
        """Return `(W + D) X` `(out, n)`, from all rows as the lookup returns them."""
        products = []
        for ids in torch.arange(self.slot.shape[0], device=X.device).split(CHUNK_ROWS):
            rows = self._rows(ids, branch)
            products.append(rows @ X.to(rows.dtype))
        return torch.cat(products)

    def _rows(self, ids: Tensor, branch: SideBranch) -> Tensor:
        """Look up rows in float32."""
        loaded = self.slot.loaded()[ids]
        rows = loaded.to(torch.promote_types(loaded.dtype, torch.float32))
        if branch.dense is not None:
            rows = rows + branch.dense.values[ids] * branch.dense.scales[ids]
        if branch.factors is not None:
            B = branch.factors.B[ids].to(rows.dtype)
            rows = rows + B @ branch.factors.A.to(rows.dtype)
        return rows


def branch_on(slot: WeightSlot) -> BranchedLayer:
    """Return a layer's branched forward, installing it first if needed."""
    forward = slot.owner.__dict__.get("forward")
    if not isinstance(forward, BranchedLayer):
        kind = BranchedEmbedding if is_embedding(slot.name) else BranchedLayer
        forward = kind(slot)
        slot.owner.forward = forward
    return forward


def adapted_in_place(model: nn.Module | None) -> set[int]:
    """Return the ids of modules whose parameters PEFT adapts by adding to the weight itself."""
    modules = set()
    for module in model.modules() if model is not None else ():
        if hasattr(module, "parameter_name"):
            wrapper: Any = module
            modules.add(id(wrapper.get_base_layer()))
    return modules


def can_branch(slot: WeightSlot) -> bool:
    """Return whether the forward of a checked layer is just the product with its weight."""
    if slot.expert is not None:
        return False
    if is_embedding(slot.name):
        # Some embeddings scale what they look up, or modify their weights during lookup.
        is_lookup = type(slot.owner).forward is nn.Embedding.forward
        return is_lookup and slot.owner.max_norm is None
    return True
