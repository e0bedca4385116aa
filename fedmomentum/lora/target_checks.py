"""Checks of module names listed by users, which PEFT matches loosely and sometimes ignores."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from fedmomentum.errors import AdapterError
from fedmomentum.lora.live_layers import LoraLayer
from fedmomentum.lora.target_names import is_called
from fedmomentum.utils.quantized import quantized_layers
from fedmomentum.utils.text import printable

# Minimum similarity, by difflib's ratio, for a name to be suggested; typos are far above.
SUGGESTION_CUTOFF = 0.5


def names_to_save(head: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return what to train in full: a classifier's head, and whatever else the user names."""
    return [*head, *(name for name in names if name not in head)]


def find_saved_modules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the paths of the modules to train in full; every name must match at least one.

    PEFT takes every module whose path ends in these characters, even in the middle of a word, and
    ignores a name that matches nothing as long as another one matches.

    Raises:
        AdapterError: If a name matches nothing, matches the end of a longer name, or matches a
            module that is quantized, has no parameters, or is inside another one.
    """
    paths = [path for path, _ in model.named_modules() if path]
    saved: list[str] = []
    for name in names:
        saved += _find_saved(model, name, paths, names)
    for path in saved:
        inner = [other for other in saved if other.startswith(f"{path}.")]
        if inner:
            raise AdapterError(
                f"modules-to-save: {inner[0]} is a part of {path}, which is saved in full; name "
                "one of them"
            )
    return saved


def _find_saved(
    model: nn.Module, name: str, paths: Sequence[str], names: Sequence[str]
) -> list[str]:
    """Return the paths of the modules that one of the names matches."""
    matches = [path for path in paths if is_called(path, name)]
    if not matches:
        raise AdapterError(
            f"modules-to-save: {printable(name)} is no module of "
            f"{type(model).__name__}{suggestion(name, paths)}"
        )
    longer = []
    for path in paths:
        # The user may name two heads, one of whose names ends in the other's, as in DistilBERT.
        is_named = any(is_called(path, other) for other in names)
        if path.endswith(name) and not is_named:
            longer.append(path)
    if longer:
        raise AdapterError(
            f"modules-to-save: {printable(name)} also ends the name of {longer[0]}, which PEFT "
            f"would train too; write more of the path, such as {matches[0]}"
        )
    for path in matches:
        quantized = [f"{path}.{inner}" for inner, _ in quantized_layers(model.get_submodule(path))]
        if quantized:
            raise AdapterError(
                f"modules-to-save: the base model is stored with {quantized[0].rstrip('.')} "
                "quantized, which cannot be trained in full; leave it out, or use the model's "
                "release in bfloat16 with model.quantization, which leaves such modules as they are"
            )
        if not list(model.get_submodule(path).parameters()):
            raise AdapterError(
                f"modules-to-save: {path} has no parameters, so there is nothing to train"
            )
    return matches


def refuse_tied(base: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Reject adapting a weight that modules share: a residual would change both, or be added twice.

    Args:
        base: The base model with LoRA layers in it.
        layers: The adapted modules' LoRA layers.

    Raises:
        AdapterError: If an adapted weight is shared.
    """
    owners_by_weight: dict[int, list[str]] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners_by_weight.setdefault(id(weight), []).append(path)
    for layer in layers.values():
        if layer.expert is not None:
            continue
        owners = owners_by_weight.get(id(layer.layer.get_base_layer().weight), [])
        others = [owner for owner in owners if not owner.startswith(layer.path)]
        if others:
            raise AdapterError(
                f"module {layer.path} shares its weight with {', '.join(others)} (tied weights); "
                "adapting it would change both. Remove it from target-modules"
            )


def suggestion(name: str, paths: Sequence[str]) -> str:
    """Return the end of a message, with the name that the user may have meant."""
    depth = name.count(".") + 1
    endings = {".".join(path.split(".")[-depth:]) for path in paths}
    candidates = sorted(ending for ending in endings if not ending.isdigit())
    similar = difflib.get_close_matches(name, candidates, n=1, cutoff=SUGGESTION_CUTOFF)
    return f"; did you mean {similar[0]}?" if similar else "; see the model's named_modules()"
