"""Under which names a checkpoint stores a model's weights: transformers' own conversions tell.

Checkpoints of image-text models, for example, store `language_model.model.layers.0...` for what is
`model.language_model.layers.0...` in the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn


def find_stored_names(
    model: nn.Module | None, stored: Iterable[str], parameters: Collection[str]
) -> dict[str, str]:
    """Return, for parameters that are stored as they are, the names under which they are stored.

    A parameter that transformers joins of several stored tensors, or computes, is left out.

    Args:
        model: The model as transformers loaded it, with or without adapters.
        stored: The names of the checkpoint's tensors.
        parameters: The names of the parameters in the model without adapters.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [part for part in conversions if isinstance(part, WeightRenaming)]
    converters = [part for part in conversions if isinstance(part, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", "")
    known: dict[str, Any] = dict.fromkeys(parameters, True)
    names: dict[str, list[str]] = {}
    for name in stored:
        path, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if path in known and pattern is None:
            names.setdefault(path, []).append(name)
    return {path: found[0] for path, found in names.items() if len(found) == 1}
