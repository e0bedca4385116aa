"""A model's device and the dtype it computes in: choice, checks and setup."""

from __future__ import annotations

import torch

from fedmomentum.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str) -> torch.device:
    """Return the named device; for `auto`, the current GPU if torch finds one, else the CPU.

    Raises:
        ModelError: If torch does not know or find the device, or it cannot hold weights.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Resolve the index: `cuda` is whichever GPU is current.
        chosen = torch.empty(0, device=torch.device(device)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    if chosen.type == "meta":
        raise ModelError("device 'meta' holds no weights; choose auto, cpu, cuda, cuda:1, ...")
    return chosen


def find_device(name: str) -> torch.device | None:
    """Return the named device without initializing it, which takes memory; None if unavailable.

    Raises:
        ModelError: If torch does not know the device, or it cannot hold weights.
    """
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return device
        num_devices = torch.get_device_module(device.type).device_count()
    except (RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device {name!r} cannot be used: {reason}") from error
    return device if (device.index or 0) < num_devices else None


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the named dtype; for `auto`, bfloat16 if the hardware multiplies in it, else float32.

    Raises:
        ModelError: If it is not the name of a supported dtype.
    """
    if dtype == "auto":
        return torch.float32 if emulates_bfloat16(device) else torch.bfloat16
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}; choose auto, float32, bfloat16 or float16")
    return DTYPES[dtype]


def emulates_bfloat16(device: torch.device) -> bool:
    """Return whether products in bfloat16 may be emulated on a device, as far as torch knows.

    They then take longer than in float32: seven to nine times as long on a CPU with AVX2 only.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return not torch.cuda.is_bf16_supported(including_emulation=False)
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def set_up_device(device: torch.device, *, tf32: bool) -> None:
    """Prepare this process to compute on a device.

    A GPU becomes the current device, the default for libraries that do not choose one themselves;
    from then on, `tf32` determines whether float32 matrices are multiplied in TF32.

    Args:
        device: As `pick_device` returns it.
        tf32: Whether a GPU may round the factors of float32 products to 10 bits.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def rounds_to_tf32(device: torch.device) -> bool:
    """Return whether float32 products on a device are computed in TF32."""
    return device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"


def generator_devices(device: torch.device) -> list[int]:
    """Return the GPU whose random generator a model on this device uses; empty for the CPU.

    For `torch.random.fork_rng`, which otherwise creates a context of a few hundred MB on every GPU.
    """
    if device.type not in ("cuda", "xpu"):
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
