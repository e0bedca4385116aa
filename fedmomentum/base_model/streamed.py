"""Parameters that are in float32 only while they are used: a model larger than the memory computes.

The model is in memory as its files are, in 16 bits and memory-mapped. For everyone who asks, its
parameters are float32 tensors; each is made when an operation uses it, and freed after it.
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
# What gives the same parameter again.
_ALIASES = (_ATEN.detach.default, _ATEN.alias.default)


@dataclass(frozen=True, eq=False)
class MatrixSum:
    """What is added to one matrix of a parameter.

    Attributes:
        expert: The matrix's number in a 3-D parameter; None if the parameter is one matrix.
        is_transposed: Whether it is stored as `(in, out)`.
        matrices: What is added, in this order.
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
    """What a float32 parameter is made of.

    Attributes:
        stored: The parameter as it was loaded.
        sums: What is added to its matrices.
        rounded_to: The dtype that the result is rounded to; None: not at all.
    """

    stored: Tensor
    sums: Sequence[MatrixSum] = ()
    rounded_to: torch.dtype | None = None

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the parameter on the CPU, made in float32 and cast to `dtype`."""
        # What is changed is a copy, in the parameter's own layout: its sums have the same bits as
        # those of a live weight.
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
    """A tensor that is read from its source by every operation that uses it.

    Operations get what was read; the tensor itself is never in memory, and cannot be changed in
    place.

    Args:
        source: What it is made of.
        device: Where operations get it.
        dtype: What it is in. Operations compute in float32; in another dtype it is only written.
    """

    source: WeightSource
    # Everything passes `__torch_dispatch__`, below autograd.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls,
        source: WeightSource,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> StreamedTensor:
        """Make a tensor that has a shape, a dtype and a device, and no data."""
        stored = source.stored
        tensor: StreamedTensor = Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=dtype, device=device
        )
        tensor.source = source
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"StreamedTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return an ordinary parameter: copies of modules are made to be trained."""
        copied = nn.Parameter(self.read().clone(), requires_grad=False)
        memo[id(self)] = copied
        return copied

    def read(self) -> Tensor:
        """Return an ordinary tensor of the same numbers, dtype and device."""
        return self.source.read(self.dtype).to(self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        """Run an operation on what its streamed arguments are at present."""
        if func in _ALIASES:
            tensor = args[0]
            return cls(tensor.source, tensor.device, tensor.dtype)
        if func is _ATEN.set_.source_Tensor and all(isinstance(arg, cls) for arg in args):
            # PEFT replaces experts' weights by themselves while their adapter is active.
            args[0].source = args[1].source
            return args[0]
        if changes_any(cls, func, args):
            raise ModelError(
                f"the model changes a weight in place when it computes ({func}); such a model "
                "cannot be exported"
            )
        # Loops over experts take one of them at a time.
        if func is _ATEN.select.int and args[0].ndim == 3 and args[1] == 0:
            tensor = args[0]
            return cls(tensor.source.of_expert(args[2]), tensor.device, tensor.dtype).read()
        args = tree_map_only(StreamedTensor, StreamedTensor.read, args)
        kwargs = tree_map_only(StreamedTensor, StreamedTensor.read, kwargs or {})
        return func(*args, **kwargs)


def changes_any(kind: type[Tensor], operation: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation changes a tensor of a kind in place: the change would be lost."""
    for argument, value in zip(operation._schema.arguments, args, strict=False):
        alias = argument.alias_info
        if alias is not None and alias.is_write and isinstance(value, kind):
            return True
    return False


def stream_parameters(model: nn.Module, device: torch.device) -> None:
    """Make all floating-point parameters of a model streamed ones; everything else is moved.

    Tied parameters stay tied.

    Args:
        model: A model on the CPU.
        device: Where it is to compute.
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
            # 16-bit buffers are a checkpoint's; what a float32 model computes itself is in float32.
            is_narrow = other.is_floating_point() and other.itemsize < torch.float32.itemsize
            dtype = torch.float32 if is_narrow else other.dtype
            other.data = other.data.to(device=device, dtype=dtype)


def load_parameters(model: nn.Module, names: Collection[str]) -> None:
    """Make some parameters ordinary ones, in memory, which can be changed in place.

    Tied parameters stay tied.

    Args:
        model: A model with streamed parameters.
        names: Names of parameters; those that the model does not have are ignored.
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
