"""Adapters on live models: attach, copy, load and detach.

This file and `peft_folder.py` are the only ones that import peft. The import takes seconds, so it
is made when a model is changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmomentum.errors import AdapterError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import PREFIX, Adapter, to_tensors
from fedmomentum.lora.peft_config import plain_config
from fedmomentum.lora.peft_folder import from_peft_tensors
from fedmomentum.lora.target_checks import (
    find_saved_modules,
    refuse_adapted_and_saved,
    refuse_tied,
    refuse_unmatched_targets,
)
from fedmomentum.utils.modules import cast_around, outermost_owners
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from peft import PeftModel as PeftModel


# PEFT's name of the one adapter on a model.
ADAPTER_NAME = "default"
# Scalings are quotients of the same configured numbers; they differ by round-off only.
SCALING_RTOL = 1e-12
# PEFT's task types by what follows `For` in the name of a transformers class.
TASK_TYPES = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}


# ── a fresh adapter ───────────────────────────────────────────────────────────────────────────────


def attach_adapter(
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
    """Attach a fresh float32 LoRA adapter to a base model: A initialized from `seed`, B zero.

    Args:
        model: A transformers model; its class decides the task type.
        rank: PEFT's `r`.
        lora_alpha: As in PEFT.
        target_modules: Names or a regular expression as in PEFT; None for PEFT's choice for this
            architecture.
        dropout: PEFT's `lora_dropout`.
        use_rslora: Scale by `alpha / sqrt(rank)`.
        modules_to_save: Modules that are trained in full.
        seed: The seed of the initialization.

    Raises:
        AdapterError: If a name matches no module, a target is no linear layer, its weight is tied
            to another, it is saved in full as well, or the rank exceeds a side of its matrix.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = target_modules
    if target_modules is not None and not isinstance(target_modules, str):
        targets = list(target_modules)
    saved = find_saved_modules(model, modules_to_save)
    # PEFT does not adapt what is saved: of a classifier's head, that is what everybody wants.
    named = [path for path in saved if not _is_head(model, path)]
    refuse_adapted_and_saved(model, targets, named)
    alpha: Any = lora_alpha  # PEFT declares an int and accepts a float
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=dropout,
        use_rslora=use_rslora,
        modules_to_save=list(modules_to_save) or None,
        task_type=_task_type(model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, config)
        except ValueError as error:
            raise AdapterError(f"target-modules {target_modules}: {error}") from error

    # PEFT accepts more than can be merged and aggregated.
    layers = lora_layers(peft_model)
    base = peft_model.get_base_model()
    refuse_unmatched_targets(base, targets, layers)
    refuse_tied(base, layers)
    for module, layer in layers.items():
        _check_rank(module, layer)
    _upcast_saved_modules(peft_model)
    return peft_model


def _check_rank(module: str, layer: Any) -> None:
    rank = layer.r[ADAPTER_NAME]
    side = min(layer.in_features, layer.out_features)
    if rank > side:
        raise AdapterError(f"rank {rank} exceeds the smaller side {side} of module {module}")


def _task_type(model: nn.Module) -> str | None:
    ending = re.sub(r"^.*For", "", type(model).__name__)
    return TASK_TYPES.get(ending)


def _is_head(model: Any, path: str) -> bool:
    """Return whether a module is a part of a classifier's head, its pooling layer included."""
    if _task_type(model) != "SEQ_CLS":
        return False
    is_inside = path.startswith(f"{model.base_model_prefix}.")
    return not is_inside or path.rpartition(".")[2] == "pooler"


def _upcast_saved_modules(model: PeftModel) -> None:
    """Cast fully trained modules to float32, as LoRA's factors are.

    Steps are small relative to the weights. bfloat16 keeps 8 bits of a number and rounds most of a
    step away.
    """
    for wrapper in saved_modules(model).values():
        module = wrapper.modules_to_save[ADAPTER_NAME]
        dtypes = {parameter.dtype for parameter in module.parameters()} - {torch.float32}
        if not dtypes:
            continue
        module.float()
        for path in outermost_owners(name for name, _ in module.named_parameters()):
            cast_around(module.get_submodule(path), dtypes.copy().pop())


def detach_adapter(model: PeftModel) -> nn.Module:
    """Remove the LoRA layers and fully trained modules from the base model; nothing is merged."""
    originals = {path: wrapper.original_module for path, wrapper in saved_modules(model).items()}
    base: nn.Module = model.unload()
    for path, module in originals.items():  # PEFT leaves the trained ones in their place
        base.set_submodule(path, module)
    return base


# ── its parts ─────────────────────────────────────────────────────────────────────────────────────


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """Return the live LoRA layer of every adapted module, by its path in the base model.

    A layer has `base_layer`, `lora_A`, `lora_B` and `scaling`.

    Raises:
        AdapterError: If a module is adapted by anything but a linear LoRA.
    """
    base = model.get_base_model()
    names = getattr(model.base_model, "targeted_module_names", [])
    layers: dict[str, Any] = {path: base.get_submodule(path) for path in sorted(names)}
    for path, layer in layers.items():
        if ADAPTER_NAME not in getattr(layer, "lora_A", {}):
            raise AdapterError(
                f"module {path} is adapted, but not by a linear LoRA; only linear layers are "
                "supported"
            )
    return layers


def live_factors(layer: Any) -> LowRank:
    """Return the live factors of a LoRA layer, with their gradients."""
    return LowRank(layer.lora_B[ADAPTER_NAME].weight, layer.lora_A[ADAPTER_NAME].weight)


def saved_modules(model: PeftModel) -> dict[str, Any]:
    """Return PEFT's wrapper of every fully trained module, by its path in the base model."""
    from peft.utils import ModulesToSaveWrapper

    modules = model.get_base_model().named_modules()
    return {path: module for path, module in modules if isinstance(module, ModulesToSaveWrapper)}


def _live_tensors(model: PeftModel, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the adapter's tensors themselves, by the names under which PEFT saves them.

    PEFT's own functions convert names by a loop over every tensor of the model, 20 ms each.
    """
    tensors = {}
    for module, layer in layers.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].weight
        tensors[f"{PREFIX}{module}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].weight
    config: Any = model.peft_config[ADAPTER_NAME]
    if config.modules_to_save:
        for path, wrapper in saved_modules(model).items():
            state = wrapper.modules_to_save[ADAPTER_NAME].state_dict()
            tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in state.items()}
    return tensors


# ── copy and load ─────────────────────────────────────────────────────────────────────────────────


def copy_adapter(model: PeftModel, name: str = "model") -> Adapter:
    """Return a copy of the adapter of a live model.

    Raises:
        AdapterError: As `read_adapter`; or if the adapter is merged into its base, which then is
            not the base model.
    """
    layers = lora_layers(model)
    if any(layer.merged for layer in layers.values()):
        raise AdapterError(
            f"{name}: the adapter is merged into the base; call unmerge_adapter() first"
        )
    config = model.peft_config[ADAPTER_NAME].to_dict()
    if isinstance(config.get("target_modules"), (set, frozenset)):
        config["target_modules"] = sorted(config["target_modules"])
    if config.get("modules_to_save"):
        config["modules_to_save"] = sorted(set(config["modules_to_save"]))
    tensors = {}
    for key, tensor in _live_tensors(model, layers).items():
        tensors[key] = tensor.detach().cpu().clone()
    return from_peft_tensors(tensors, config, name)


def load_adapter(model: PeftModel, adapter: Adapter) -> None:
    """Copy the adapter's tensors into the live model, in place.

    Raises:
        AdapterError: If the model and the adapter have different modules, shapes, scalings or saved
            tensors.
    """
    layers = lora_layers(model)
    unmatched = sorted(layers.keys() ^ adapter.modules.keys())
    if unmatched:
        raise AdapterError(
            f"{adapter.name} does not fit the model: module {unmatched[0]} is adapted in one of "
            "them only"
        )
    for module in adapter.modules:
        _check_fits(adapter, module, layers[module])
    tensors = to_tensors(adapter)
    live_tensors = _live_tensors(model, layers)
    unmatched = sorted(tensors.keys() ^ live_tensors.keys())
    if unmatched:
        raise AdapterError(
            f"{adapter.name} does not fit the model: tensor {unmatched[0]} is in one of them only"
        )
    with torch.no_grad():
        for key, tensor in tensors.items():
            shape = tuple(live_tensors[key].shape)
            if shape != tuple(tensor.shape):
                raise AdapterError(
                    f"{adapter.name}: tensor {key} is {tuple(tensor.shape)}, the model's {shape}"
                )
            live_tensors[key].copy_(tensor)


def _check_fits(adapter: Adapter, module: str, layer: Any) -> None:
    """Refuse a module whose live LoRA layer has another scaling or other shapes."""
    scaling = adapter.scalings[module]
    live_scaling = layer.scaling[ADAPTER_NAME]
    if not math.isclose(live_scaling, scaling, rel_tol=SCALING_RTOL):
        raise AdapterError(
            f"{adapter.name}: module {module} has scaling {scaling}, the model {live_scaling}; use "
            "the lora-alpha and rank that the adapter was made with"
        )
    matrix = adapter.modules[module]
    live = live_factors(layer)
    if live.B.shape != matrix.B.shape or live.A.shape != matrix.A.shape:
        raise AdapterError(
            f"{adapter.name}: module {module} is {matrix!r}, the model's B {tuple(live.B.shape)}"
        )


# ── complete adapters on live models ──────────────────────────────────────────────────────────────


def wrap_with_adapter(model: nn.Module, adapter: Adapter) -> PeftModel:
    """Put an adapter of any ranks, scalings and saved modules on its base model; in eval mode.

    A base model with fewer tokens than the adapter's saved embeddings is resized first, as it was
    before training.

    Raises:
        AdapterError: If the adapter does not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    resize_for(model, adapter)
    try:
        peft_model = get_peft_model(model, LoraConfig(**plain_config(adapter)))
    except ValueError as error:
        raise AdapterError(f"{adapter.name} does not fit the model: {error}") from error
    _upcast_saved_modules(peft_model)
    load_adapter(peft_model, adapter)
    return peft_model.eval()


def resize_for(model: Any, adapter: Adapter) -> None:
    """Resize the model to the tokens of the adapter's saved embeddings, as its trainer did.

    Raises:
        AdapterError: If the adapter does not save embeddings and head for the same tokens.
    """
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = [table for table in tables if table is not None]
    paths = []
    for path, module in model.named_modules():
        if any(module is table for table in tables):
            paths.append(path)
    num_rows = {}
    for path in paths:
        saved = adapter.saved.get(f"{path}.weight")
        if saved is not None:
            num_rows[path] = int(saved.shape[0])

    # Nothing to do unless tokens were added.
    size = model.get_input_embeddings().weight.shape[0] if num_rows else 0
    if set(num_rows.values()) <= {size}:
        return
    if len(set(num_rows.values())) > 1 or len(num_rows) < len(paths):
        listed = ", ".join(f"{path}: {num_rows.get(path, 'none')}" for path in sorted(paths))
        raise AdapterError(
            f"{adapter.name} was trained after tokens were added (the base has {size}) and saves "
            f"embeddings for {listed}. Without all of them, for the same tokens, the model cannot "
            "be assembled: train with embeddings and head in modules_to_save"
        )
    model.resize_token_embeddings(num_rows.popitem()[1], mean_resizing=False)


def load_with_peft(model: nn.Module, directory: Path | str) -> PeftModel:
    """Load an adapter's directory onto its base model by stock PEFT, in eval mode.

    Raises:
        AdapterError: If PEFT cannot load it.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, directory).eval()
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise AdapterError(f"PEFT cannot load {directory}: {printable(str(error))}") from error
