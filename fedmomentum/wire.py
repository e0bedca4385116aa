"""An adapter's factors in 16 bits, for the way to the server and back. torch only.

float16 has few exponents, and LoRA's factors are small: so each tensor is first multiplied by a power of two, which
loses nothing, and the power travels beside it. bfloat16 has float32's exponents and fewer digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedmomentum.adapter import Adapter, from_tensors, to_tensors
from fedmomentum.errors import ConfigError, PayloadError
from fedmomentum.lowrank import difference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXPONENT = ".exponent"
TOP = 14
"""A tensor's largest number is brought to [2^14, 2^15); float16 ends at 65504."""
FACTORS = (".lora_A.weight", ".lora_B.weight")


def wire_dtype(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ConfigError: none that factors can travel in.
    """
    if name not in DTYPES:
        raise ConfigError(f"factors travel as {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def narrowed(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors among an adapter's tensors in `dtype`; all others as they are.

    For float16 `x` becomes `round(x 2^-e)` with `e` in `<name>.exponent`, an int16, such that narrowing what was
    widened again gives the same bits.
    """
    if dtype == torch.float32:
        return dict(tensors)
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith(FACTORS):
            result[name] = tensor
        elif dtype == torch.bfloat16:
            result[name] = tensor.to(dtype)
        else:
            exponent = _exponent(tensor)
            result[name] = torch.ldexp(tensor, torch.tensor(-exponent)).to(dtype)
            result[name + EXPONENT] = torch.tensor([exponent], dtype=torch.int16)
    return result


def _exponent(tensor: Tensor) -> int:
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return 0
    exponent = math.frexp(largest)[1] - 1 - TOP
    rounded = float(torch.tensor(math.ldexp(largest, -exponent)).to(torch.float16))
    return exponent + (rounded >= 2 ** (TOP + 1))  # rounded up to the next power: it would be that one's next time


def widened(tensors: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> dict[str, Tensor]:
    """The inverse of `narrowed`, in float32.

    Raises:
        PayloadError: a factor in another dtype, or an exponent that is missing, no exponent, or no factor's; naming
            `name` and the tensor.
    """
    if dtype == torch.float32:
        return dict(tensors)
    result = {}
    for key, tensor in tensors.items():
        if key.endswith(EXPONENT):
            factor = key.removesuffix(EXPONENT)
            if dtype != torch.float16 or not factor.endswith(FACTORS) or factor not in tensors:
                raise PayloadError(f"{name}: tensor {key} is the exponent of no factor in float16")
            continue
        if not key.endswith(FACTORS):
            result[key] = tensor
            continue
        if tensor.dtype != dtype:
            raise PayloadError(f"{name}: tensor {key} has dtype {tensor.dtype}; wanted {dtype}")
        result[key] = tensor.to(torch.float32)
        if dtype == torch.float16:
            exponent = tensors.get(key + EXPONENT)
            if exponent is None or exponent.dtype != torch.int16 or exponent.shape != (1,) or abs(int(exponent)) > 200:
                raise PayloadError(f"{name}: tensor {key} has no exponent; wanted one int16 from -200 to 200")
            result[key] = torch.ldexp(result[key], exponent.to(torch.int32))
    return result


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """What the factors travel in."""
    return next((tensor.dtype for name, tensor in tensors.items() if name.endswith(FACTORS)), torch.float32)


def rounded(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter as it arrives at the other end."""
    if dtype == torch.float32:
        return adapter
    tensors = widened(narrowed(to_tensors(adapter), dtype), dtype, adapter.name)
    return from_tensors(tensors, like=adapter, name=adapter.name)


def rounding_error(before: Adapter, after: Adapter) -> float:
    """`||s (B A - B' A')|| / ||s B A||` over all modules, Frobenius; 0 where nothing is trained yet."""
    if after is before:
        return 0.0
    error = size = 0.0
    for module, matrix in before.modules.items():
        s = before.scalings[module]
        error += (s * difference(matrix, after.modules[module]).norm()) ** 2
        size += (s * matrix.norm()) ** 2
    return math.sqrt(error / size) if size > 0 else 0.0
