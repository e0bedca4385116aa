"""A base model without weights: the modules that a configuration stands for, to plan with.

Its tensors have shapes and no memory (torch's fake tensors). Unlike on the meta device, what a
model decides by the values of its tensors is mostly decided as if it were being traced, so nearly
all architectures run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from fedmomentum.base_model.checkpoint_files import read_config, refuse_unusable
from fedmomentum.base_model.classifier import label_arguments
from fedmomentum.base_model.loading import text_class
from fedmomentum.errors import ModelError


@dataclass(frozen=True)
class Skeleton:
    """A base model whose tensors have no memory.

    Attributes:
        model: The model, in eval mode; use it within `active` only, except for its shapes.
        build: Makes the same model again in another dtype.
    """

    model: PreTrainedModel
    build: Callable[[torch.dtype], Skeleton] = field(repr=False)
    _mode: Any = field(repr=False)

    @classmethod
    def of(cls, make: Callable[[torch.dtype], Any], dtype: torch.dtype) -> Skeleton:
        """Return what a function makes in a dtype, without memory."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        # Even random weights that need no memory are drawn from the global generator.
        with torch.random.fork_rng(devices=[]), _without_memory(mode):
            model = make(dtype).eval()
        return cls(model, lambda other: cls.of(make, other), mode)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Have new tensors, within the block, be without memory too."""
        with _without_memory(self._mode):
            yield


def load_skeleton(directory: Path, labels: Sequence[str] = (), attention: str = "auto") -> Skeleton:
    """Return the model of a directory without weights, in bfloat16; only its config.json is read.

    Args:
        directory: The model's directory; it need not hold weights.
        labels: If given, a sequence classifier with these labels.
        attention: See `load_base`; what is not fused is counted as it is.

    Raises:
        ModelError: If the directory holds what is not supported.
        Exception: Whatever transformers raises where it cannot make the model, or cannot make it
            without the values of its tensors.
    """
    refuse_unusable(directory, is_classifier=bool(labels))
    if not read_config(directory):
        raise ModelError(f"no config.json in {directory}; give the directory of a base model")
    auto_class = AutoModelForSequenceClassification if labels else text_class(directory)
    options: dict[str, Any] = label_arguments(labels) if labels else {}
    # Fused kernels keep what torch's own does.
    if attention in ("eager", "sdpa"):
        options["attn_implementation"] = attention

    def make(dtype: torch.dtype) -> Any:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
        # The shapes are those of the weights that the codes stand for.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return auto_class.from_config(config, dtype=dtype, trust_remote_code=False)

    # In 16 bits, in which the kernels of experts are traced.
    return Skeleton.of(make, torch.bfloat16)


@contextmanager
def _without_memory(mode: Any) -> Iterator[None]:
    """Enter torch's mode; what fails in it is raised, and not logged with its traceback as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with mode:
            yield
    finally:
        logger.disabled = was_disabled
