"""Names of adapted weights: modules, single experts of a stack, and embeddings.

The algebra identifies matrices by name. Most are named after the path of a linear module.
Mixture-of-experts models hold all experts of a layer in one 3-D parameter; here each expert is a
separate matrix, named `<parameter>[<index>]`, such as `model.layers.0.mlp.experts.down_proj[3]`.
The matrix of an embedding is named `<module>[embedding]`, since PEFT stores its factors under
different names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDING = "[embedding]"
_EXPERT = re.compile(r"(.+)\[(\d{1,6})\]")
# Parameters whose wrapper is outside that of the other stack in the same module: PEFT wraps a
# module's parameters in their order, and in all models these come last.
OUTER_PARAMETERS = ("down_proj", "w2")


def expert_name(parameter: str, index: int) -> str:
    """Return the name of one expert's matrix in a 3-D parameter."""
    return f"{parameter}[{index}]"


def split_expert(name: str) -> tuple[str, int | None]:
    """Return the parameter and the index of an expert; the name itself and None for others."""
    matched = _EXPERT.fullmatch(name)
    return (matched[1], int(matched[2])) if matched else (name, None)


def is_embedding(name: str) -> bool:
    """Return whether a name stands for the matrix of an embedding."""
    return name.endswith(EMBEDDING)


def weight_path(name: str) -> str:
    """Return the path of the parameter that holds a matrix, as in `named_parameters`."""
    parameter, index = split_expert(name)
    if index is not None:
        return parameter
    return f"{name.removesuffix(EMBEDDING)}.weight"


def wrapping_order(parameters: Iterable[str]) -> list[str] | None:
    """Return the parameters of one module in the order in which PEFT wraps them, innermost first.

    PEFT's files identify a stack by its position in this order, not by name. The order comes from
    the module's class, which the files do not contain.

    Returns:
        The names; None if there are several in an unknown order.
    """
    names = sorted(set(parameters))
    outer = [name for name in names if name in OUTER_PARAMETERS]
    inner = [name for name in names if name not in OUTER_PARAMETERS]
    if len(names) > 1 and (len(outer) != 1 or len(inner) != 1):
        return None
    return inner + outer
