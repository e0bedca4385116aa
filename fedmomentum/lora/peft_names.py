"""What PEFT makes of the names of modules: defaults, conversions and refusals by architecture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def default_targets(model: Any) -> list[str] | str | None:
    """Return PEFT's target modules for the model's architecture."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    kind = getattr(getattr(model, "config", None), "model_type", "")
    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    return names if names is None or isinstance(names, str) else list(names)


def names_of_experts(model: Any, paths: Iterable[str]) -> set[str]:
    """Return the names that PEFT takes for weights of the experts.

    transformers joins the experts of a layer into one parameter. Adapters that were trained before
    name the former modules, and PEFT converts every such name, also where a module has it still
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
            taken.add(name)  # only together with another one
            continue
        if name not in (config.target_modules or ()):
            taken.add(name)
    return taken


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
