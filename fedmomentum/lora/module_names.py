"""Names of adapted weights: modules, single experts of a stack, and embeddings.

The algebra knows matrices by name. Most belong to a linear module and have its path. Mixture-of-
experts models hold all experts of a layer in one 3-D parameter; each expert is a matrix of its own,
called `<parameter>[<number>]`, such as `model.layers.0.mlp.experts.down_proj[3]`. The matrix of an
embedding is called `<module>[embedding]`, since PEFT stores its factors under other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EMBEDDING = "[embedding]"
_EXPERT = re.compile(r"(.+)\[(\d{1,6})\]")
# Parameters whose stack PEFT puts around that of the other stack in the same module: PEFT wraps
# parameters in the order in which a module has them, and all models have these last.
OUTER_PARAMETERS = ("down_proj", "w2")


def expert_name(parameter: str, index: int) -> str:
    """Return the name of one expert's matrix in a 3-D parameter."""
    return f"{parameter}[{index}]"


def split_expert(name: str) -> tuple[str, int | None]:
    """Return the parameter and the number of an expert; the name itself and None for others."""
    matched = _EXPERT.fullmatch(name)
    return (matched[1], int(matched[2])) if matched else (name, None)


def is_embedding(name: str) -> bool:
    """Return whether a name stands for the matrix of an embedding."""
    return name.endswith(EMBEDDING)


def weight_path(name: str) -> str:
    """Return the path of the parameter that holds a matrix, as `named_parameters` has it."""
    parameter, index = split_expert(name)
    if index is not None:
        return parameter
    return f"{name.removesuffix(EMBEDDING)}.weight"


def wrapping_order(parameters: Iterable[str]) -> list[str] | None:
    """Return the parameters of one module in the order in which PEFT wraps them, innermost first.

    A stack's place in PEFT's files tells its place in this order and not its name, and the order
    is that of the module's class, which a file does not hold.

    Returns:
        The names; None if there are several and their order is not known.
    """
    names = sorted(set(parameters))
    outer = [name for name in names if name in OUTER_PARAMETERS]
    inner = [name for name in names if name not in OUTER_PARAMETERS]
    if len(names) > 1 and (len(outer) != 1 or len(inner) != 1):
        return None
    return inner + outer
