"""Loading of a float32 model whose parameters stay memory-mapped in the dtype of their files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fedmomentum.base_model.checkpoint_files import stored_tensors
from fedmomentum.base_model.classifier import is_head

# The 16-bit dtypes, by safetensors' names. All others are cast to float32 if necessary.
_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


@contextmanager
def stored_dtypes_kept(directory: Path, is_classifier: bool) -> Iterator[None]:
    """Within the block, let transformers keep a checkpoint's 16-bit parameters unchanged.

    In every other respect the model is a float32 model: whatever it computes at creation
    (positions, scales of embeddings) is in float32.

    Args:
        directory: The directory to load.
        is_classifier: Whether it is loaded as a sequence classifier, whose head may be
            reinitialized, in float32.
    """
    # transformers uses this plan to keep some modules in float32; callers cannot pass one.
    transformers_class: Any = PreTrainedModel
    original = transformers_class._get_dtype_plan

    def with_stored_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
        # The first matching pattern wins.
        plan = dict(original(model, dtype))
        if is_classifier:
            heads = [name for name, _ in model.named_parameters() if is_head(name, model)]
            plan |= dict.fromkeys(map(_pattern, heads), torch.float32)
        return {**plan, **_stored_plan(model, directory)}

    transformers_class._get_dtype_plan = with_stored_dtypes
    try:
        yield
    finally:
        transformers_class._get_dtype_plan = original


def _stored_plan(model: Any, directory: Path) -> dict[str, torch.dtype]:
    """Return patterns of parameter names to their 16-bit dtype in the checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    stored = stored_tensors(directory)
    dtypes = {tensor.dtype for tensor in stored.values()}
    if not dtypes & _NARROW.keys():
        return {}
    if len(dtypes) == 1:
        return {"*": _NARROW[dtypes.pop()]}

    # If dtypes differ, or some tensors are integers, every parameter gets the dtype of the tensors
    # that it is made from.
    conversions = get_model_conversion_mapping(model)
    renamings = [part for part in conversions if isinstance(part, WeightRenaming)]
    converters = [part for part in conversions if isinstance(part, WeightConverter)]
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, set[str]] = {}
    for name, tensor in stored.items():
        path, _ = rename_source_key(name, renamings, converters, prefix, parameters)
        found.setdefault(path, set()).add(tensor.dtype)
    plan: dict[str, torch.dtype] = {}
    for path, of_path in found.items():
        if len(of_path) == 1 and of_path <= _NARROW.keys():
            plan[_pattern(path)] = _NARROW[of_path.pop()]
    return plan


def _pattern(path: str) -> str:
    """Return a pattern that matches exactly one parameter."""
    return f"^{re.escape(path)}$"
