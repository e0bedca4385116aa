"""The methods, one file each. `METHODS` is the table that the command line and the contract test read."""

from collections.abc import Mapping
from typing import Any

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


def build_method(name: str, settings: Mapping[str, Any]) -> Method:
    """`METHODS[name](**settings)`, with errors that say what there is.

    Raises:
        ConfigError: an unknown name or setting, or a value that the method refuses.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    known = list(METHODS[name].__dataclass_fields__)  # type: ignore[attr-defined]
    for key in settings:
        if key not in known:
            raise ConfigError(f"method {name} has no setting {key!r}; it has {', '.join(known) or 'none'}")
    try:
        return METHODS[name](**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {name}: {error}") from error
