"""From `lora.target-modules` to the modules to adapt: everything requested, or an error.

PEFT matches names loosely, ignores names that match nothing as long as another one matches, and
adapts parts of a model that text never reaches. So modules are chosen here, and PEFT is given the
result.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedmomentum.errors import AdapterError
from fedmomentum.lora.linear_modules import IDLE, REFUSED, RENAMED, LinearModules
from fedmomentum.lora.target_checks import suggestion
from fedmomentum.lora.target_names import (
    ALL_LINEAR,
    ATTENTION,
    alternatives,
    is_called,
    is_target,
)
from fedmomentum.utils.text import printable

# Matches modules in one of the repeated layers, such as `model.layers.3.mlp.up_proj`.
_IN_LAYER = re.compile(r"\.\d+\.")
_EXPERTS_PART = re.compile(r"(^|\.)\w*experts?\.")
# More reasons why a module is left out, besides those of `linear_modules`.
SAVED = "trained in full"
CLASSIFIER_HEAD = "the classifier's head, trained in full"
SMALL = "has a side smaller than the rank"
EXPERTS = "the experts of a layer, not in target-parameters"
NOT_CHOSEN = "not in target-modules"
# A name may also match modules left out for these reasons, besides some that are adapted.
LEFT_OUT = (*IDLE, CLASSIFIER_HEAD)


@dataclass(frozen=True)
class Targets:
    """The modules to adapt.

    Attributes:
        modules: Their paths, sorted.
        names: What PEFT is given: the original names if they mean the same to PEFT, else the paths.
        parameters: The paths of parameters to adapt: stacks of experts, each of which gets its own
            factors, and weights of linear modules.
        left_out: Path of every other linear module, and of experts, to the reason.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def choose_targets(
    model: LinearModules,
    setting: Sequence[str] | str | None,
    *,
    rank: int,
    saved: Collection[str] = (),
    head: Collection[str] = (),
    parameters: Sequence[str] = (),
) -> Targets:
    """Return the modules that a setting selects in a model.

    Args:
        model: The model's linear modules.
        setting: Names, `all-linear`, `attention`, or a regular expression that must match entire
            paths; None or empty for PEFT's choice for the architecture or, if PEFT has none, for
            the projections of the decoder layers.
        rank: The rank of the adapter; a matrix with a smaller side cannot have such an adapter.
        saved: Paths of the fully trained modules.
        head: Those of them that are a classifier's head; if a name matches its layers besides other
            modules, they are left out.
        parameters: Endings of the paths of parameters, such as `experts.down_proj`. If some are
            given without a setting, no modules are adapted.

    Raises:
        AdapterError: If a name, or a branch of the expression, matches nothing that can be adapted.
    """
    reasons = dict(model.reasons)
    for path in [*model.sizes, *model.embeddings]:
        if _is_within(path, saved):
            reasons[path] = CLASSIFIER_HEAD if _is_within(path, head) else SAVED
        elif model.sizes.get(path, rank) < rank and path not in reasons:
            reasons[path] = SMALL
    adapted = _find_parameters(model, parameters)

    # A general setting takes whatever is possible; modules named explicitly must be possible.
    names: Sequence[str] = ()
    modules: list[str] = []
    if not setting and adapted:
        pass  # as in PEFT, these alone
    elif not setting:
        names = model.default if isinstance(model.default, list) else ()
        modules = _default_modules(model, reasons)
    elif setting in (ALL_LINEAR, ATTENTION):
        modules = [p for p in model.sizes if p not in reasons and is_target(p, setting)]
    else:
        modules = _named_modules(model, setting, reasons)
        names = () if isinstance(setting, str) else setting
    if not modules and not adapted:
        kinds = sorted(set(reasons.values())) or ["it has none"]
        raise AdapterError(
            f"target-modules {setting or '(default)'}: {model.kind} has no linear module to adapt "
            f"({'; '.join(kinds)})"
        )

    chosen = {*modules, *adapted, *(path.removesuffix(".weight") for path in adapted)}
    left_out = {path: reasons.get(path, NOT_CHOSEN) for path in model.sizes}
    left_out |= {path: EXPERTS for path in model.others if _EXPERTS_PART.search(path)}
    return Targets(
        tuple(sorted(modules)),
        _names_for_peft(model, names, modules),
        tuple(adapted),
        {path: reason for path, reason in left_out.items() if path not in chosen},
    )


def _is_within(path: str, modules: Collection[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _find_parameters(model: LinearModules, names: Sequence[str]) -> list[str]:
    """Return the paths of the parameters to adapt; every name must match at least one.

    Raises:
        AdapterError: If a name matches nothing, or something that PEFT cannot adapt or read back.
    """
    found: set[str] = set()
    for name in names:
        matched = [path for path in model.parameters if is_called(path, name)]
        if not matched:
            hint = suggestion(name, list(model.parameters))
            raise AdapterError(
                f"target-parameters: {printable(name)} is no parameter of {model.kind} with two or "
                f"three dimensions{hint}"
            )
        found |= set(matched)
    for path in sorted(found):
        if path.removesuffix(".weight") in model.quantized:
            raise AdapterError(
                f"target-parameters: {path} is quantized, and PEFT adapts it as a module only: "
                "name it in target-modules"
            )
        if model.reasons.get(path.removesuffix(".weight")) == RENAMED:
            raise AdapterError(
                f"target-parameters: {path} cannot be adapted: {RENAMED}. Leave it out"
            )
    return sorted(found)


def _default_modules(model: LinearModules, reasons: Mapping[str, str]) -> list[str]:
    """Return PEFT's choice or, if none of it can be adapted, the modules of the decoder layers."""
    usable = [path for path in model.sizes if path not in reasons]
    chosen = [path for path in usable if model.default and is_target(path, model.default)]
    return chosen or [path for path in usable if _IN_LAYER.search(path)]


def _names_for_peft(
    model: LinearModules, names: Sequence[str], modules: Collection[str]
) -> tuple[str, ...]:
    """Return the names if PEFT would match exactly these modules by them, else the paths."""
    everything = [*model.sizes, *model.others]
    if names and {path for path in everything if is_target(path, names)} == set(modules):
        return tuple(names)
    return tuple(sorted(modules))


# ── what is named ─────────────────────────────────────────────────────────────────────────────────


def _named_modules(
    model: LinearModules, setting: Sequence[str] | str, reasons: Mapping[str, str]
) -> list[str]:
    """Return the modules matching a list of names or an expression; every part must match."""
    parts: Iterable[tuple[str, Sequence[str] | str]]
    if isinstance(setting, str):
        parts = [(part, part) for part in alternatives(setting)]
    else:
        parts = [(name, [name]) for name in setting]
    for shown, part in parts:
        _check_part(model, shown, part, reasons)

    adaptable = [*model.sizes, *_named_embeddings(model, setting)]
    matched = [path for path in adaptable if is_target(path, setting)]
    return [path for path in matched if reasons.get(path) not in LEFT_OUT]


def _named_embeddings(model: LinearModules, setting: Sequence[str] | str) -> tuple[str, ...]:
    """Return the embeddings that a setting can match: none if it is an expression."""
    return () if isinstance(setting, str) else model.embeddings


def _check_part(
    model: LinearModules,
    shown: str,
    part: Sequence[str] | str,
    reasons: Mapping[str, str],
) -> None:
    """Reject a name or a branch that would adapt less than it says.

    Raises:
        AdapterError: If it matches nothing, or something that cannot be adapted.
    """
    where = f"target-modules: {printable(shown, 200)}"
    # Modules that are neither linear nor listed embeddings cannot be adapted.
    others = [path for path in model.others if is_target(path, part)]
    embeddings = _named_embeddings(model, part)
    others = [path for path in others if path not in embeddings]
    if others:
        raise AdapterError(
            f"{where} stands for {others[0]}, a {model.others[others[0]]}; only linear modules "
            "can be adapted here, embeddings where a list names them, and experts by "
            "target-parameters. Leave it out, or name the linear modules with more of their path"
        )
    matched = [path for path in [*model.sizes, *embeddings] if is_target(path, part)]
    if not matched:
        if isinstance(part, str):
            raise AdapterError(
                f"{where} matches the entire path of no linear module of {model.kind}; paths are "
                f"such as {next(iter(model.sizes), 'none')}. Names are given as a list: "
                '["q_proj", "v_proj"]'
            )
        hint = suggestion(part[0], list(model.sizes))
        raise AdapterError(f"{where} is no linear module of {model.kind}{hint}")
    # Of the modules that match, none may be trained in full or impossible to adapt, and at least
    # one must be trained by adapting it.
    saved = [path for path in matched if reasons.get(path) == SAVED]
    if saved:
        raise AdapterError(
            f"module {saved[0]} is in target-modules and in modules-to-save, which trains it in "
            "full; remove it from one of them"
        )
    refused = [path for path in matched if reasons.get(path) in REFUSED]
    if refused:
        raise AdapterError(
            f"{where} stands for {refused[0]}, which cannot be adapted: {reasons[refused[0]]}. "
            "Leave it out"
        )
    if all(reasons.get(path) in LEFT_OUT for path in matched):
        reason = reasons[matched[0]]
        is_head = reason == CLASSIFIER_HEAD
        effect = "which needs no adapter" if is_head else "where nothing would be trained"
        raise AdapterError(f"{where} stands for {matched[0]}, {effect}: {reason}")
