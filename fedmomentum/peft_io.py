"""PEFT adapters in and out: folders and live models. The only file that imports peft.

That import takes seconds, so it is made by what touches a live model or writes a folder; reading one does without.

What a configuration field means for the product `scaling * B A` is decided here, once: the fields known to be
harmless are listed, every other one must hold its default, and is refused by name where it does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedmomentum.adapter import PREFIX, Adapter, to_tensors
from fedmomentum.errors import AdapterError
from fedmomentum.files import safetensors_bytes, write_atomically
from fedmomentum.lowrank import LowRank

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_NAME = "default"

READ_FIELDS = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
"""Fields that change what the factors mean, and that we obey."""

HARMLESS_FIELDS = {
    # which modules, on what model: the tensors' own names say it
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "base_model_name_or_path", "revision", "task_type", "peft_type", "auto_mapping", "peft_version",
    # how the adapter was trained or is held, not what it adds
    "lora_dropout", "inference_mode", "runtime_config", "megatron_core",
    # how the base stores its weight; the factors are (rank, in) and (out, rank) either way
    "fan_in_fan_out",
}  # fmt: skip

HARMLESS_INIT = (True, False, "gaussian")
"""Initialisations that leave the base as it was (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA change it)."""

DEFAULTS = {"r": 8, "lora_alpha": 8, "bias": "none", "qalora_group_size": 16}
"""PEFT's defaults of the fields which are not harmless, where they are not empty (False, 0, None); a test compares."""


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse an adapter configuration that asks for more than `W + scaling * B A`.

    Raises:
        AdapterError: naming the field, its value and the default.
    """
    if str(config.get("peft_type", "LORA")).rsplit(".", 1)[-1] != "LORA":
        raise AdapterError(f"{name}: peft_type is {config['peft_type']!r}; only LORA adapters can be combined")
    if config.get("init_lora_weights", True) not in HARMLESS_INIT:
        raise AdapterError(
            f"{name}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base weights at the "
            f"start of training, so that this adapter does not fit the published base. Supported: {HARMLESS_INIT}"
        )
    known = READ_FIELDS | HARMLESS_FIELDS | {"init_lora_weights"}
    for key, value in config.items():
        if key in known or value == DEFAULTS.get(key) or not (value or DEFAULTS.get(key)):
            continue
        raise AdapterError(
            f"{name}: the LoRA configuration has {key} = {value!r}; supported is only its default, "
            f"{DEFAULTS.get(key)!r}. Train without {key}, or merge this adapter into its base with PEFT"
        )


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling of one module: `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA.

    alpha is `alpha_pattern`'s entry that matches the module's path (first match, as a regular expression at the
    path's end, as in PEFT), else `lora_alpha`.
    """
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", DEFAULTS["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key of a `rank_pattern` or `alpha_pattern` that matches, PEFT's rule."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def plain_config(adapter: Adapter) -> dict[str, Any]:
    """A LoRA configuration with the adapter's ranks and scalings, module by module, and nothing else.

    The commonest rank and alpha become `r` and `lora_alpha`; every module that differs is named in full in
    `rank_pattern` and `alpha_pattern`, longer paths first, so that none is taken for the end of another.
    """
    ranks = {module: matrix.rank for module, matrix in adapter.modules.items()}
    alphas = {module: adapter.scalings[module] * rank for module, rank in ranks.items()}
    alphas = {module: round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha for module, alpha in alphas.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    longest_first = sorted(ranks, key=lambda module: (-len(module), module))
    kept = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "modules_to_save", "lora_dropout")
    return {
        "peft_type": "LORA",
        **{key: adapter.config[key] for key in kept if adapter.config.get(key)},
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: ranks[module] for module in longest_first if ranks[module] != rank},
        "alpha_pattern": {module: alphas[module] for module in longest_first if alphas[module] != alpha},
        "inference_mode": True,
    }


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(sorted(set(values)), key=values.count)


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def read_adapter(folder: Path | str, name: str | None = None) -> Adapter:
    """Read a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`).

    Raises:
        AdapterError: no such files, pickled weights, a field we do not support, or tensors that are not the LoRA
            factors the configuration speaks of; with folder, field and tensor named.
    """
    folder = Path(folder)
    name = name or str(folder)
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file():
        raise AdapterError(f"{name}: no adapter_config.json in {folder}; wanted a folder written by PEFT")
    if not weights_file.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{name}: the weights are in adapter_model.bin, a pickle, which can run code when read. Load it with "
                "PEFT where you trust it and save_pretrained(..., safe_serialization=True)"
            )
        raise AdapterError(f"{name}: no adapter_model.safetensors in {folder}")
    try:
        config = json.loads(config_file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{name}: adapter_config.json is not JSON: {error}") from error
    try:
        with safe_open(weights_file, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{name}: adapter_model.safetensors cannot be read: {error}") from error
    return from_peft_tensors(tensors, config, name)


def from_peft_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str) -> Adapter:
    """An adapter from PEFT's tensors and configuration; the checks of `read_adapter`."""
    check_config(config, name)
    factors: dict[str, dict[str, Tensor]] = {}
    saved = {}
    saved_modules = config.get("modules_to_save") or []
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", path)
        if key.startswith(PREFIX) and found and tensor.ndim == 2:
            factors.setdefault(found[1], {})[found[2]] = tensor
        elif key.startswith(PREFIX) and any(re.match(rf"(.*\.)?{re.escape(m)}\.", path) for m in saved_modules):
            saved[path] = tensor
        elif "lora_embedding" in key:
            raise AdapterError(f"{name}: tensor {key} adapts an embedding; only linear layers can be combined")
        else:
            raise AdapterError(
                f"{name}: tensor {key} of shape {tuple(tensor.shape)} is neither a factor of a linear layer nor of a "
                f"module in modules_to_save ({saved_modules or 'none'}); it cannot be combined"
            )
    if not factors:
        raise AdapterError(f"{name}: the adapter holds no LoRA factors")
    modules, scalings = {}, {}
    for module, pair in sorted(factors.items()):
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"{name}: module {module} has lora_{next(iter(pair))} only; wanted both factors")
        for side, factor in pair.items():
            if not factor.is_floating_point():
                raise AdapterError(f"{name}: lora_{side} of {module} is {factor.dtype}; wanted floating point")
            if not bool(torch.isfinite(factor).all()):
                raise AdapterError(f"{name}: lora_{side} of {module} holds NaN or Inf")
        try:
            matrix = LowRank(pair["B"], pair["A"])
        except ValueError as error:
            raise AdapterError(f"{name}: module {module}: {error}") from error
        wanted = _pattern(config.get("rank_pattern"), module, config.get("r", DEFAULTS["r"]))
        if matrix.rank != wanted:
            raise AdapterError(
                f"{name}: module {module} has rank {matrix.rank} and the configuration says {wanted}; "
                "the scaling would be wrong. Mend r or rank_pattern in adapter_config.json"
            )
        modules[module], scalings[module] = matrix, scaling_of(config, module, matrix.rank)
    return Adapter(modules=modules, scalings=scalings, saved=saved, config=dict(config), name=name)


def write_adapter(adapter: Adapter, folder: Path | str) -> None:
    """Write a plain PEFT adapter folder, with `plain_config`."""
    from peft import LoraConfig

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", safetensors_bytes(to_tensors(adapter), ("format", "pt")))
    config = LoraConfig(**plain_config(adapter)).to_dict()
    config["target_modules"] = sorted(adapter.modules)  # a set in PEFT: sorted, equal adapters have equal files
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, default=str).encode())


# ── live models ──────────────────────────────────────────────────────────────────────────────────────────────────


def attach(
    model: nn.Module,
    *,
    rank: int,
    lora_alpha: float,
    target_modules: Sequence[str] | str | None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
) -> PeftModel:
    """Put a fresh float32 LoRA adapter on a base model: A drawn from `seed`, B zero.

    Args:
        model: a transformers model; its class decides the task type.
        rank: `r`.
        lora_alpha: as in PEFT.
        target_modules: names or a regular expression as in PEFT; None for PEFT's choice for this architecture.
        dropout: `lora_dropout`.
        use_rslora: scale by `alpha / sqrt(rank)`.
        modules_to_save: modules trained in full.
        seed: of the initialisation.

    Raises:
        AdapterError: no module matches, a target is no linear layer, its weight is tied to another, or the rank
            passes a side of its matrix.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    alpha: Any = lora_alpha  # PEFT declares an int and takes a float
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, use_rslora=use_rslora,
        modules_to_save=list(modules_to_save) or None, task_type=_task_type(model),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config)
        except ValueError as error:
            raise AdapterError(f"target-modules {target_modules}: {error}") from error
    layers = lora_layers(wrapped)
    _refuse_tied(wrapped, layers)
    for module, layer in layers.items():
        side = min(layer.in_features, layer.out_features)
        if layer.r[ADAPTER_NAME] > side:
            raise AdapterError(f"rank {layer.r[ADAPTER_NAME]} passes the smaller side {side} of module {module}")
    return wrapped


def _task_type(model: nn.Module) -> str | None:
    kind = type(model).__name__
    return {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}.get(re.sub(r"^.*For", "", kind))


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """Module path in the base model to its live LoRA layer (`base_layer`, `lora_A`, `lora_B`, `scaling`)."""
    base, names = model.get_base_model(), getattr(model.base_model, "targeted_module_names", [])
    layers: dict[str, Any] = {path: base.get_submodule(path) for path in sorted(names)}
    for path, layer in layers.items():
        if ADAPTER_NAME not in getattr(layer, "lora_A", {}):
            raise AdapterError(f"module {path} is adapted, but not by a linear LoRA; only linear layers can be")
    return layers


def _refuse_tied(model: PeftModel, layers: Mapping[str, Any]) -> None:
    """A weight that two modules share would take a residual twice, or where nobody meant it."""
    owners: dict[int, list[str]] = {}
    for path, module in model.get_base_model().named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(path)
    for path, layer in layers.items():
        shared = [owner for owner in owners.get(id(layer.base_layer.weight), []) if not owner.startswith(path)]
        if shared:
            raise AdapterError(
                f"module {path} shares its weight with {', '.join(shared)} (tied weights); adapting it would change "
                "both. Leave it out of target-modules"
            )


def from_model(model: PeftModel, name: str = "model") -> Adapter:
    """The adapter of a live PeftModel, its tensors copied.

    Raises:
        AdapterError: as `read_adapter`; or the adapter is merged into its base, which then is not the base.
    """
    layers = lora_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise AdapterError(f"{name}: the adapter is merged into the base; call unmerge_adapter() first")
    config = model.peft_config[ADAPTER_NAME].to_dict()
    if isinstance(config.get("target_modules"), (set, frozenset)):
        config["target_modules"] = sorted(config["target_modules"])
    tensors = {key: tensor.detach().cpu().clone() for key, tensor in _live_tensors(model, layers).items()}
    return from_peft_tensors(tensors, config, name)


def load_into(model: PeftModel, adapter: Adapter) -> None:
    """Copy the adapter's tensors into the live model, in place.

    Raises:
        AdapterError: the model lacks a tensor of the adapter, or the other way round.
    """
    have = lora_layers(model)
    if have.keys() != adapter.modules.keys():
        odd = sorted(have.keys() ^ adapter.modules.keys())
        raise AdapterError(f"{adapter.name} does not fit the model: module {odd[0]} is adapted in one of them only")
    for module, matrix in adapter.modules.items():
        if not math.isclose(have[module].scaling[ADAPTER_NAME], adapter.scalings[module], rel_tol=1e-12):
            raise AdapterError(
                f"{adapter.name}: module {module} has scaling {adapter.scalings[module]}, the model "
                f"{have[module].scaling[ADAPTER_NAME]}; use the lora-alpha and rank the adapter was made with"
            )
        live = have[module].lora_B[ADAPTER_NAME].weight, have[module].lora_A[ADAPTER_NAME].weight
        if live[0].shape != matrix.B.shape or live[1].shape != matrix.A.shape:
            raise AdapterError(f"{adapter.name}: module {module} is {matrix!r}, the model's B {tuple(live[0].shape)}")
    tensors, places = to_tensors(adapter), _live_tensors(model, have)
    if odd := sorted(tensors.keys() ^ places.keys()):
        raise AdapterError(f"{adapter.name} does not fit the model: tensor {odd[0]} is in one of them only")
    with torch.no_grad():
        for key, tensor in tensors.items():
            if places[key].shape != tensor.shape:
                wanted = tuple(places[key].shape)
                raise AdapterError(f"{adapter.name}: tensor {key} is {tuple(tensor.shape)}, the model's {wanted}")
            places[key].copy_(tensor)


def _live_tensors(model: PeftModel, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The adapter's tensors themselves, by the names that PEFT saves them under.

    PEFT's own two ways in and out convert names by walking over every tensor of the model, some 20 ms each.
    """
    from peft.utils import ModulesToSaveWrapper

    tensors = {}
    for module, layer in layers.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].weight
        tensors[f"{PREFIX}{module}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].weight
    config: Any = model.peft_config[ADAPTER_NAME]
    if config.modules_to_save:
        for path, module in model.get_base_model().named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                saved = module.modules_to_save[ADAPTER_NAME].state_dict()
                tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in saved.items()}
    return tensors


def detach(model: PeftModel) -> nn.Module:
    """The base model as it was, its LoRA layers taken off; nothing is merged."""
    return model.unload()
