"""Exact federated LoRA fine-tuning of language models.

The names below are public. They are imported on first use, so that `import fedmomentum` and the
command line stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fedmomentum.utils.process import quiet_advice

if TYPE_CHECKING:
    from fedmomentum.aggregation import METHODS as METHODS
    from fedmomentum.aggregation import AggregationContext as AggregationContext
    from fedmomentum.aggregation import ClientUpdates as ClientUpdates
    from fedmomentum.aggregation import FedIT as FedIT
    from fedmomentum.aggregation import FedMomentum as FedMomentum
    from fedmomentum.aggregation import Method as Method
    from fedmomentum.aggregation import ModuleAggregate as ModuleAggregate
    from fedmomentum.aggregation.aggregate import AggregationResult as AggregationResult
    from fedmomentum.aggregation.aggregate import aggregate_adapters as aggregate_adapters
    from fedmomentum.config.schema import Config as Config
    from fedmomentum.config.toml import load_config as load_config
    from fedmomentum.formats.round_record import RoundRecord as RoundRecord
    from fedmomentum.global_model.model import GlobalModel as GlobalModel
    from fedmomentum.linalg.low_rank import LowRank as LowRank
    from fedmomentum.lora.adapter import Adapter as Adapter
    from fedmomentum.lora.peft_folder import read_adapter as read_adapter
    from fedmomentum.lora.peft_folder import write_adapter as write_adapter
    from fedmomentum.results.run_results import RunResults as RunResults
    from fedmomentum.run.evaluate import evaluate as evaluate
    from fedmomentum.run.federated_trainer import FederatedTrainer as FederatedTrainer
    from fedmomentum.run.inference import generate as generate
    from fedmomentum.server.callbacks import Callback as Callback
    from fedmomentum.training import TrainReport as TrainReport


_MODULES = {
    "Adapter": "fedmomentum.lora.adapter",
    "AggregationContext": "fedmomentum.aggregation",
    "AggregationResult": "fedmomentum.aggregation.aggregate",
    "Callback": "fedmomentum.server.callbacks",
    "ClientUpdates": "fedmomentum.aggregation",
    "Config": "fedmomentum.config.schema",
    "FedIT": "fedmomentum.aggregation",
    "FedMomentum": "fedmomentum.aggregation",
    "FederatedTrainer": "fedmomentum.run.federated_trainer",
    "GlobalModel": "fedmomentum.global_model.model",
    "LowRank": "fedmomentum.linalg.low_rank",
    "METHODS": "fedmomentum.aggregation",
    "Method": "fedmomentum.aggregation",
    "ModuleAggregate": "fedmomentum.aggregation",
    "RoundRecord": "fedmomentum.formats.round_record",
    "RunResults": "fedmomentum.results.run_results",
    "TrainReport": "fedmomentum.training.hf_trainer",
    "aggregate_adapters": "fedmomentum.aggregation.aggregate",
    "evaluate": "fedmomentum.run.evaluate",
    "generate": "fedmomentum.run.inference",
    "load_config": "fedmomentum.config.toml",
    "read_adapter": "fedmomentum.lora.peft_folder",
    "write_adapter": "fedmomentum.lora.peft_folder",
}
"""Public name -> the module that defines it."""
__all__ = list(_MODULES)

# Call this before any of them imports transformers or PEFT, which import quantization libraries.
quiet_advice()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        names = ", ".join(_MODULES)
        raise AttributeError(f"module 'fedmomentum' has no attribute {name!r}; it has {names}")
    return getattr(importlib.import_module(_MODULES[name]), name)
