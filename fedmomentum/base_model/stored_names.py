"""The names under which a checkpoint stores a model's weights, by transformers' own conversions.

For example, checkpoints of image-text models may store `language_model.model.layers.0...` for the
model's `model.language_model.layers.0...`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn


class NameConversion:
    """How transformers turns the names of stored tensors into those of a model's parameters.

    Args:
        model: The model as loaded by transformers, with or without adapters.
        parameters: The names of the parameters in the model without adapters.

    Attributes:
        converters: The model's conversions that join or change tensors.
    """

    def __init__(self, model: nn.Module | None, parameters: Collection[str]) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        conversions = getattr(model, "_weight_conversions", None) or []
        self.converters = [part for part in conversions if isinstance(part, WeightConverter)]
        self._renamings = [part for part in conversions if isinstance(part, WeightRenaming)]
        self._prefix = getattr(model, "base_model_prefix", "")
        self._known: dict[str, Any] = dict.fromkeys(parameters, True)

    def find_parameter(self, stored: str) -> tuple[str, str | None] | None:
        """Return the parameter that a stored tensor belongs to, and the pattern of its converter.

        The pattern is None for a parameter that is stored as is; the result is None for a tensor
        that belongs to none of the given parameters.
        """
        from transformers.core_model_loading import rename_source_key

        path, pattern = rename_source_key(
            stored, self._renamings, self.converters, self._prefix, self._known
        )
        return (path, pattern) if path in self._known else None


def find_stored_names(
    model: nn.Module | None, stored: Iterable[str], parameters: Collection[str]
) -> dict[str, str]:
    """Return the stored names of parameters that are stored as is.

    Parameters that transformers computes, or joins from several stored tensors, are left out.

    Args:
        model: The model as loaded by transformers, with or without adapters.
        stored: The names of the checkpoint's tensors.
        parameters: The names of the parameters in the model without adapters.
    """
    conversion = NameConversion(model, parameters)
    names: dict[str, list[str]] = {}
    for name in stored:
        match = conversion.find_parameter(name)
        if match is not None and match[1] is None:
            names.setdefault(match[0], []).append(name)
    return {path: found[0] for path, found in names.items() if len(found) == 1}
