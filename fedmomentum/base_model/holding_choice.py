"""How the setting `model.adapted-weights` is understood, before and after a model is loaded."""

from __future__ import annotations

import torch

from fedmomentum.errors import ModelError

AS_LOADED = "as-loaded"
FLOAT32 = "float32"


def resolve_holding(setting: str, *, on_gpu: bool, dtype: torch.dtype, is_quantized: bool) -> str:
    """Return `float32` or `as-loaded` for the setting.

    `auto` is as-loaded for quantized weights, and for 16-bit ones on a GPU, whose memory and whose
    speed in float32 are short. Weights in float32 take what is merged without a branch.

    Args:
        setting: `auto`, `float32` or `as-loaded`.
        on_gpu: Whether the weights are on a device with memory of its own.
        dtype: The dtype of the weights, and what quantized ones compute in.
        is_quantized: Whether any weights are quantized.

    Raises:
        ModelError: If float32 is asked for and weights are quantized.
    """
    if is_quantized and setting == FLOAT32:
        raise ModelError(
            'model.adapted-weights = "float32" holds no quantized weights; use as-loaded or auto, '
            "which keep them as they are and what is merged beside them"
        )
    if setting != "auto":
        return setting
    is_narrow_on_gpu = on_gpu and dtype.itemsize < torch.float32.itemsize
    return AS_LOADED if is_quantized or is_narrow_on_gpu else FLOAT32
