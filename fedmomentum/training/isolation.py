"""Isolation of local training's side effects: random generators, attention kernels, dropout."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedmomentum.base_model.devices import generator_devices
from fedmomentum.utils.modules import inner_model

MAX_MATH_SDPA_TOKENS = 128
"""Row length, in tokens, up to which torch's plain attention is faster in 16 bits on a CPU.

Measured in docs/appendix/performance.md.
"""


def sdpa_backend_for(model: nn.Module, longest: int) -> AbstractContextManager[Any]:
    """Select torch's attention kernel for training on rows of at most ``longest`` tokens.

    On a CPU in 16 bits, for short rows, the backward pass of torch's flash attention costs more
    than the score matrix that it saves. The plain kernel computes in float32, and keeps
    ``longest ** 2`` scores per head. In all other cases torch chooses. Models with their own
    attention implementation are not affected.
    """
    is_short = longest <= MAX_MATH_SDPA_TOKENS
    on_cpu = next(model.parameters()).device.type == "cpu"
    if not (is_short and on_cpu):
        return nullcontext()
    is_16_bit = any(parameter.dtype.itemsize < 4 for parameter in model.parameters())
    return sdpa_kernel(SDPBackend.MATH) if is_16_bit else nullcontext()


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Disable a model's dropout within the block, even in training mode.

    A reference model is evaluated without dropout; with it, the model would differ by noise.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    rates = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, rate in zip(layers, rates, strict=True):
            layer.p = rate


def _generators_restored(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's generators afterward: the CPU's, and that of the model's device."""
    indices = generator_devices(device)
    # Without indices the type does not matter, but before torch 2.13 it must be a valid one.
    return torch.random.fork_rng(indices, device_type=device.type if indices else "cuda")


def _current_device(device: torch.device) -> AbstractContextManager[None]:
    """Make libraries launch their kernels on the model's GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def global_state_restored(model: nn.Module, *, undo_checkpointing: bool) -> Iterator[None]:
    """Undo a trainer's side effects: seeded global generators, the model's mode and configuration.

    Args:
        model: The model that is trained.
        undo_checkpointing: Whether training enables gradient checkpointing.
    """
    was_training = model.training
    device = next(model.parameters()).device
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        with _generators_restored(device), _current_device(device):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        model.train(was_training)
        if use_cache is not None:
            config.use_cache = use_cache
        if undo_checkpointing:
            inner_model(model).gradient_checkpointing_disable()
