"""The tokenizer of a result: the base model's, or that in an adapter's directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.loading import load_tokenizer
from fedmomentum.formats.directories import ADAPTER_CONFIG
from fedmomentum.global_model.base_loading import is_classifier

if TYPE_CHECKING:
    from fedmomentum.run.saved_model import Result

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)
CHAT_TEMPLATE = "chat_template.jinja"


def tokenizer_of(result: Result, directory: Path, vocabulary: int | None = None) -> Any:
    """Load the tokenizer of a result: its own, or the base model's.

    Args:
        result: The result.
        directory: The base model's directory.
        vocabulary: The number of tokens that the base model embeds, if known.

    Raises:
        ModelError: If transformers cannot load it.
    """
    own = own_tokenizer(result, directory, vocabulary)
    if own is not None:
        return own
    generates = not is_classifier(result.model.adapter)
    return load_tokenizer(directory, vocabulary, generates=generates)


def own_tokenizer(result: Result, directory: Path, vocabulary: int | None = None) -> Any:
    """Load the tokenizer in an adapter's directory, or the base's with the adapter's template.

    Args:
        result: The result.
        directory: The base model's directory.
        vocabulary: The number of tokens that the base model embeds, if known.

    Returns:
        The tokenizer; None if the result has none of its own.

    Raises:
        ModelError: If transformers cannot load it.
    """
    own = result.path
    generates = not is_classifier(result.model.adapter)
    if not (own / ADAPTER_CONFIG).is_file():
        return None
    if any((own / name).is_file() for name in TOKENIZER_FILES):
        # Tokens may have been added, with new rows in embedding tables that are trained in full.
        tables = [
            tensor.shape[0] for tensor in result.model.adapter.saved.values() if tensor.ndim == 2
        ]
        largest = max([vocabulary, *tables]) if vocabulary is not None else None
        return load_tokenizer(own, largest, generates=generates)
    if (own / CHAT_TEMPLATE).is_file():
        tokenizer = load_tokenizer(directory, vocabulary, generates=generates)
        tokenizer.chat_template = (own / CHAT_TEMPLATE).read_text(encoding="utf-8")
        return tokenizer
    return None
