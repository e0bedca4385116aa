"""Parameters that are float32 only while in use, for models larger than memory.

The model's files are memory-mapped, in 16 bits. To any code that looks, its parameters are float32
tensors; each one is created when an operation uses it, and freed afterward.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedmomentum.errors import ModelError
from fedmomentum.linalg.matrix import Matrix, add_to_weight_

CPU = torch.device("cpu")
_ATEN = torch.ops.aten
# Operations that return the same parameter.
_ALIASES = (_ATEN.detach.default, _ATEN.alias.default)


@dataclass(frozen=True, eq=False)
class MatrixSum:
    """Matrices to add to one matrix of a parameter.

    Attributes:
        expert: The matrix's index in a 3-D parameter; None if the parameter is one matrix.
        is_transposed: Whether it is stored as `(in, out)`.
        matrices: The matrices, in the order of addition.
    """

    expert: int | None
    is_transposed: bool
    matrices: Sequence[Matrix]

    def add_to(self, parameter: Tensor) -> None:
        """Add the matrices to the parameter in place."""
        weight = parameter if self.expert is None else parameter[self.expert]
        for matrix in self.matrices:
            add_to_weight_(weight.mT if self.is_transposed else weight, matrix)


@dataclass(frozen=True, eq=False)
class WeightSource:
    """What a float32 parameter is made from.

    Attributes:
        stored: The parameter as loaded.
        sums: What to add to its matrices.
        rounded_to: The dtype to round the result to; None for no rounding.
    """

    stored: Tensor
    sums: Sequence[MatrixSum] = ()
    rounded_to: torch.dtype | None = None

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the parameter on the CPU, computed in float32 and cast to `dtype`."""
        # Add to a copy in the parameter's own layout, so that sums have the same bits as those of a
        # live weight.
        weight = self.stored.to(torch.float32, copy=bool(self.sums))
        for added in self.sums:
            added.add_to(weight)
        if self.rounded_to is not None:
            weight = weight.to(self.rounded_to)
        return weight.to(dtype)

    def of_expert(self, number: int) -> WeightSource:
        """Return the source of one expert's slice of a 3-D parameter."""
        number %= len(self.stored)
        sums = [replace(added, expert=None) for added in self.sums if added.expert == number]
        return replace(self, stored=self.stored[number], sums=sums)


class StreamedTensor(Tensor):
    """A tensor that every operation using it reads from its source.

    Operations receive the data that was read; the tensor itself has no memory, and cannot be
    modified in place.

    Args:
        source: What it is made from.
        device: The device on which operations receive it.
        dtype: Its dtype; float32 for computing, others only for writing to files.
    """

    source: WeightSource
    # Handle everything in `__torch_dispatch__`, below autograd.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls,
        source: WeightSource,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> StreamedTensor:
        """Create a tensor that has a shape, a dtype and a device, but no data."""
        stored = source.stored
        tensor: StreamedTensor = Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=dtype, device=device
        )
        tensor.source = source
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StreamedTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return an ordinary parameter, since modules are copied in order to be trained."""
        copied = nn.Parameter(self.read().clone(), requires_grad=False)
        memo[id(self)] = copied
        return copied

    def read(self) -> Tensor:
        """Return an ordinary tensor with the same values, dtype and device."""
        return self.source.read(self.dtype).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        """Run an operation on the current values of its streamed arguments."""
        if func in _ALIASES:
            tensor = args[0]
            return cls(tensor.source, tensor.device, tensor.dtype)
        if func is _ATEN.set_.source_Tensor and all(isinstance(arg, cls) for arg in args):
            # PEFT replaces experts' weights with themselves while their adapter is active.
            args[0].source = args[1].source
            return args[0]
        if changes_any(cls, func, args):
            raise ModelError(
                f"the model changes a weight in place when it computes ({func}); such a model "
                "cannot be exported"
            )
        # Loops over experts select one at a time, so read only that one.
        if func is _ATEN.select.int and args[0].ndim == 3 and args[1] == 0:
            tensor = args[0]
            return cls(tensor.source.of_expert(args[2]), tensor.device, tensor.dtype).read()
        args = tree_map_only(StreamedTensor, StreamedTensor.read, args)
        kwargs = tree_map_only(StreamedTensor, StreamedTensor.read, kwargs or {})
        return func(*args, **kwargs)


def changes_any(kind: type[Tensor], operation: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation modifies a tensor of this type in place, which would be lost."""
    for argument, value in zip(operation._schema.arguments, args, strict=False):
        alias = argument.alias_info
        if alias is not None and alias.is_write and isinstance(value, kind):
            return True
    return False


def stream_parameters(model: nn.Module, device: torch.device) -> None:
    """Make all floating-point parameters of a model streamed, and move everything else.

    Tied parameters stay tied.

    Args:
        model: A model on the CPU.
        device: The device to compute on.
    """
    streamed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in streamed:
                tensor = StreamedTensor(WeightSource(parameter.detach()), device)
                streamed[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            module._parameters[name] = streamed[id(parameter)]
    for other in [*model.parameters(), *model.buffers()]:
        if not isinstance(other, StreamedTensor):
            # 16-bit buffers come from the checkpoint; those that the model computes are float32.
            is_narrow = other.is_floating_point() and other.itemsize < torch.float32.itemsize
            dtype = torch.float32 if is_narrow else other.dtype
            other.data = other.data.to(device=device, dtype=dtype)


def load_parameters(model: nn.Module, names: Collection[str]) -> None:
    """Turn some parameters into ordinary ones in memory, which can be modified in place.

    Tied parameters stay tied.

    Args:
        model: A model with streamed parameters.
        names: Names of parameters; names that the model does not have are ignored.
    """
    loaded: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names and isinstance(parameter, StreamedTensor):
            loaded[id(parameter)] = copy.deepcopy(parameter)
    for module in model.modules():
        for name, held in module._parameters.items():
            module._parameters[name] = loaded.get(id(held), held)


def is_streamed(model: nn.Module) -> bool:
    """Return whether any parameter of a model is streamed."""
    return any(isinstance(parameter, StreamedTensor) for parameter in model.parameters())
