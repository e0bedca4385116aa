"""16-bit encoding of an adapter's factors for transmission to and from the server. torch only.

float16 has a narrow exponent range and LoRA's factors are small, so each tensor is first multiplied
by a power of two, which is lossless, and the exponent is sent along. bfloat16 has float32's
exponent range but fewer digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedmomentum.errors import ConfigError, PayloadError
from fedmomentum.linalg.low_rank import difference
from fedmomentum.lora.adapter import Adapter, from_tensors, to_tensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXPONENT = ".exponent"
# A tensor's largest element is scaled into [2^14, 2^15); float16 ends at 65504.
TARGET_EXPONENT = 14
# The exponents of float32 do not go beyond 149.
MAX_EXPONENT = 200
FACTORS = (".lora_A.weight", ".lora_B.weight")


def wire_dtype(name: str) -> torch.dtype:
    """Return the dtype with the given name.

    Raises:
        ConfigError: If factors cannot be sent in it.
    """
    if name not in DTYPES:
        raise ConfigError(f"factors travel as {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def encode_factors(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return an adapter's tensors with its factors in `dtype`; other tensors are unchanged.

    For float16, a factor `x` becomes `round(x 2^-e)`, with `e` stored in `<name>.exponent` as an
    int16. It is chosen so that decoding and encoding again reproduces the same bits.
    """
    if dtype == torch.float32:
        return dict(tensors)
    encoded = {}
    for name, tensor in tensors.items():
        if not name.endswith(FACTORS):
            encoded[name] = tensor
        elif dtype == torch.bfloat16:
            encoded[name] = tensor.to(dtype)
        else:
            exponent = _exponent(tensor)
            encoded[name] = torch.ldexp(tensor, torch.tensor(-exponent)).to(dtype)
            encoded[name + EXPONENT] = torch.tensor([exponent], dtype=torch.int16)
    return encoded


def _exponent(tensor: Tensor) -> int:
    """Return the exponent that scales the largest element to `TARGET_EXPONENT`."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return 0
    exponent = math.frexp(largest)[1] - 1 - TARGET_EXPONENT
    # If rounding reaches the next power of two, encoding again would yield a larger exponent.
    rounded = float(torch.tensor(math.ldexp(largest, -exponent)).to(torch.float16))
    return exponent + int(rounded >= 2 ** (TARGET_EXPONENT + 1))


def decode_factors(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, name: str
) -> dict[str, Tensor]:
    """Decode the output of `encode_factors`, with factors in float32.

    Args:
        tensors: The encoded tensors.
        dtype: The dtype in which factors are sent.
        name: The sender's name in messages.

    Raises:
        PayloadError: If a factor has a different dtype, or if an exponent is missing, is invalid,
            or belongs to no factor.
    """
    if dtype == torch.float32:
        return dict(tensors)
    decoded = {}
    for key, tensor in tensors.items():
        if key.endswith(EXPONENT):
            factor = key.removesuffix(EXPONENT)
            if dtype != torch.float16 or not factor.endswith(FACTORS) or factor not in tensors:
                raise PayloadError(f"{name}: tensor {key} is the exponent of no factor in float16")
        elif not key.endswith(FACTORS):
            decoded[key] = tensor
        elif tensor.dtype != dtype:
            raise PayloadError(f"{name}: tensor {key} has dtype {tensor.dtype}; wanted {dtype}")
        else:
            decoded[key] = tensor.to(torch.float32)
            if dtype == torch.float16:
                exponent = _check_exponent(tensors.get(key + EXPONENT), f"{name}: tensor {key}")
                decoded[key] = torch.ldexp(decoded[key], exponent.to(torch.int32))
    return decoded


def _check_exponent(exponent: Tensor | None, name: str) -> Tensor:
    is_valid = (
        exponent is not None
        and exponent.dtype == torch.int16
        and exponent.shape == (1,)
        and abs(int(exponent)) <= MAX_EXPONENT
    )
    if exponent is None or not is_valid:
        raise PayloadError(
            f"{name} has no exponent; wanted one int16 from -{MAX_EXPONENT} to {MAX_EXPONENT}"
        )
    return exponent


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype in which the factors are sent; float32 if there are none."""
    factors = (tensor.dtype for name, tensor in tensors.items() if name.endswith(FACTORS))
    return next(factors, torch.float32)


def roundtrip(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """Return the adapter as the receiver will decode it; the same object for float32."""
    if dtype == torch.float32:
        return adapter
    encoded = encode_factors(to_tensors(adapter), dtype)
    tensors = decode_factors(encoded, dtype, adapter.name)
    return from_tensors(tensors, like=adapter, name=adapter.name)


def rounding_error(before: Adapter, after: Adapter) -> float:
    """Return `||s (B A - B' A')|| / ||s B A||` over all modules, Frobenius; 0 if B A is zero."""
    if after is before:
        return 0.0
    error = 0.0
    size = 0.0
    for module, matrix in before.modules.items():
        scaling = before.scalings[module]
        error += (scaling * difference(matrix, after.modules[module]).norm()) ** 2
        size += (scaling * matrix.norm()) ** 2
    return math.sqrt(error / size) if size > 0 else 0.0
