"""The choice how adapted modules are held: in float32, or as they were loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from fedmomentum.base_model.as_loaded import AsLoadedWeights
from fedmomentum.base_model.weights import BaseWeights, Float32Weights
from fedmomentum.errors import ModelError
from fedmomentum.utils.quantized import quantized_layers

AS_LOADED = "as-loaded"
FLOAT32 = "float32"


def choose_holding(setting: str, model: nn.Module) -> str:
    """Return `float32` or `as-loaded` for the setting `model.adapted-weights`.

    `auto` is as-loaded on a GPU, whose memory and whose speed in float32 are short, and for
    quantized weights.

    Raises:
        ModelError: If quantized weights shall be held in float32.
    """
    has_quantized = any(True for _ in quantized_layers(model))
    if has_quantized and setting == FLOAT32:
        raise ModelError(
            'model.adapted-weights = "float32" holds no quantized weights; use as-loaded or auto, '
            "which keep them as they are and what is merged beside them"
        )
    if setting != "auto":
        return setting
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    return FLOAT32 if is_on_cpu and not has_quantized else AS_LOADED


def hold_weights(
    layers: Mapping[str, nn.Module],
    directory: Path,
    *,
    holding: str,
    model: nn.Module,
    tied: Mapping[str, Collection[str]] | None = None,
) -> BaseWeights:
    """Return the adapted modules of a model, held as `choose_holding` says.

    Args:
        layers: See `Float32Weights`, and the same for the other arguments.
        directory: The model's directory.
        holding: `float32` or `as-loaded`.
        model: The model.
        tied: The names of tied weights.

    Raises:
        ModelError: If a layer cannot be held.
    """
    kind = AsLoadedWeights if holding == AS_LOADED else Float32Weights
    return kind(layers, directory, tied, model)
