"""The tokenizer of an export, and the tokens at which the exported model stops.

Training ends the answer to a chat with the special token that the chat template puts there, such as
``<|im_end|>``. The generation settings of many base models name another one. Stock `generate` would
then continue past the answer until it reaches its limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmomentum.base_model.checkpoint_files import read_config, read_json_object
from fedmomentum.data.tokenization import end_token_id
from fedmomentum.errors import DataError
from fedmomentum.utils.io import write_json

GENERATION_CONFIG = "generation_config.json"
CHAT = ({"role": "user", "content": "?"},)
PLAIN_TEXT = "?"


def copy_tokenizer(base_directory: Path, out: Path, tokenizer: Any = None) -> Any:
    """Write a tokenizer, by default the base model's, and return it."""
    from fedmomentum.base_model.loading import load_tokenizer

    if tokenizer is None:
        tokenizer = load_tokenizer(base_directory, generates=False)
    tokenizer.save_pretrained(out)
    return tokenizer


def find_stop_tokens(directory: Path, tokenizer: Any) -> list[int]:
    """Return the stop tokens that a model needs: those it has, and those that training writes.

    Args:
        directory: The model's directory.
        tokenizer: The tokenizer that its examples were written with.

    Returns:
        The token ids, the model's own first; empty if the model has all of them already.
    """
    own_ids = _own_stop_tokens(directory)
    missing_ids = [token for token in _trained_stop_tokens(tokenizer) if token not in own_ids]
    return [*own_ids, *missing_ids] if missing_ids else []


def write_stop_tokens(directory: Path, tokenizer: Any) -> None:
    """Add the stop tokens that are missing to the generation settings of an exported model."""
    token_ids = find_stop_tokens(directory, tokenizer)
    if not token_ids:
        return
    file = directory / GENERATION_CONFIG
    settings = read_json_object(file)
    # Some versions of transformers would otherwise rebuild the settings from config.json.
    settings.pop("_from_model_config", None)
    write_json(file, {**settings, "eos_token_id": token_ids})


def _own_stop_tokens(directory: Path) -> list[int]:
    """Return the stop tokens of a model's generation settings, or else of its configuration."""
    settings = read_json_object(directory / GENERATION_CONFIG)
    if "eos_token_id" not in settings:
        config = read_config(directory)
        # Image-text models keep the settings of their language model apart.
        settings = {**config.get("text_config", {}), **config}
    found = settings.get("eos_token_id")
    if found is None:
        return []
    return [int(token) for token in found] if isinstance(found, list) else [int(found)]


def _trained_stop_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that training puts after answers, to plain text and to chats."""
    token_ids = []
    for prompt in (PLAIN_TEXT, CHAT) if tokenizer.chat_template else (PLAIN_TEXT,):
        try:
            token = end_token_id(prompt, tokenizer)
        except DataError:
            # The tokenizer cannot write such examples, so the model was not trained on any.
            continue
        if token not in token_ids:
            token_ids.append(token)
    return token_ids
