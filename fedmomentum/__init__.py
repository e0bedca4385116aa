"""Exact federated LoRA fine-tuning of language models.

The names below are the public ones. They are imported when they are first used, so that `import fedmomentum` and the
command line stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmomentum.adapter import Adapter as Adapter
    from fedmomentum.aggregation import Aggregate as Aggregate
    from fedmomentum.aggregation import FedIT as FedIT
    from fedmomentum.aggregation import FedMomentum as FedMomentum
    from fedmomentum.aggregation.whole import AdapterAggregate as AdapterAggregate
    from fedmomentum.aggregation.whole import aggregate_adapters as aggregate_adapters
    from fedmomentum.global_model import GlobalModel as GlobalModel
    from fedmomentum.lowrank import LowRank as LowRank
    from fedmomentum.peft_io import read_adapter as read_adapter
    from fedmomentum.peft_io import write_adapter as write_adapter

_HOMES = {
    "Adapter": "fedmomentum.adapter",
    "AdapterAggregate": "fedmomentum.aggregation.whole",
    "Aggregate": "fedmomentum.aggregation",
    "FedIT": "fedmomentum.aggregation",
    "FedMomentum": "fedmomentum.aggregation",
    "GlobalModel": "fedmomentum.global_model",
    "LowRank": "fedmomentum.lowrank",
    "aggregate_adapters": "fedmomentum.aggregation.whole",
    "read_adapter": "fedmomentum.peft_io",
    "write_adapter": "fedmomentum.peft_io",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedmomentum' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
