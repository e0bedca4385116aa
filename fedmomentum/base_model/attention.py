"""The attention implementation that the user chooses."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from fedmomentum.base_model.library_errors import translate_library_errors
from fedmomentum.errors import ModelError

# The package that provides each implementation.
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def set_attention(model: PreTrainedModel, attention: str) -> None:
    """Set a model's attention implementation.

    Args:
        model: The model, on its device.
        attention: transformers' name for it, or `auto` for the model's own choice.

    Raises:
        ModelError: If this model, or this machine, does not support it.
    """
    if attention == "auto":
        return
    device, dtype = model.device, model.dtype
    if attention in FLASH_PACKAGES and (device.type == "cpu" or dtype == torch.float32):
        raise ModelError(
            f'model.attention = "{attention}" needs a GPU and 16 bits; this is {device} in '
            f'{str(dtype).removeprefix("torch.")}. Leave it out: "sdpa" has fast kernels of its own'
        )
    package = FLASH_PACKAGES.get(attention)
    if package is not None and find_spec(package) is None:
        # transformers would download kernels from the hub instead, which is third-party code.
        raise ModelError(
            f'model.attention = "{attention}" needs the package {package}, which is not installed'
        )
    what = f'model.attention = "{attention}" cannot be used for {type(model).__name__}'
    with translate_library_errors(what, {}):
        model.set_attn_implementation(attention)
    # transformers silently leaves models unchanged that do not support it.
    chosen = model.config._attn_implementation
    if chosen != attention:
        raise ModelError(f"{what}; it stays with {chosen}")
