"""The format of adapted weights in memory, `float32` or `as-loaded`: `model.adapted-weights`."""

from __future__ import annotations

import torch

from fedmomentum.errors import ModelError

AS_LOADED = "as-loaded"
FLOAT32 = "float32"


def resolve_weight_format(
    setting: str, *, on_gpu: bool, dtype: torch.dtype, is_quantized: bool
) -> str:
    """Return `float32` or `as-loaded` for the setting.

    `auto` means as-loaded for quantized weights, and for 16-bit weights on a GPU, which is short of
    memory and slow in float32. Float32 weights absorb merged updates without a side branch.

    Args:
        setting: `auto`, `float32` or `as-loaded`.
        on_gpu: Whether the weights are on a device with its own memory.
        dtype: The dtype of the weights, or the compute dtype of quantized ones.
        is_quantized: Whether any weights are quantized.

    Raises:
        ModelError: If float32 is requested but weights are quantized.
    """
    if is_quantized and setting == FLOAT32:
        raise ModelError(
            'model.adapted-weights = "float32" does not work with quantized weights; use '
            "as-loaded or auto, which keep the weights quantized and merged updates beside them"
        )
    if setting != "auto":
        return setting
    is_narrow_on_gpu = on_gpu and dtype.itemsize < torch.float32.itemsize
    return AS_LOADED if is_quantized or is_narrow_on_gpu else FLOAT32
