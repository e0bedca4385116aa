"""Linear modules whose names PEFT takes for those of experts.

For some mixture-of-experts models, PEFT reads names in `target_modules`, such as `gate_proj`, as
those of the experts that older versions of transformers had as modules. It then adapts the stacks
of experts and leaves out the linear modules that do have these names: dense layers and shared
experts. Their weights are adapted under `target_parameters` instead, which gives the same factors
under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from fedmomentum.lora.module_names import is_called


def keep_linear_targets(
    model: nn.Module, targets: Sequence[str] | str | None
) -> tuple[list[str] | str | None, list[str]]:
    """Return target modules without those that PEFT would take for experts, and their weights.

    Args:
        model: A transformers model.
        targets: Names, a regular expression, or None for PEFT's choice.

    Returns:
        Names or an expression that PEFT takes literally, and the paths of the weights of the linear
        modules that it would not adapt.
    """
    if targets is None:
        return None, []
    names = targets if isinstance(targets, str) else list(targets)
    converted = _converted(model, names)
    if converted is None:
        return names, []
    modules = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(names, str):
        # An expression: the modules that it matches, by their paths.
        matched = [path for path in modules if re.fullmatch(names, path)]
        kept = [path for path in matched if not _converted(model, [path])]
    else:
        matched = [path for path in modules if any(is_called(path, name) for name in converted)]
        kept = [name for name in names if name not in converted]
    kept_paths = {path for path in matched if any(is_called(path, name) for name in kept)}
    return kept, [f"{path}.weight" for path in matched if path not in kept_paths]


def _converted(model: nn.Module, targets: list[str] | str) -> list[str] | None:
    """Return the names that PEFT would replace by experts; None if it replaces none.

    For an expression the result is empty if it would be replaced.
    """
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a version that reads names literally
        return None

    def replaces(names: list[str] | str) -> bool:
        config = LoraConfig(target_modules=names)
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # it would replace one and asks for others
            return True
        return bool(config.target_parameters)

    if not replaces(targets):
        return None
    return [] if isinstance(targets, str) else [name for name in targets if replaces([name])]
