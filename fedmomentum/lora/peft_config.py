"""Which fields of a PEFT configuration matter, which are harmless, and which are rejected."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from fedmomentum.errors import AdapterError
from fedmomentum.lora.adapter import Adapter
from fedmomentum.lora.adapter_config import AdapterConfig
from fedmomentum.lora.module_names import EMBEDDING, split_expert
from fedmomentum.lora.peft_layout import is_parameter_target
from fedmomentum.utils.text import printable, short_repr

T = TypeVar("T", int, float)

# Fields that affect the meaning of the factors, and are taken into account.
READ_FIELDS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    # where and how PEFT stores the factors of experts
    "target_parameters",
}

HARMLESS_FIELDS = {
    # which modules, on what model: evident from the names of the tensors
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    # how the adapter was trained or is stored, not what it adds
    "lora_dropout",
    "inference_mode",
    "runtime_config",
    "megatron_core",
    "eva_config",
    # used only by their own initializations, which are rejected (`HARMLESS_INIT`)
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    # how the base stores its weight; the factors are (rank, in) and (out, rank) in any case
    "fan_in_fan_out",
}

# Initializations that do not change the base (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do).
HARMLESS_INIT = (True, False, "gaussian", "eva", "orthogonal")

# PEFT's defaults, other than False, 0 or None, for fields that are not harmless; checked by a test.
DEFAULTS = {"r": 8, "lora_alpha": 8, "bias": "none", "qalora_group_size": 16}

# Fields that `plain_config` copies from the adapter's configuration.
COPIED_FIELDS = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "fan_in_fan_out",
    "modules_to_save",
    "lora_dropout",
)
# An alpha this close to a whole number is one: `scaling * rank` has the round-off of a division.
ALPHA_TOL = 1e-9


def check_config(config: Mapping[str, Any], name: str) -> AdapterConfig:
    """Reject an adapter configuration that means anything but `W + scaling * B A`.

    Args:
        config: The untrusted configuration of an adapter's directory, a live model or a client.
        name: The adapter's name in messages.

    Returns:
        The fields that matter.

    Raises:
        AdapterError: If a field has an invalid type or value, or differs from its default and is
            not known to be harmless; the message contains the field, its value and the expected.
    """
    declared = AdapterConfig.of(config, name)
    if str(declared.peft_type or "LORA").rsplit(".", 1)[-1] != "LORA":
        raise AdapterError(
            f"{name}: peft_type is {short_repr(declared.peft_type)}; only LORA adapters are "
            "supported"
        )
    if config.get("init_lora_weights", True) not in HARMLESS_INIT:
        raise AdapterError(
            f"{name}: init_lora_weights is {short_repr(config['init_lora_weights'])}, which "
            "changes the base weights at the start of training, so that this adapter does not fit "
            f"the published base. Supported: {HARMLESS_INIT}"
        )
    known = READ_FIELDS | HARMLESS_FIELDS | {"init_lora_weights"}
    for key, value in config.items():
        default = DEFAULTS.get(key)
        is_default = value == default or not (value or default)
        # Fields without an entry in DEFAULTS are False, 0 or None in PEFT; switches are False.
        if default is None and isinstance(value, bool):
            default = False
        if key not in known and not is_default:
            field = printable(str(key), 100)
            raise AdapterError(
                f"{name}: the LoRA configuration has {field} = {short_repr(value)}; only its "
                f"default, {default!r}, is supported. Train without {field}, or merge this adapter "
                "into its base with PEFT"
            )
    return declared


def plain_config(adapter: Adapter) -> dict[str, Any]:
    """Return a LoRA configuration with the adapter's ranks and scalings, and nothing else.

    The most common rank and alpha become `r` and `lora_alpha`; modules that differ are listed with
    their full paths in `rank_pattern` and `alpha_pattern`, longer paths first, so that a path which
    ends in another one is matched by its own key.
    """
    modules, parameters = _targets(adapter)
    ranks = {}
    alphas = {}
    for target, module in (modules | parameters).items():
        ranks[target] = adapter.modules[module].rank
        alphas[target] = _alpha(adapter, module)
    rank = _most_common(ranks.values())
    alpha = _most_common(alphas.values())
    rank_pattern = {}
    alpha_pattern = {}
    for target in sorted(ranks, key=lambda target: (-len(target), target)):
        if ranks[target] != rank:
            rank_pattern[target] = ranks[target]
        if alphas[target] != alpha:
            alpha_pattern[target] = alphas[target]
    copied = {key: adapter.config[key] for key in COPIED_FIELDS if adapter.config.get(key)}
    if "modules_to_save" in copied:
        # PEFT appends its names of classification heads every time it creates such a model.
        copied["modules_to_save"] = sorted(set(copied["modules_to_save"]))
    return {
        "peft_type": "LORA",
        **copied,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "inference_mode": True,
    }


def _targets(adapter: Adapter) -> tuple[dict[str, str], dict[str, str]]:
    """Return what PEFT has to adapt, each with the name of one of its matrices.

    All experts of a parameter have the same rank and scaling (`with_equal_experts`), so the first
    represents all. A linear module that was adapted as a parameter stays a parameter: PEFT takes
    some module names, such as `gate_proj`, for those of experts.

    Returns:
        Paths of modules and paths of parameters, each mapped to a matrix's name.
    """
    asked = adapter.config.get("target_parameters") or ()
    modules: dict[str, str] = {}
    parameters: dict[str, str] = {}
    for module in adapter.modules:
        parameter, index = split_expert(module)
        if index is not None:
            parameters.setdefault(parameter, module)
        elif asked and is_parameter_target(module, asked):
            parameters[f"{module}.weight"] = module
        else:
            modules[module.removesuffix(EMBEDDING)] = module
    return modules, parameters


def _alpha(adapter: Adapter, module: str) -> float:
    """Return `scaling * rank`, as an int if it is a whole number."""
    alpha = adapter.scalings[module] * adapter.modules[module].rank
    return round(alpha) if abs(alpha - round(alpha)) < ALPHA_TOL else alpha


def _most_common(values: Collection[T]) -> T:
    """Return the most common value; the smallest one if there is a tie."""
    all_values = list(values)
    return max(sorted(set(all_values)), key=all_values.count)
