"""The head of a sequence classifier: which tensors belong to it, and how they are initialized.

A checkpoint of a language model or an encoder has no head for the user's labels. transformers would
initialize one from the global random generator; here the seeds depend only on the names of the
head's tensors, so that it is the same for every party, on every machine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmomentum.base_model.checkpoint_files import read_config, stored_tensors
from fedmomentum.errors import ModelError
from fedmomentum.utils.seeding import module_seed
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


LOG = logging.getLogger("fedmomentum")
DEFAULT_STD = 0.02
"""Standard deviation of a fresh weight if the model has no `initializer_range`."""
# BERT pools its first token inside the encoder; encoders trained differently lack that layer.
_POOLER = re.compile(r"(^|\.)pooler\.")


# ── labels ────────────────────────────────────────────────────────────────────────────────────────


def stored_labels(directory: Path) -> tuple[str, ...]:
    """Return the labels of a checkpoint's own head, in its order; empty if it has none.

    Raises:
        ModelError: If `config.json` is not a JSON object.
    """
    config = read_config(directory)
    architectures = config.get("architectures")
    names = config.get("id2label")
    is_classifier = isinstance(architectures, list) and any(
        str(name).endswith("ForSequenceClassification") for name in architectures
    )
    if not is_classifier or not isinstance(names, dict):
        return ()
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError:
        return ()


def label_arguments(labels: Sequence[str]) -> dict[str, Any]:
    """Return the transformers arguments that give a classifier these labels, in this order."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def order_labels(directory: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """Return labels in the order of the checkpoint's own head, if it has exactly these."""
    stored = stored_labels(directory)
    return stored if sorted(stored) == sorted(labels) else tuple(labels)


def check_label_order(directory: Path, labels: Sequence[str]) -> None:
    """Reject the labels of the checkpoint's own head if their order differs from its outputs'.

    Raises:
        ModelError: If the order differs.
    """
    ordered = order_labels(directory, labels)
    if ordered != tuple(labels):
        shown = ", ".join(printable(repr(label), 60) for label in ordered[:20])
        raise ModelError(
            f"the head in {directory} has these labels in another order than model.labels: {shown}"
            "; give them in this order, or leave model.labels out"
        )


def refuse_other_classifiers(directory: Path, model: Any) -> None:
    """Reject classifiers whose head cannot be told apart, or that have no token embeddings.

    Raises:
        ModelError: If the model is one of them.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{directory} is an encoder with a decoder ({kind}); classifiers are supported on "
            "encoders (BERT, RoBERTa, DeBERTa, ...) and on decoders (Llama, Qwen, ...)"
        )
    if not isinstance(getattr(model, model.base_model_prefix, None), nn.Module):
        raise ModelError(
            f"{directory}: {kind} has no part {model.base_model_prefix!r}, so its head cannot be "
            "distinguished from what is pretrained; this classifier is not supported"
        )
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        raise ModelError(
            f"{directory}: {kind} has no table of token embeddings; supported are classifiers that "
            "look up tokens in one"
        ) from None


# ── tensors ───────────────────────────────────────────────────────────────────────────────────────


def is_head(name: str, model: Any) -> bool:
    """Return whether a parameter belongs to the head: outside the encoder or decoder, or pooler."""
    prefix = f"{model.base_model_prefix}."
    return not name.startswith(prefix) or bool(_POOLER.search(name))


def head_modules(model: Any, directory: Path) -> list[str]:
    """Return the paths of the modules to train in full for a classifier.

    These are all modules outside the encoder or decoder: `score`, `classifier`, DistilBERT's
    `pre_classifier`, DeBERTa's `pooler`, ModernBERT's `head`; and a pooling layer inside it, unless
    the checkpoint contains one.

    Args:
        model: The classifier as loaded by transformers.
        directory: The checkpoint's directory.
    """
    # Outside the encoder or decoder: everything with parameters.
    modules = []
    for name, module in model.named_children():
        if name != model.base_model_prefix and list(module.parameters()):
            modules.append(name)
    # Inside it: an untrained pooling layer.
    has_pooler = any(_POOLER.search(name) for name in stored_tensors(directory))
    body = getattr(model, model.base_model_prefix, None)
    if getattr(body, "pooler", None) is not None and not has_pooler:
        modules.append(f"{model.base_model_prefix}.pooler")
    return sorted(modules)


def is_other_head(name: str, model: Any, stored: Iterable[str]) -> bool:
    """Return whether a stored tensor that the model does not use belongs to another kind of head.

    Checkpoints of language models and encoders contain the head that they were trained with, which
    a classifier does not use.
    """
    if _POOLER.search(name) or re.search(r"(^|\.)(lm_head|embed_out)\.", name):
        return True
    prefix = f"{model.base_model_prefix}."
    return any(other.startswith(prefix) for other in stored) and not name.startswith(prefix)


def initialize_head(
    model: PreTrainedModel, fresh: Iterable[str], directory: Path, labels: Sequence[str]
) -> None:
    """Initialize the head's tensors that the checkpoint does not contain for these labels.

    Weights are normal with the model's `initializer_range`, biases 0, norm scales 1. A stored head
    with the same number of different labels is not reused: its outputs mean something else.

    Args:
        model: The classifier.
        fresh: Names of the tensors that the checkpoint does not contain in the model's shape.
        directory: The checkpoint's directory.
        labels: The labels, in the order of the head's outputs.
    """
    # What the checkpoint lacks, or has for other labels.
    names = set(fresh)
    if stored_labels(directory) != tuple(labels):
        outputs = set(_outputs(model, len(labels)))
        if outputs - names:
            LOG.warning(
                "the head in %s is for other labels, or does not name them: training starts from a "
                "fresh one",
                directory,
            )
        names |= outputs
    # Each tensor has its own generator, seeded by the tensor's name.
    std = float(getattr(model.config.get_text_config(), "initializer_range", 0) or DEFAULT_STD)
    with torch.no_grad():
        for name in sorted(names):
            parameter = model.get_parameter(name)
            parameter.copy_(_fresh_tensor(name, parameter, std))


def _outputs(model: Any, num_labels: int) -> Iterator[str]:
    """Yield the names of the head's tensors with one row for each label."""
    for name, parameter in model.named_parameters():
        if is_head(name, model) and parameter.shape[0] == num_labels:
            yield name


def _fresh_tensor(name: str, like: Tensor, std: float) -> Tensor:
    """Return a tensor's initial value, sampled on the CPU in float64."""
    if like.ndim < 2:
        return torch.full_like(like, 0.0 if name.endswith("bias") else 1.0)
    generator = torch.Generator().manual_seed(module_seed(0, 0, name))
    return std * torch.randn(like.shape, generator=generator, dtype=torch.float64)


# ── padding ───────────────────────────────────────────────────────────────────────────────────────


def set_pad_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a classifier's pad token to the tokenizer's, in its configuration.

    A decoder's score head reads the last non-pad token. Exports keep the setting.

    Raises:
        ModelError: If there is no pad token, or it differs from that of an encoder, which counts
            positions by it.
    """
    pad = tokenizer.pad_token_id
    if pad is None:
        raise ModelError(
            f"the tokenizer of {type(model).__name__} has neither a pad token nor an end token; "
            "texts of different lengths need one. Add it to tokenizer_config.json"
        )
    config = model.config.get_text_config()
    previous = config.pad_token_id
    if previous not in (None, pad) and not hasattr(model, "score"):
        raise ModelError(
            f"the tokenizer pads with token {pad}, and {type(model).__name__} was made for "
            f"{previous}; correct pad_token_id in config.json, or the tokenizer"
        )
    config.pad_token_id = pad
    model.config.pad_token_id = pad
