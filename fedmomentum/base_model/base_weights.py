"""Creates the `BaseWeights` of a loaded model, in float32 or as loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fedmomentum.base_model.as_loaded import AsLoadedWeights
from fedmomentum.base_model.streamed import is_streamed
from fedmomentum.base_model.streamed_weights import StreamedWeights
from fedmomentum.base_model.weight_format import AS_LOADED, resolve_weight_format
from fedmomentum.base_model.weights import BaseWeights, Float32Weights, MergedWeights
from fedmomentum.utils.quantized import quantized_layers


def choose_weight_format(setting: str, model: Any) -> str:
    """Return the format of a loaded model's adapted weights; see `resolve_weight_format`.

    Args:
        setting: `auto`, `float32` or `as-loaded`.
        model: A transformers model.

    Raises:
        ModelError: If float32 is requested but weights are quantized.
    """
    return resolve_weight_format(
        setting,
        on_gpu=next(model.parameters()).device.type != "cpu",
        dtype=model.dtype,
        is_quantized=any(True for _ in quantized_layers(model)),
    )


def make_base_weights(
    layers: Mapping[str, nn.Module],
    directory: Path,
    *,
    weight_format: str,
    model: nn.Module,
    tied: Mapping[str, Collection[str]] | None = None,
) -> BaseWeights:
    """Create the base weights of a model in the format given by `choose_weight_format`.

    Args:
        layers: See `Float32Weights`, also for the other arguments.
        directory: The model's directory.
        weight_format: `float32` or `as-loaded`.
        model: The model.
        tied: The names of tied weights.

    Raises:
        ModelError: If a layer is not supported, or the checkpoint does not match the model.
    """
    kind = AsLoadedWeights if weight_format == AS_LOADED else Float32Weights
    return kind(layers, directory, tied, model)


def make_merged_weights(
    layers: Mapping[str, nn.Module],
    directory: Path,
    *,
    weight_format: str,
    model: nn.Module,
    tied: Mapping[str, Collection[str]] | None = None,
) -> MergedWeights:
    """Create the merged weights of a model that is not trained, streamed if the model is.

    Args:
        layers: See `make_base_weights`, also for the other arguments.
        directory: The model's directory.
        weight_format: `float32` or `as-loaded`; ignored if the model is streamed.
        model: The model.
        tied: The names of tied weights.

    Raises:
        ModelError: If a layer is not supported, or the checkpoint does not match the model.
    """
    if is_streamed(model):
        return StreamedWeights(layers, directory, tied, model)
    return make_base_weights(layers, directory, weight_format=weight_format, model=model, tied=tied)
