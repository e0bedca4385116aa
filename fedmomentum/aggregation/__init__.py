"""Aggregation of the clients' adapters: one file per method, plus the code they share.

Depends on torch only; knows nothing about clients, networks or base models.
"""

from fedmomentum.aggregation.client_updates import ClientUpdates as ClientUpdates
from fedmomentum.aggregation.method import AggregationContext as AggregationContext
from fedmomentum.aggregation.method import Method as Method
from fedmomentum.aggregation.method import ModuleAggregate as ModuleAggregate
from fedmomentum.aggregation.methods.fedexlora import FedExLoRA as FedExLoRA
from fedmomentum.aggregation.methods.fedit import FedIT as FedIT
from fedmomentum.aggregation.methods.fedmomentum import FedMomentum as FedMomentum
from fedmomentum.aggregation.methods.fedrotlora import FedRotLoRA as FedRotLoRA
from fedmomentum.aggregation.methods.fedsalora import FedSALoRA as FedSALoRA
from fedmomentum.aggregation.methods.fedsvd import FedSVD as FedSVD
from fedmomentum.aggregation.methods.ffalora import FFALoRA as FFALoRA
from fedmomentum.aggregation.methods.flexlora import FlexLoRA as FlexLoRA
from fedmomentum.aggregation.methods.flora import FLoRA as FLoRA
from fedmomentum.aggregation.methods.florist import FLoRIST as FLoRIST
from fedmomentum.aggregation.methods.frlora import FRLoRA as FRLoRA
from fedmomentum.aggregation.methods.hetlora import HetLoRA as HetLoRA
from fedmomentum.aggregation.methods.lorafair import LoRAFAIR as LoRAFAIR
from fedmomentum.aggregation.methods.rolora import RoLoRA as RoLoRA
from fedmomentum.aggregation.registry import METHODS as METHODS
from fedmomentum.aggregation.registry import build_method as build_method
from fedmomentum.aggregation.registry import method_class as method_class
