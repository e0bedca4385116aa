"""Isolation of local training's side effects: random generators, attention kernels, noise."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_layers import GradientCheckpointingLayer

from fedmomentum.base_model.devices import generator_devices
from fedmomentum.utils.modules import inner_model
from fedmomentum.utils.quantized import is_quantized

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


def train_without_noise(model: nn.Module) -> None:
    """Put a model in a mode in which training computes exactly what evaluation computes.

    In evaluation mode no part of a model applies dropout or other noise, whether a module of its
    own applies it or a function. Training mode is kept only where it has other effects: linear
    layers, in which it selects the kernels of quantized weights and lets Opacus' hooks run, and
    layers whose activations are recomputed, which then compute in evaluation mode.
    """
    model.eval()
    for module in model.modules():
        if type(module) is nn.Linear or is_quantized(module):
            module.training = True
        elif isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            layer: Any = module
            layer.training = True
            checkpoint = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = _NoiselessCheckpoint(layer, checkpoint)


@dataclass(frozen=True)
class _NoiselessCheckpoint:
    """A layer's checkpoint function that computes the layer in evaluation mode."""

    layer: nn.Module
    checkpoint: Callable[..., Any]

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        """Run the layer, which is run again in the backward pass."""

        def forward_without_noise(*args: Any) -> Any:
            self.layer.training = False
            try:
                return forward(*args)
            finally:
                self.layer.training = True

        return self.checkpoint(forward_without_noise, *args)


def _restore_checkpoints(model: nn.Module) -> None:
    """Undo what `train_without_noise` did to layers with gradient checkpointing."""
    module: Any
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _NoiselessCheckpoint):
            module._gradient_checkpointing_func = checkpoint.checkpoint


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
        _restore_checkpoints(model)
        if use_cache is not None:
            config.use_cache = use_cache
        if undo_checkpointing:
            inner_model(model).gradient_checkpointing_disable()
