"""The table of methods used by the command line and the contract test; also loads user methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from fedmomentum.aggregation.method import Method
from fedmomentum.aggregation.methods.fedexlora import FedExLoRA
from fedmomentum.aggregation.methods.fedit import FedIT
from fedmomentum.aggregation.methods.fedmomentum import FedMomentum
from fedmomentum.aggregation.methods.fedrotlora import FedRotLoRA
from fedmomentum.aggregation.methods.fedsalora import FedSALoRA
from fedmomentum.aggregation.methods.fedsvd import FedSVD
from fedmomentum.aggregation.methods.ffalora import FFALoRA
from fedmomentum.aggregation.methods.flexlora import FlexLoRA
from fedmomentum.aggregation.methods.flora import FLoRA
from fedmomentum.aggregation.methods.florist import FLoRIST
from fedmomentum.aggregation.methods.frlora import FRLoRA
from fedmomentum.aggregation.methods.hetlora import HetLoRA
from fedmomentum.aggregation.methods.lorafair import LoRAFAIR
from fedmomentum.aggregation.methods.rolora import RoLoRA
from fedmomentum.errors import ConfigError
from fedmomentum.utils.plugins import import_object

METHODS: dict[str, type[Method]] = {
    "fedmomentum": FedMomentum,
    "fedit": FedIT,
    "flora": FLoRA,
    "ffalora": FFALoRA,
    "frlora": FRLoRA,
    "flexlora": FlexLoRA,
    "fedexlora": FedExLoRA,
    "hetlora": HetLoRA,
    "rolora": RoLoRA,
    "fedsvd": FedSVD,
    "fedsalora": FedSALoRA,
    "lorafair": LoRAFAIR,
    "fedrotlora": FedRotLoRA,
    "florist": FLoRIST,
}


EXPECTED = {
    "str": "a text",
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
}
"""What a setting of a type must be, in messages; other types are left to the method."""


def has_type(value: Any, kind: str) -> bool:
    """Return whether a setting's value has a type of `EXPECTED`."""
    if kind == "float":
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and math.isfinite(value)
    return type(value).__name__ == kind


def method_class(name: str) -> type[Method]:
    """Return a method's class by its name in the table, or by `module:Class` for a user's own.

    Raises:
        ConfigError: If the name is unknown, or the class is not a dataclass derived from `Method`.
    """
    if ":" in name:
        user_class: Any = import_object(name, "method.name")
        is_method = isinstance(user_class, type) and issubclass(user_class, Method)
        if not is_method or not is_dataclass(user_class):
            raise ConfigError(
                f"method.name {name!r} is not a dataclass derived from "
                "fedmomentum.aggregation.Method"
            )
        return cast(type[Method], user_class)
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}; known: {', '.join(METHODS)}, or module:Class of your own"
        )
    return METHODS[name]


def build_method(name: str, settings: Mapping[str, Any]) -> Method:
    """Return `method_class(name)(**settings)`.

    Raises:
        ConfigError: If the name or a setting is unknown (the message lists the known ones), or the
            method rejects a value.
    """
    cls = method_class(name)
    known = {}
    for field in fields(cast(Any, cls)):
        # An annotation is text where the module postpones its evaluation.
        known[field.name] = str(getattr(field.type, "__name__", field.type))
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"method {name} has no setting {key!r}; it has {', '.join(known) or 'none'}"
            )
        kind = known[key]
        if kind in EXPECTED and not has_type(value, kind):
            raise ConfigError(f"method {name}: {key} must be {EXPECTED[kind]}; got {value!r}")
    try:
        return cls(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {name}: {error}") from error
