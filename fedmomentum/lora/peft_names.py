"""How PEFT treats module names: defaults, conversions and rejections by architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fedmomentum.lora.adapter import PREFIX


def default_targets(model: Any) -> list[str] | str | None:
    """Return PEFT's target modules for the model's architecture."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    kind = getattr(getattr(model, "config", None), "model_type", "")
    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    return names if names is None or isinstance(names, str) else list(names)


def names_of_experts(model: Any, paths: Iterable[str]) -> set[str]:
    """Return the names that PEFT mistakes for weights of the experts.

    transformers fuses the experts of a layer into one parameter. Adapters trained before that name
    the former modules, and PEFT converts every such name, even if other modules still have it
    (shared experts, the dense layers of DeepSeek).
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = set()
    for name in {path.rpartition(".")[2] for path in paths}:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:
            taken.add(name)  # accepted only together with another one
            continue
        if name not in (config.target_modules or ()):
            taken.add(name)
    return taken


def renamed_on_loading(model: Any, paths: Iterable[str]) -> set[str]:
    """Return the paths of modules whose factors PEFT would look for under another name.

    PEFT applies the renaming rules of transformers' checkpoints to the names in an adapter's file.
    A rule that is loose about where a name ends changes names that are already right, and PEFT then
    skips their factors.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
    )

    # Renaming takes milliseconds per tensor, and all layers share the same names: try one layer.
    paths_by_pattern: dict[str, list[str]] = {}
    for path in paths:
        paths_by_pattern.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", path), []).append(path)
    keys = {}
    for alike in paths_by_pattern.values():
        keys[f"{PREFIX}{alike[0]}.lora_A.weight"] = alike
    tensors = {key: torch.zeros(1, 1) for key in keys}
    found = convert_peft_adapter_state_dict_for_transformers(
        model, LoraConfig(target_modules=[]), tensors
    )
    renamed: set[str] = set()
    for key, alike in keys.items():
        if key not in found:
            renamed.update(alike)
    return renamed


def is_forbidden(model: nn.Module, name: str) -> bool:
    """Return whether PEFT refuses to adapt modules of this name in the model's architecture."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    check: Any = LoraModel._check_target_module_compatiblity
    try:
        check(None, LoraConfig(target_modules=[name]), model, name)
    except ValueError:
        return True
    return False
