"""How attention is computed, where the user chooses."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from fedmomentum.base_model.library_errors import translate_library_errors
from fedmomentum.errors import ModelError

# What each of them is computed by.
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def set_attention(model: PreTrainedModel, attention: str) -> None:
    """Have a model compute attention in this way.

    Args:
        model: The model, on its device.
        attention: As transformers calls it; `auto`: as the model chooses.

    Raises:
        ModelError: If it is not possible for this model, here.
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
        # transformers would take kernels from the hub instead, which is code from elsewhere.
        raise ModelError(
            f'model.attention = "{attention}" needs the package {package}, which is not installed'
        )
    what = f'model.attention = "{attention}" cannot be used for {type(model).__name__}'
    with translate_library_errors(what, {}):
        model.set_attn_implementation(attention)
    # transformers leaves a model as it is that does not support the change.
    chosen = model.config._attn_implementation
    if chosen != attention:
        raise ModelError(f"{what}; it stays with {chosen}")
