"""`LoadedBase`: a process's base model, for all adapters that it trains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.attention import set_attention
from fedmomentum.base_model.classifier import set_pad_token
from fedmomentum.base_model.devices import pick_device, pick_dtype, set_up_device
from fedmomentum.base_model.hub import resolve_base
from fedmomentum.base_model.identity import BaseIdentity, identify
from fedmomentum.base_model.load_checks import vocabulary_size
from fedmomentum.base_model.loading import load_base, load_tokenizer
from fedmomentum.base_model.padding_checks import refuse_padding_dependent_classifier
from fedmomentum.base_model.quantization import ON_LOADING
from fedmomentum.utils.chat_date import set_chat_date
from fedmomentum.utils.quantized import shared_with_copies

if TYPE_CHECKING:
    from fedmomentum.config.schema import ModelConfig


@dataclass(frozen=True)
class LoadedBase:
    """A loaded base model, for one `LocalModel` or shared by several in one process.

    Attributes:
        directory: The directory that it was loaded from.
        identity: Its name, content hashes and labels.
        tokenizer: Its tokenizer.
        model: The transformers model, which must not change while it is shared.
    """

    directory: Path
    identity: BaseIdentity
    tokenizer: Any
    model: Any = field(repr=False)

    @classmethod
    def from_config(
        cls, model: ModelConfig, labels: Sequence[str] = (), trained: Sequence[str] = ()
    ) -> LoadedBase:
        """Find, identify and load the base model of a configuration.

        Args:
            model: The section [model] of the configuration.
            labels: If given, load a sequence classifier with these labels.
            trained: Names of the fully trained modules.

        Raises:
            ModelError: If it cannot be found or loaded.
        """
        directory = resolve_base(model.name, model.revision)
        device = pick_device(model.device)
        set_up_device(device, tf32=model.tf32)
        identity = identify_base(model, directory, labels)
        base = load_base(
            directory,
            pick_dtype(model.dtype, device),
            device,
            labels=labels,
            quantization=identity.quantization,
            trained=trained,
        )
        set_attention(base, model.attention)
        tokenizer = load_tokenizer(directory, vocabulary_size(base), generates=not labels)
        set_chat_date(tokenizer, model.chat_date)
        if labels:
            set_pad_token(base, tokenizer)
            refuse_padding_dependent_classifier(directory, base)
        return cls(directory, identity, tokenizer, base)

    def copy(self) -> Any:
        """Return a copy with its own modules but the same tensors, to attach an adapter to."""
        shared = [*self.model.parameters(), *self.model.buffers()]
        shared += shared_with_copies(self.model)
        return copy.deepcopy(self.model, {id(item): item for item in shared})


def identify_base(model: ModelConfig, directory: Path, labels: Sequence[str]) -> BaseIdentity:
    """Return the identity of the base model of a configuration.

    Args:
        model: The section [model] of the configuration.
        directory: The base model's directory.
        labels: The labels of a classifier; empty for a language model.

    Raises:
        ModelError: If there are no weights, or they cannot be read.
    """
    quantization = ON_LOADING.get(model.quantization)
    identity = identify(model.name, directory, model.revision, quantization)
    return replace(identity, labels=tuple(labels))
