"""The live factors of a model's LoRA layers, by the names of their matrices, without peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fedmomentum.errors import AdapterError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.module_names import EMBEDDING, expert_name, wrapping_order
from fedmomentum.lora.peft_layout import expert_factor, nested_path

# PEFT's name of the one adapter on a model.
ADAPTER_NAME = "default"


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The LoRA factors of one matrix in a live model: of a module, an embedding, or one expert.

    Attributes:
        layer: PEFT's layer, shared by all experts of a parameter.
        path: Its path in the base model, with `base_layer` for each layer around it.
        expert: The index of the expert; None if the layer has only one matrix.
    """

    layer: Any
    path: str
    expert: int | None = None

    @property
    def scaling(self) -> float:
        """The factor by which `B A` is multiplied."""
        scaling: float = self.layer.scaling[ADAPTER_NAME]
        return scaling

    @property
    def is_embedding(self) -> bool:
        """Whether the layer is an embedding."""
        return ADAPTER_NAME in getattr(self.layer, "lora_embedding_A", {})

    def parameter(self, kind: str) -> nn.Parameter:
        """Return the trained parameter that holds this factor, `B` or `A`."""
        if self.is_embedding:
            table = self.layer.lora_embedding_A if kind == "B" else self.layer.lora_embedding_B
            embedding_factor: nn.Parameter = table[ADAPTER_NAME]
            return embedding_factor
        linear = (self.layer.lora_B if kind == "B" else self.layer.lora_A)[ADAPTER_NAME]
        factor: nn.Parameter = linear.weight
        return factor

    def view(self, kind: str, tensor: Tensor) -> Tensor:
        """Return a view of the factor in a tensor laid out like this kind's parameter."""
        if self.is_embedding:
            return tensor.mT
        if self.expert is None:
            return tensor
        return expert_factor(kind, tensor, self.layer.num_experts, self.expert)

    def factor(self, kind: str) -> Tensor:
        """Return the live factor, with its gradient."""
        return self.view(kind, self.parameter(kind))

    @property
    def factors(self) -> LowRank:
        """The live factors, with their gradients."""
        return LowRank(self.factor("B"), self.factor("A"))

    def detached(self) -> LowRank:
        """Return the live factors without gradients; they share memory with the model."""
        return LowRank(self.factor("B").detach(), self.factor("A").detach())


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    """Return the live LoRA layer of every adapted matrix, by the matrix's name.

    Args:
        model: A `PeftModel`.

    Raises:
        AdapterError: If something is adapted that cannot be aggregated.
    """
    base = model.get_base_model()
    layers = {}
    for path in getattr(model.base_model, "targeted_module_names", []):
        layer = LoraLayer(base.get_submodule(path), path)
        if layer.is_embedding:
            layers[path + EMBEDDING] = layer
        elif ADAPTER_NAME in getattr(layer.layer, "lora_A", {}):
            layers[path] = layer
        else:
            raise AdapterError(
                f"module {path} is adapted, but neither as a linear layer nor as an embedding; "
                "only these are supported"
            )
    parameters = getattr(model.base_model, "targeted_parameter_names", [])
    for module in dict.fromkeys(parameter.rpartition(".")[0] for parameter in parameters):
        layers |= _parameter_layers(base.get_submodule(module), module)
    return dict(sorted(layers.items()))


def _parameter_layers(wrapper: Any, module: str) -> dict[str, LoraLayer]:
    """Return the layers of a module in which PEFT adapts parameters."""
    # Collect the nested wrappers, outermost first.
    wrappers = []
    while hasattr(wrapper, "parameter_name"):
        wrappers.append(wrapper)
        wrapper = wrapper.base_layer
    names = [layer.parameter_name for layer in wrappers]
    order = wrapping_order(names)
    if order is None or order[::-1] != names:
        raise AdapterError(
            f"PEFT adapts the parameters {', '.join(reversed(names))} of {module} in an order that "
            "its files do not tell; adapt one of them"
        )
    layers = {}
    for depth, layer in enumerate(wrappers):
        path = nested_path(module, depth)
        parameter = f"{module}.{layer.parameter_name}"
        weight = layer.get_param()
        if weight.ndim == 3:
            _check_stack(layer, parameter)
            for index in range(layer.num_experts):
                layers[expert_name(parameter, index)] = LoraLayer(layer, path, index)
        elif isinstance(wrapper, nn.Linear) and layer.parameter_name == "weight":
            layers[module] = LoraLayer(layer, path)
        else:
            raise AdapterError(
                f"target-parameters: {parameter} is {tuple(weight.shape)} in a "
                f"{type(wrapper).__name__}; supported are 3-D parameters of experts and the weights"
                " of linear layers"
            )
    return layers


def _check_stack(layer: Any, parameter: str) -> None:
    """Reject a transposed stack of a single expert: PEFT adds B A without transposing it."""
    if layer.num_experts == 1 and getattr(layer.get_base_layer(), "is_transposed", False):
        raise AdapterError(
            f"target-parameters: {parameter} holds one expert, stored transposed, which PEFT does "
            "not adapt correctly; leave it out"
        )
