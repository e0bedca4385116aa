"""The whole global model as one LoRA adapter for the unchanged base model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fedmomentum.linalg.low_rank import LowRank, from_svd
from fedmomentum.lora.adapter import Adapter
from fedmomentum.lora.peft_layout import with_equal_experts

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.linalg.matrix import Matrix


def to_single_adapter(model: GlobalModel) -> Adapter:
    """Return the whole model as one LoRA adapter with scaling 1.

    Each module has the smallest rank that represents `base_update + s B A`.
    """
    modules = {}
    for module in model.adapter.modules:
        modules[module] = _factorize(model.effective(module)).to(torch.float32)
    named = {"base_model_name_or_path": model.base.name, "revision": model.base.revision}
    config = {**model.adapter.config, **named}
    scalings = dict.fromkeys(modules, 1.0)
    return with_equal_experts(
        replace(model.adapter, modules=modules, scalings=scalings, config=config)
    )


def _factorize(matrix: Matrix) -> LowRank:
    """Return factors of the smallest rank, but at least 1, since PEFT does not allow rank 0."""
    if isinstance(matrix, LowRank):
        factors = matrix.recompress()
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        factors = from_svd(U, S, Vh, matrix.dtype)
    if factors.rank > 0:
        return factors
    out_size, in_size = factors.shape
    return LowRank(factors.B.new_zeros(out_size, 1), factors.A.new_zeros(1, in_size))
