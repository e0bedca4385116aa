"""Adapters on live models: put on, read, set and taken off. With `peft_io` the only file that imports peft.

That import takes seconds, so it is made where a model is touched.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmomentum.adapter import PREFIX, Adapter, to_tensors
from fedmomentum.errors import AdapterError
from fedmomentum.peft_io import from_peft_tensors, plain_config
from fedmomentum.precision import cast_around, outermost_owners
from fedmomentum.schema import printable

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_NAME = "default"


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
        AdapterError: a name matches no module, a target is no linear layer, its weight is tied to another, it is
            saved in full as well, or the rank passes a side of its matrix.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    alpha: Any = lora_alpha  # PEFT declares an int and takes a float
    _refuse_both(model, targets, _modules_to_save(model, modules_to_save))
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
    _refuse_unmatched(wrapped, targets, layers)
    _refuse_tied(wrapped, layers)
    for module, layer in layers.items():
        side = min(layer.in_features, layer.out_features)
        if layer.r[ADAPTER_NAME] > side:
            raise AdapterError(f"rank {layer.r[ADAPTER_NAME]} passes the smaller side {side} of module {module}")
    _hold_saved_in_float32(wrapped)
    return wrapped


def _modules_to_save(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The paths of the modules that are trained in full; every name must stand for some.

    PEFT takes every module whose path ends in these letters, also in the middle of a word, and ignores a name that
    matches nothing as long as another matches.
    """
    paths = [path for path, _ in model.named_modules() if path]
    found: list[str] = []
    for name in names:
        same = [path for path in paths if _is_called(path, name)]
        if not same:
            raise AdapterError(
                f"modules-to-save: {printable(name)} is no module of {type(model).__name__}{_nearest(name, paths)}"
            )
        if longer := [path for path in paths if path.endswith(name) and path not in same]:
            raise AdapterError(
                f"modules-to-save: {printable(name)} also ends the name of {longer[0]}, which PEFT would train too; "
                f"write more of the path, such as {same[0]}"
            )
        for path in same:
            if not list(model.get_submodule(path).parameters()):
                raise AdapterError(f"modules-to-save: {path} has no parameters, so there is nothing to train")
        found += same
    for path in found:
        if inner := [other for other in found if other.startswith(f"{path}.")]:
            raise AdapterError(
                f"modules-to-save: {inner[0]} lies in {path}, which is saved as a whole; name one of them"
            )
    return found


def _refuse_unmatched(model: PeftModel, targets: Any, layers: Mapping[str, Any]) -> None:
    """Refuse a name in target-modules that adapts nothing; PEFT ignores it as long as another matches."""
    if targets is None or isinstance(targets, str):
        return
    paths = [path for path, module in model.get_base_model().named_modules() if path and "lora_" not in path]
    for name in targets:
        if not any(_is_called(path, name) for path in layers):
            raise AdapterError(
                f"target-modules: {printable(name)} is no linear module of "
                f"{type(model.get_base_model()).__name__}{_nearest(name, paths)}"
            )


def _refuse_both(model: nn.Module, targets: Any, saved: Sequence[str]) -> None:
    """Refuse a module that is named to be adapted and to be trained in full; PEFT leaves the adapter out."""
    names = targets if isinstance(targets, list) else []
    for path, _ in model.named_modules():
        owner = next((owner for owner in saved if path == owner or path.startswith(f"{owner}.")), None)
        if owner is not None and any(_is_called(path, name) for name in names):
            raise AdapterError(
                f"module {path} is in target-modules and in modules-to-save ({owner}); leave it out of one of them"
            )


def _is_called(path: str, name: str) -> bool:
    """Whether a name in PEFT's lists stands for the module at this path."""
    return path == name or path.endswith(f".{name}")


def _nearest(name: str, paths: Sequence[str]) -> str:
    """What the user may have meant, as the end of a message."""
    depth = name.count(".") + 1
    endings = {".".join(path.split(".")[-depth:]) for path in paths}
    near = difflib.get_close_matches(name, sorted(e for e in endings if not e.isdigit()), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; see the model's named_modules()"


def saved_modules(model: PeftModel) -> dict[str, Any]:
    """Module path in the base model to PEFT's wrapper around a module that is trained in full."""
    from peft.utils import ModulesToSaveWrapper

    modules = model.get_base_model().named_modules()
    return {path: module for path, module in modules if isinstance(module, ModulesToSaveWrapper)}


def _hold_saved_in_float32(model: PeftModel) -> None:
    """Train what is trained in full in float32, as LoRA's factors are.

    Steps are small against the weights. Bfloat16 keeps 8 bits of a number and rounds most of a step away.
    """
    for wrapper in saved_modules(model).values():
        module = wrapper.modules_to_save[ADAPTER_NAME]
        dtypes = {parameter.dtype for parameter in module.parameters()} - {torch.float32}
        if not dtypes:
            continue
        module.float()
        for path in outermost_owners(name for name, _ in module.named_parameters()):
            cast_around(module.get_submodule(path), dtypes.copy().pop())


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
    tensors = {}
    for module, layer in layers.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].weight
        tensors[f"{PREFIX}{module}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].weight
    config: Any = model.peft_config[ADAPTER_NAME]
    if config.modules_to_save:
        for path, wrapper in saved_modules(model).items():
            saved = wrapper.modules_to_save[ADAPTER_NAME].state_dict()
            tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in saved.items()}
    return tensors


def detach(model: PeftModel) -> nn.Module:
    """Take the LoRA layers and the modules trained in full off the base model; nothing is merged."""
    originals = {path: wrapper.original_module for path, wrapper in saved_modules(model).items()}
    base = model.unload()
    for path, module in originals.items():  # PEFT leaves the trained ones in their place
        base.set_submodule(path, module)
    return base


# ── whole adapters on live models ────────────────────────────────────────────────────────────────────────────────


def wrap(model: nn.Module, adapter: Adapter) -> PeftModel:
    """Put an adapter on its base model as PEFT does, whatever its ranks, scalings and saved modules; in eval mode.

    A base of fewer tokens than the adapter's saved embeddings is resized first, as it was before training.

    Raises:
        AdapterError: If the adapter does not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    resize_for(model, adapter)
    try:
        wrapped = get_peft_model(model, LoraConfig(**plain_config(adapter)))
    except ValueError as error:
        raise AdapterError(f"{adapter.name} does not fit the model: {error}") from error
    _hold_saved_in_float32(wrapped)
    load_into(wrapped, adapter)
    return wrapped.eval()


def resize_for(model: Any, adapter: Adapter) -> None:
    """Give the model as many tokens as the adapter's saved embeddings have, as its trainer did with added tokens."""
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    paths = [path for path, module in model.named_modules() if any(module is table for table in tables)]
    rows = {path: int(adapter.saved[f"{path}.weight"].shape[0]) for path in paths if f"{path}.weight" in adapter.saved}
    size = model.get_input_embeddings().weight.shape[0] if rows else 0
    if set(rows.values()) <= {size}:
        return
    if len(set(rows.values())) > 1 or len(rows) < len(paths):
        found = ", ".join(f"{path}: {rows.get(path, 'none')}" for path in sorted(paths))
        raise AdapterError(
            f"{adapter.name} was trained after tokens were added (the base has {size}) and saves embeddings for "
            f"{found}. Without all of them, for the same tokens, the model cannot be put together: train with "
            "embeddings and head in modules_to_save"
        )
    model.resize_token_embeddings(rows.popitem()[1], mean_resizing=False)


def read_back(model: nn.Module, folder: Path | str) -> PeftModel:
    """Load an adapter's directory onto its base by stock PEFT, in eval mode.

    Raises:
        AdapterError: If PEFT cannot load it.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise AdapterError(f"PEFT cannot load {folder}: {printable(str(error))}") from error
