"""The methods, one file each. `METHODS` is the table that the command line and the contract test read."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, cast

from fedmomentum.aggregation.base import Aggregate as Aggregate
from fedmomentum.aggregation.base import Method as Method
from fedmomentum.aggregation.fedexlora import FedExLoRA as FedExLoRA
from fedmomentum.aggregation.fedit import FedIT as FedIT
from fedmomentum.aggregation.fedmomentum import FedMomentum as FedMomentum
from fedmomentum.aggregation.fedrotlora import FedRotLoRA as FedRotLoRA
from fedmomentum.aggregation.fedsalora import FedSALoRA as FedSALoRA
from fedmomentum.aggregation.fedsvd import FedSVD as FedSVD
from fedmomentum.aggregation.ffalora import FFALoRA as FFALoRA
from fedmomentum.aggregation.flexlora import FlexLoRA as FlexLoRA
from fedmomentum.aggregation.flora import FLoRA as FLoRA
from fedmomentum.aggregation.florist import FLoRIST as FLoRIST
from fedmomentum.aggregation.frlora import FRLoRA as FRLoRA
from fedmomentum.aggregation.hetlora import HetLoRA as HetLoRA
from fedmomentum.aggregation.lorafair import LoRAFAIR as LoRAFAIR
from fedmomentum.aggregation.rolora import RoLoRA as RoLoRA
from fedmomentum.errors import ConfigError
from fedmomentum.plugins import imported

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


def method_class(name: str) -> type[Method]:
    """The class of a method: a name of the table, or `module:Class` of the user's own.

    Raises:
        ConfigError: an unknown name, or something that is no method.
    """
    if ":" in name:
        found: Any = imported(name, "method.name")
        if not isinstance(found, type) or Method not in found.__mro__ or not is_dataclass(found):
            raise ConfigError(f"method.name {name!r} is no dataclass derived from fedmomentum.aggregation.Method")
        return cast(type[Method], found)
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(METHODS)}, or module:Class of your own")
    return METHODS[name]


def build_method(name: str, settings: Mapping[str, Any]) -> Method:
    """`method_class(name)(**settings)`, with errors that say what there is.

    Raises:
        ConfigError: an unknown name or setting, or a value that the method refuses.
    """
    chosen = method_class(name)
    known = list(chosen.__dataclass_fields__)  # type: ignore[attr-defined]
    for key in settings:
        if key not in known:
            raise ConfigError(f"method {name} has no setting {key!r}; it has {', '.join(known) or 'none'}")
    try:
        return chosen(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {name}: {error}") from error
