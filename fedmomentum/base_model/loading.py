"""Loading of a base model and its tokenizer, without remote code and without random weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from fedmomentum.base_model.checkpoint_files import read_config, read_json_object, refuse_unusable
from fedmomentum.base_model.classifier import (
    check_label_order,
    initialize_head,
    is_head,
    label_arguments,
    refuse_other_classifiers,
)
from fedmomentum.base_model.devices import pick_dtype
from fedmomentum.base_model.library_errors import translate_library_errors, translate_out_of_memory
from fedmomentum.base_model.load_checks import LoadingInfo, refuse_incomplete, refuse_other_kinds
from fedmomentum.base_model.padding_checks import refuse_padding_dependence
from fedmomentum.base_model.quantization import (
    ON_LOADING,
    check_quantization,
    prepare_layers,
    quantizing_arguments,
    refuse_quantized_head,
)
from fedmomentum.base_model.stored_dtypes import stored_dtypes_kept
from fedmomentum.base_model.streamed import stream_parameters
from fedmomentum.errors import ModelError

if TYPE_CHECKING:
    from fedmomentum.formats.manifest import Quantization


def pick_merged_dtype(dtype: str) -> torch.dtype:
    """Return the dtype of a merged model's weights on disk.

    Raises:
        ModelError: If it does not name a dtype, or names quantized weights.
    """
    if dtype in ON_LOADING:
        raise ModelError(
            f"dtype {dtype!r}: a merged model is not quantized, since what was trained is smaller "
            "than the step between two codes and would be rounded away. Choose float32, bfloat16 "
            "or float16; or export one adapter (--to adapter) for the quantized base"
        )
    return pick_dtype(dtype, torch.device("cpu"))


def load_base(
    directory: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    num_labels: int | None = None,
    labels: Sequence[str] = (),
    supplied: Collection[str] = (),
    quantization: Quantization | None = None,
    trained: Collection[str] = (),
) -> PreTrainedModel:
    """Load the model in a directory, in eval mode, with every weight from the checkpoint.

    Models that transformers would load with random or omitted weights are rejected, and so are
    models other than causal language models. A classifier with named labels has a head that is the
    same for every party; see `classifier`. Linear layers are quantized if the directory's are, or
    if `quantization` requests it; see the module `quantization`.

    Args:
        directory: As written by `save_pretrained`.
        dtype: The dtype of the weights, or the compute dtype of quantized ones. None: float32, but
            weights that are not quantized stay in their files and become float32 tensors only while
            in use; see `streamed`.
        device: The device of the weights.
        num_labels: If given, load a sequence classifier with this many labels instead of a causal
            language model.
        labels: If given, load a sequence classifier with these labels.
        supplied: Names of tensors that the caller sets afterward, so that the checkpoint need not
            contain them.
        quantization: How to quantize the weights of linear layers; None to leave them as stored.
        trained: Names of the fully trained modules, which are never quantized.

    Raises:
        ModelError: If transformers cannot load it, or would load something other than the
            checkpoint's contents; or if it cannot be quantized this way on this machine.
    """
    is_classifier = bool(labels) or num_labels is not None
    refuse_unusable(directory, is_classifier=is_classifier)
    kind = check_quantization(directory, quantization, device)
    auto_class = AutoModelForSequenceClassification if is_classifier else text_class(directory)
    head_arguments: dict[str, Any] = {"num_labels": num_labels} if is_classifier else {}
    if labels:
        check_label_order(directory, labels)
        head_arguments = label_arguments(labels)
    what = f"{auto_class.__name__} cannot load a model from {directory}"
    is_streamed = dtype is None and kind is None
    dtype = dtype or torch.float32
    kept = stored_dtypes_kept(directory, is_classifier=is_classifier)
    with (
        kept if is_streamed else nullcontext(),
        translate_library_errors(what, read_config(directory)),
    ):
        arguments: dict[str, Any] = {"dtype": dtype}
        if kind is not None:
            # Quantize or unpack weights directly on the device that will hold them.
            arguments["device_map"] = {"": device}
        if quantization is not None:
            arguments |= quantizing_arguments(
                directory, quantization, auto_class, head_arguments, trained
            )
        model, info = auto_class.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
            **head_arguments,
        )
    if kind is not None:
        prepare_layers(directory, model, kind, quantization, dtype)
        if is_classifier:
            refuse_quantized_head(directory, model)
    loading = LoadingInfo.of(info)
    if labels:
        # Only a head may be missing; anything else makes the checkpoint incomplete.
        refuse_other_classifiers(directory, model)
        names = loading.missing.union(name for name, _, _ in loading.mismatched)
        fresh = {name for name in names if is_head(name, model)}
        initialize_head(model, fresh, directory, labels)
        supplied = fresh.union(supplied)
    with translate_out_of_memory(f"the model in {directory} does not fit on {device}"):
        if is_streamed:
            stream_parameters(model, device)
        refuse_incomplete(directory, model, loading, supplied, is_classifier=is_classifier)
        placed: PreTrainedModel = (model if is_streamed or kind else model.to(device)).eval()
    if not is_classifier:
        refuse_other_kinds(directory, placed)
        refuse_padding_dependence(directory, placed)
    return placed


def text_class(directory: Path) -> Any:
    """Return the auto class that loads a language model, or the whole of an image-text model.

    `AutoModelForCausalLM` would load only the language model of the latter, and drop the rest.
    """
    declared = set(read_config(directory).get("architectures") or ())
    has_images = declared & set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    is_language_model = declared & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if has_images and not is_language_model:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_tokenizer(
    directory: Path, vocabulary: int | None = None, *, generates: bool = True
) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a directory.

    If the pad token is missing or outside the model's vocabulary, the end token is used instead:
    padding is masked, so any token that the model can embed will do.

    Args:
        directory: The directory.
        vocabulary: The number of tokens that the model embeds, if known; see `vocabulary_size`.
        generates: Whether the model generates text, which needs an end token.

    Raises:
        ModelError: If there is no tokenizer, or it lacks an end token but needs one.
    """
    configs = [read_json_object(directory / "tokenizer_config.json"), read_config(directory)]
    config_with_code = next((config for config in configs if config.get("auto_map")), {})
    what = f"transformers cannot load a tokenizer from {directory}"
    with translate_library_errors(what, config_with_code):
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    if tokenizer.eos_token_id is None and generates:
        raise ModelError(
            f"the tokenizer in {directory} has no end token (eos_token), so generation could not "
            "end"
        )
    pad = tokenizer.pad_token_id
    is_unusable = pad is None or (vocabulary is not None and pad >= vocabulary)
    if is_unusable and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tied_names(model: nn.Module) -> dict[str, set[str]]:
    """Return, for every name of a tied parameter, its other names."""
    names_by_tensor: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_tensor.setdefault(id(parameter), set()).add(name)
    tied = {}
    for names in names_by_tensor.values():
        if len(names) > 1:
            for name in names:
                tied[name] = names - {name}
    return tied
