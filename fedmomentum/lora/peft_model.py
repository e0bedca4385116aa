"""Adapters on live models: attach, copy, load and detach.

This file, `peft_folder.py` and `peft_names.py` are the only ones that import peft. The import takes
seconds, so it happens only when a model is modified.
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
from fedmomentum.lora.adapter import PREFIX, Adapter
from fedmomentum.lora.adapter_config import json_value
from fedmomentum.lora.linear_modules import find_linear_modules
from fedmomentum.lora.live_layers import ADAPTER_NAME, LoraLayer, lora_layers
from fedmomentum.lora.module_names import weight_path
from fedmomentum.lora.peft_config import plain_config
from fedmomentum.lora.peft_folder import from_peft_tensors
from fedmomentum.lora.target_checks import find_saved_modules, refuse_tied
from fedmomentum.lora.targets import Targets, choose_targets
from fedmomentum.utils.modules import cast_around, outermost_owners
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from peft import LoraConfig as LoraConfig
    from peft import PeftModel as PeftModel


# Scalings are quotients of the same configured numbers, so they differ only by round-off.
SCALING_RTOL = 1e-12
# PEFT's task types by the part after `For` in the name of a transformers class.
TASK_TYPES = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS"}


# ── a fresh adapter ───────────────────────────────────────────────────────────────────────────────


def attach_adapter(
    model: nn.Module,
    *,
    rank: int,
    lora_alpha: float,
    target_modules: Targets | Sequence[str] | str | None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
) -> PeftModel:
    """Attach a fresh float32 LoRA adapter to a base model: A initialized from `seed`, B zero.

    Args:
        model: A transformers model; its class determines the task type.
        rank: PEFT's `r`.
        lora_alpha: As in PEFT.
        target_modules: Chosen modules, or a setting for `choose_targets` to resolve.
        dropout: PEFT's `lora_dropout`.
        use_rslora: Scale by `alpha / sqrt(rank)`.
        modules_to_save: Modules to train in full.
        seed: The seed of the initialization.

    Raises:
        AdapterError: If a name matches nothing, a target is not a linear layer, embedding or stack
            of experts, its weight is tied to another, it is also trained in full, or the rank
            exceeds a side of its matrix.
    """
    from peft import LoraConfig, get_peft_model

    targets = target_modules
    if not isinstance(targets, Targets):
        saved = find_saved_modules(model, modules_to_save)
        head = [path for path in saved if _is_head(model, path)]
        targets = choose_targets(
            find_linear_modules(model), targets, rank=rank, saved=saved, head=head
        )
    if targets.parameters and dropout:
        raise AdapterError(
            f"LoRA dropout {dropout:g} is not possible for {targets.parameters[0]}, which PEFT "
            "adapts as a parameter; set lora.dropout to 0"
        )
    alpha: Any = lora_alpha  # PEFT declares an int and accepts a float
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets.names),
        target_parameters=list(targets.parameters) or None,
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
            asked = [*targets.names, *targets.parameters]
            raise AdapterError(f"targets {asked}: {error}") from error

    # PEFT accepts more than can be merged and aggregated.
    layers = lora_layers(peft_model)
    base = peft_model.get_base_model()
    refuse_tied(base, layers)
    wanted = {f"{module}.weight" for module in targets.modules} | set(targets.parameters)
    differing = sorted({weight_path(name) for name in layers} ^ wanted)
    if differing:
        raise AdapterError(
            f"{differing[0]} is adapted by PEFT or requested in target-modules or "
            "target-parameters, and not both"
        )
    for module, layer in layers.items():
        _check_rank(module, layer)
    _upcast_saved_modules(peft_model)
    return peft_model


def _check_rank(module: str, layer: LoraLayer) -> None:
    rank = layer.factors.rank
    side = min(layer.factors.shape)
    if rank > side:
        raise AdapterError(f"rank {rank} exceeds the smaller side {side} of module {module}")


def _task_type(model: nn.Module) -> str | None:
    ending = re.sub(r"^.*For", "", type(model).__name__)
    return TASK_TYPES.get(ending)


def _is_head(model: Any, path: str) -> bool:
    """Return whether a module is part of a classifier's head, including its pooling layer."""
    if _task_type(model) != "SEQ_CLS":
        return False
    is_inside = path.startswith(f"{model.base_model_prefix}.")
    return not is_inside or path.rpartition(".")[2] == "pooler"


def _upcast_saved_modules(model: PeftModel) -> None:
    """Cast fully trained modules to float32, like LoRA's factors.

    Optimizer steps are small relative to the weights, and bfloat16, with 8 significant bits, would
    round most of a step away.
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
    """Remove the LoRA layers and fully trained modules from the base model without merging."""
    originals = {path: wrapper.original_module for path, wrapper in saved_modules(model).items()}
    base: nn.Module = model.unload()
    for path, module in originals.items():  # PEFT leaves the trained ones in place
        base.set_submodule(path, module)
    return base


# ── its parts ─────────────────────────────────────────────────────────────────────────────────────


def saved_modules(model: PeftModel) -> dict[str, Any]:
    """Return PEFT's wrapper of every fully trained module, by its path in the base model."""
    from peft.utils import ModulesToSaveWrapper

    modules = model.get_base_model().named_modules()
    return {path: module for path, module in modules if isinstance(module, ModulesToSaveWrapper)}


def _live_tensors(model: PeftModel, layers: Mapping[str, LoraLayer]) -> dict[str, Tensor]:
    """Return the adapter's live tensors, by the names under which PEFT saves them.

    PEFT's own functions convert names in a loop over every tensor of the model, 20 ms each.
    """
    tensors: dict[str, Tensor] = {}
    for layer in layers.values():
        path = PREFIX + layer.path
        if layer.is_embedding:
            tensors[f"{path}.lora_embedding_A"] = layer.parameter("B")
            tensors[f"{path}.lora_embedding_B"] = layer.parameter("A")
        else:
            tensors[f"{path}.lora_A.weight"] = layer.parameter("A")
            tensors[f"{path}.lora_B.weight"] = layer.parameter("B")
    return tensors | _saved_tensors(model)


def _saved_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Return the live tensors of fully trained modules, by the names that PEFT saves them under."""
    tensors: dict[str, Tensor] = {}
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
        AdapterError: As for `read_adapter`; or if the adapter is merged into its base, which then
            no longer is the base model.
    """
    layers = lora_layers(model)
    if any(layer.layer.merged for layer in layers.values()):
        raise AdapterError(
            f"{name}: the adapter is merged into the base; call unmerge_adapter() first"
        )
    config = json_value(model.peft_config[ADAPTER_NAME].to_dict())
    if config.get("modules_to_save"):
        config["modules_to_save"] = sorted(set(config["modules_to_save"]))
    tensors = {}
    for key, tensor in _live_tensors(model, layers).items():
        tensors[key] = tensor.detach().cpu().clone()
    return from_peft_tensors(tensors, config, name)


def load_adapter(model: PeftModel, adapter: Adapter) -> None:
    """Copy the adapter's tensors into the live model, in place.

    Raises:
        AdapterError: If the model and the adapter differ in modules, shapes, scalings or saved
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
    live_tensors = _saved_tensors(model)
    saved = {PREFIX + key: tensor for key, tensor in adapter.saved.items()}
    unmatched = sorted(saved.keys() ^ live_tensors.keys())
    if unmatched:
        raise AdapterError(
            f"{adapter.name} does not fit the model: tensor {unmatched[0]} is in one of them only"
        )
    for key, tensor in saved.items():
        shape = tuple(live_tensors[key].shape)
        if shape != tuple(tensor.shape):
            raise AdapterError(
                f"{adapter.name}: tensor {key} is {tuple(tensor.shape)}, the model's {shape}"
            )
    with torch.no_grad():
        for module, matrix in adapter.modules.items():
            live = layers[module].detached()
            live.B.copy_(matrix.B)
            live.A.copy_(matrix.A)
        for key, tensor in saved.items():
            live_tensors[key].copy_(tensor)


def _check_fits(adapter: Adapter, module: str, layer: LoraLayer) -> None:
    """Reject a module whose live LoRA layer has a different scaling or different shapes."""
    scaling = adapter.scalings[module]
    live_scaling = layer.scaling
    if not math.isclose(live_scaling, scaling, rel_tol=SCALING_RTOL):
        raise AdapterError(
            f"{adapter.name}: module {module} has scaling {scaling}, the model {live_scaling}; use "
            "the lora-alpha and rank that the adapter was made with"
        )
    matrix = adapter.modules[module]
    live = layer.factors
    if live.shape != matrix.shape:
        sizes, live_sizes = (f"{m.shape[0]} x {m.shape[1]}" for m in (matrix, live))
        raise AdapterError(
            f"{adapter.name}: module {module} is {sizes}, the model's {live_sizes}; this is not "
            "the base model that the adapter was trained on"
        )
    if live.B.shape != matrix.B.shape or live.A.shape != matrix.A.shape:
        raise AdapterError(
            f"{adapter.name}: module {module} is {matrix!r}, the model's B {tuple(live.B.shape)}"
        )


# ── complete adapters on live models ──────────────────────────────────────────────────────────────


def wrap_with_adapter(model: nn.Module, adapter: Adapter) -> PeftModel:
    """Attach an adapter, of any ranks, scalings and saved modules, to its base model in eval mode.

    If the adapter's saved embeddings have a different vocabulary size, the base model is resized
    first, as it was before training.

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
    """Resize the model to the vocabulary of the adapter's saved embeddings, as its trainer did.

    Raises:
        AdapterError: If the adapter does not save embeddings and head with the same vocabulary.
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
    """Load an adapter's directory onto its base model with stock PEFT, in eval mode.

    Raises:
        AdapterError: If PEFT cannot load it.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, directory).eval()
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise AdapterError(f"PEFT cannot load {directory}: {printable(str(error))}") from error
