"""A base model without weights, for planning: the modules that a configuration describes.

Its tensors have shapes but no memory (torch's fake tensors). Unlike on the meta device, most
decisions that depend on tensor values are made as if the model were being traced, so nearly all
architectures run.
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
        model: The model, in eval mode; use it only within `active`, except for its shapes.
        build: Builds the same model again in another dtype.
    """

    model: PreTrainedModel
    build: Callable[[torch.dtype], Skeleton] = field(repr=False)
    _mode: Any = field(repr=False)

    @classmethod
    def of(cls, make: Callable[[torch.dtype], Any], dtype: torch.dtype) -> Skeleton:
        """Build the model that `make` returns for a dtype, without memory."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode(allow_non_fake_inputs=True)
        # Even random weights without memory advance the global generator.
        with torch.random.fork_rng(devices=[]), _without_memory(mode):
            model = make(dtype).eval()
        return cls(model, lambda other: cls.of(make, other), mode)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Create new tensors within the block without memory too."""
        with _without_memory(self._mode):
            yield


def load_skeleton(directory: Path, labels: Sequence[str] = (), attention: str = "auto") -> Skeleton:
    """Return a directory's model without weights, in bfloat16, reading only JSON files.

    Args:
        directory: The model's directory; it need not contain weights.
        labels: If given, build a sequence classifier with these labels.
        attention: See `set_attention`; `eager` and `sdpa` are built, others use the model's choice.

    Raises:
        ModelError: If the directory's contents are not supported.
        Exception: Whatever transformers raises if it cannot build the model, or cannot build it
            without tensor values.
    """
    refuse_unusable(directory, is_classifier=bool(labels))
    if not read_config(directory):
        raise ModelError(f"no config.json in {directory}; give the directory of a base model")
    auto_class = AutoModelForSequenceClassification if labels else text_class(directory)
    options: dict[str, Any] = label_arguments(labels) if labels else {}
    # Other fused kernels save the same activations as torch's own.
    if attention in ("eager", "sdpa"):
        options["attn_implementation"] = attention

    def make(dtype: torch.dtype) -> Any:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
        # Use the shapes of the weights that the codes represent.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return auto_class.from_config(config, dtype=dtype, trust_remote_code=False)

    # Use 16 bits, because kernels of experts are traced in 16 bits.
    return Skeleton.of(make, torch.bfloat16)


@contextmanager
def _without_memory(mode: Any) -> Iterator[None]:
    """Enter torch's mode; failures in it are raised, without also logging their traceback."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        with mode:
            yield
    finally:
        logger.disabled = was_disabled
