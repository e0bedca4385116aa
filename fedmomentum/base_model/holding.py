"""The choice of how adapted modules are held: in float32, or as loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedmomentum.base_model.as_loaded import AsLoadedWeights
from fedmomentum.base_model.holding_choice import AS_LOADED, resolve_holding
from fedmomentum.base_model.streamed import is_streamed
from fedmomentum.base_model.streamed_weights import StreamedWeights
from fedmomentum.base_model.weights import BaseWeights, Float32Weights, MergedWeights
from fedmomentum.utils.quantized import quantized_layers


def choose_holding(setting: str, model: Any) -> str:
    """Return how a loaded model's adapted modules are held; see `resolve_holding`.

    Args:
        setting: `auto`, `float32` or `as-loaded`.
        model: A transformers model.

    Raises:
        ModelError: If float32 is requested but weights are quantized.
    """
    return resolve_holding(
        setting,
        on_gpu=next(model.parameters()).device.type != "cpu",
        dtype=model.dtype,
        is_quantized=any(True for _ in quantized_layers(model)),
    )


def hold_weights(
    layers: Mapping[str, nn.Module],
    directory: Path,
    *,
    holding: str,
    model: nn.Module,
    tied: Mapping[str, Collection[str]] | None = None,
) -> BaseWeights:
    """Return the adapted modules of a model, held as given by `choose_holding`.

    Args:
        layers: See `Float32Weights`, also for the other arguments.
        directory: The model's directory.
        holding: `float32` or `as-loaded`.
        model: The model.
        tied: The names of tied weights.

    Raises:
        ModelError: If a layer cannot be held.
    """
    kind = AsLoadedWeights if holding == AS_LOADED else Float32Weights
    return kind(layers, directory, tied, model)


def hold_for_use(
    layers: Mapping[str, nn.Module],
    directory: Path,
    *,
    holding: str,
    model: nn.Module,
    tied: Mapping[str, Collection[str]] | None = None,
) -> MergedWeights:
    """Return the adapted modules of a model that is not trained, held as the model is.

    Args:
        layers: See `hold_weights`, also for the other arguments.
        directory: The model's directory.
        holding: `float32` or `as-loaded`; ignored if the model is streamed.
        model: The model.
        tied: The names of tied weights.

    Raises:
        ModelError: If a layer cannot be held.
    """
    if is_streamed(model):
        return StreamedWeights(layers, directory, tied, model)
    return hold_weights(layers, directory, holding=holding, model=model, tied=tied)
