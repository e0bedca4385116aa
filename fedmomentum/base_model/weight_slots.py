"""The place in a live model of the weight that an adapter's matrix changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedmomentum.errors import ModelError
from fedmomentum.lora.module_names import is_embedding, split_expert, weight_path
from fedmomentum.utils.modules import cast_around, is_plain_linear
from fedmomentum.utils.quantized import dequantize, is_quantized, product_dtype, weight_shape

FLOATING_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class WeightSlot:
    """The place of one matrix: the weight of a module, or one expert's slice of a 3-D parameter.

    Attributes:
        name: The matrix's name, as in adapters.
        owner: The live module that has the parameter.
        parameter: The parameter's name in that module.
        expert: The expert's index; None if the parameter is one matrix.
    """

    name: str
    owner: Any
    parameter: str = "weight"
    expert: int | None = None

    @classmethod
    def of(cls, name: str, owner: nn.Module) -> WeightSlot:
        """Return the place of a matrix in the module that holds its weight."""
        parameter, expert = split_expert(name)
        leaf = parameter.rpartition(".")[2] if expert is not None else "weight"
        return cls(name, owner, leaf, expert)

    @property
    def path(self) -> str:
        """The path of the parameter in the base model."""
        return weight_path(self.name)

    @property
    def is_transposed(self) -> bool:
        """Whether the module stores `(in, out)`."""
        if self.expert is None:
            return isinstance(self.owner, Conv1D)
        return bool(getattr(self.owner, "is_transposed", False))

    def matrix(self, stored: Tensor) -> Tensor:
        """Return a view of the matrix `(out, in)` in a tensor laid out like the parameter."""
        tensor = stored if self.expert is None else stored[self.expert]
        return tensor.mT if self.is_transposed else tensor

    @property
    def live(self) -> Tensor:
        """The live parameter, without gradient."""
        parameter: Tensor = getattr(self.owner, self.parameter)
        return parameter.detach()

    @property
    def is_quantized(self) -> bool:
        """Whether the module's weight is quantized."""
        return self.expert is None and is_quantized(self.owner)

    def loaded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the module was loaded with, as floating-point `(out, in)`.

        A quantized weight is dequantized to `dtype`; any other shares memory with the module, in
        its own dtype.
        """
        return dequantize(self.owner, dtype) if self.is_quantized else self.matrix(self.live)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's products."""
        return product_dtype(self.owner) if self.is_quantized else self.live.dtype

    @property
    def device(self) -> torch.device:
        """The device that holds the weight."""
        return self.live.device

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of the parameter as a checkpoint stores it, before any quantization."""
        return weight_shape(self.owner) if self.is_quantized else tuple(self.live.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the matrix."""
        *_, rows, columns = self.parameter_shape
        return (columns, rows) if self.is_transposed else (rows, columns)

    # ── checks ──

    def check(self) -> None:
        """Reject a place whose weight cannot take an update.

        Raises:
            ModelError: If its type or dtype is not supported, or it computes something other than
                the product with its weight.
        """
        if self.expert is not None:
            self._check_expert()
        elif is_embedding(self.name):
            if not isinstance(self.owner, nn.Embedding):
                raise ModelError(f"{self.name} is a {type(self.owner).__name__}; wanted Embedding")
        else:
            _check_linear(self.name, self.owner)
        if not self.is_quantized and self.live.dtype not in FLOATING_DTYPES:
            raise ModelError(
                f"module {self.name} is in {self.live.dtype}; load the base model in a floating "
                "dtype"
            )

    def _check_expert(self) -> None:
        parameter = getattr(self.owner, self.parameter, None)
        if not isinstance(parameter, nn.Parameter) or parameter.ndim != 3:
            raise ModelError(
                f"{self.path} is no 3-D parameter of {type(self.owner).__name__}, so it has no "
                f"expert {self.expert}; is it the base of this adapter?"
            )
        if self.expert is not None and self.expert >= parameter.shape[0]:
            raise ModelError(f"{self.path} has {parameter.shape[0]} experts, and no {self.name}")

    def upcast(self) -> None:
        """Give the module an uninitialized float32 weight, and cast around its forward.

        Inputs are cast to float32 and outputs back. The rest of the module becomes float32 too.
        """
        dtype = self.live.dtype
        weight = torch.empty_like(self.live, dtype=torch.float32)
        setattr(self.owner, self.parameter, nn.Parameter(weight, requires_grad=False))
        for module in self.owner.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_floating_point() and parameter.dtype != torch.float32:
                    upcast = nn.Parameter(parameter.detach().float(), requires_grad=False)
                    setattr(module, name, upcast)
        # A second adapted parameter of the module is float32 by then, and is not cast around again.
        cast_around(self.owner, dtype)


def _check_linear(module: str, layer: Any) -> None:
    """Reject a module that is not a linear layer, or computes something else."""
    is_linear = isinstance(layer, (nn.Linear, Conv1D))
    is_unknown = type(layer).__module__.startswith("bitsandbytes") and not is_quantized(layer)
    if not is_linear or is_unknown:
        raise ModelError(
            f"module {module} is a {type(layer).__name__}; supported are Linear and Conv1D"
        )
    if not is_plain_linear(layer):
        raise ModelError(
            f"module {module} is a {type(layer).__name__}, which computes something else than a "
            "linear layer; leave it out of target-modules"
        )


def find_owners(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the base module that holds each matrix's weight, looking inside PEFT's layers.

    Args:
        model: The base model, plain or with LoRA layers in it.
        names: The names of the matrices.

    Raises:
        ModelError: If the model has no such module.
    """
    owners = {}
    for name in names:
        module = weight_path(name).rpartition(".")[0]
        try:
            owner: Any = model.get_submodule(module)
        except AttributeError as error:
            raise ModelError(
                f"the base model has no module {module}; is it the base of this adapter?"
            ) from error
        while hasattr(owner, "base_layer"):
            owner = owner.base_layer
        owners[name] = owner
    return owners


def checked_slots(layers: Mapping[str, nn.Module]) -> dict[str, WeightSlot]:
    """Return the checked place of each layer's weight, by module.

    Raises:
        ModelError: If a layer's weight cannot take an update.
    """
    slots = {module: WeightSlot.of(module, layer) for module, layer in layers.items()}
    for slot in slots.values():
        slot.check()
    return slots
