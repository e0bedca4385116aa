"""Load the base model of a global model: a language model or a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.errors import AdapterError
from fedmomentum.formats.adapter_base import read_adapter_base

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.lora.adapter import Adapter


# The names that transformers gives to the last layer of its sequence classifiers.
OUTPUT_NAMES = ("score", "classifier", "out_proj", "summary", "logits_proj")
HEAD_NAMES = ("score", "classifier")
"""Attributes of a model that no causal language model of transformers has."""


def is_classifier(adapter: Adapter) -> bool:
    """Return whether an adapter is for a sequence classifier."""
    return adapter.config.get("task_type") == "SEQ_CLS"


def num_labels(model: GlobalModel) -> int | None:
    """Return the number of labels of a classifier; None for a language model.

    Raises:
        AdapterError: If its labels are not named, and its adapter saves no head that shows how many
            there are.
    """
    adapter = model.adapter
    if not is_classifier(adapter):
        return None
    if model.base.labels:
        return len(model.base.labels)
    for name, tensor in sorted(adapter.saved.items()):
        # Compare the whole name: DistilBERT's pre_classifier is not an output layer.
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module.rpartition(".")[2] in OUTPUT_NAMES:
            return int(tensor.shape[0])
    raise AdapterError("the adapter is of a sequence classifier but saves no classification head")


def base_of_adapter(directory: Path, adapter: Adapter) -> BaseIdentity:
    """Return the base model of an adapter's directory.

    An export of this package identifies it; for any other adapter only its name is known.

    Raises:
        AdapterError: If the file that identifies it is damaged.
    """
    base = read_adapter_base(directory)
    if base is not None:
        return BaseIdentity.of(base)
    name = str(adapter.config.get("base_model_name_or_path") or "")
    return BaseIdentity(name, adapter.config.get("revision"))


def load_base_for(
    model: GlobalModel, directory: Path, dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """Load the base model of a global model.

    A run's classifier has the head that training started from. If adapters were combined without
    their base, its head is unknown, and the adapter's takes its place.

    Args:
        model: The global model.
        directory: The base model's directory.
        dtype: The dtype of the weights; see `load_base`.
        device: The device of the weights.

    Raises:
        AdapterError: If the adapter is for a classifier but saves no head, or saves one and has no
            task type.
        ModelError: If the base model cannot be loaded.
    """
    # Importing transformers takes seconds, and `fedmomentum inspect` loads no model.
    from fedmomentum.base_model.classifier import set_pad_token
    from fedmomentum.base_model.loading import load_base, load_tokenizer
    from fedmomentum.base_model.streamed import load_parameters

    adapter = model.adapter
    _check_task_type(adapter)
    # Modules trained in full, whose tensors the adapter holds, are not quantized.
    trained = {name.rpartition(".")[0] for name in adapter.saved}
    how: dict[str, Any] = {"quantization": model.base.quantization, "trained": trained}
    # Only a run knows the names of its labels.
    if model.base.labels:
        base = load_base(directory, dtype, device, labels=model.base.labels, **how)
    else:
        base = load_base(
            directory,
            dtype,
            device,
            num_labels=num_labels(model),
            supplied=adapter.saved.keys(),
            **how,
        )
    # Tables with more rows in the adapter, for added tokens, are resized in place.
    load_parameters(base, _resized(base, adapter))
    if is_classifier(adapter):
        set_pad_token(base, load_tokenizer(directory, generates=False))
    return base


def _check_task_type(adapter: Adapter) -> None:
    """Refuse an adapter with a classification head but without a task type, which PEFT allows."""
    if adapter.config.get("task_type") is not None:
        return
    for name in sorted(adapter.saved):
        if name.partition(".")[0] in HEAD_NAMES:
            raise AdapterError(
                f"{adapter.name} saves {name}, a classification head, but its "
                "adapter_config.json has no task_type, and so it would be used with a language "
                'model; set "task_type": "SEQ_CLS" there if it is for a sequence classifier'
            )


def _resized(base: PreTrainedModel, adapter: Adapter) -> list[str]:
    """Return the base's parameters for which the adapter saves a tensor of another shape."""
    names = []
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if name in adapter.saved and adapter.saved[name].shape != parameter.shape:
            names.append(name)
    return names
