"""From the name of a base model to its directory."""

from __future__ import annotations

from pathlib import Path

from fedmomentum.base_model.bundled import bundled_model_directory
from fedmomentum.errors import HubError, ModelError
from fedmomentum.utils.hub import HubName, download, split_revision

BUNDLED_NAME = "smollm2-135m-instruct"
# Files to download: weights, configurations, tokenizer and chat template, but no code.
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Files to skip: many repositories also contain the weights in other forms (Meta's and Mistral's own
# formats, other precisions, other runtimes), which transformers does not load. transformers looks
# only at the top-level directory.
OTHER_FILES = ["*/*", "consolidated*", "*.fp16.*", "*.fp32.*", "*.bf16.*"]


def resolve_base(name: str, revision: str | None = None, *, with_weights: bool = True) -> Path:
    """Return the local directory of a base model.

    Args:
        name: A directory, `BUNDLED_NAME`, or a name on the Hugging Face hub, which is downloaded
            unless it is in the hub's cache.
        revision: The revision of the hub repository.
        with_weights: Whether to download weights too; a plan does not need them.

    Raises:
        ModelError: If there is no such directory, and the hub does not provide it.
    """
    if Path(name).is_dir():
        return Path(name)
    if name == BUNDLED_NAME:
        return bundled_model_directory(print)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no directory {name}; give a directory with config.json and model.safetensors, or a "
            "hub name"
        )
    ignored = OTHER_FILES if with_weights else [*OTHER_FILES, "*.safetensors"]
    try:
        return download(
            HubName(name, revision), allow_patterns=MODEL_FILES, ignore_patterns=ignored
        )
    except HubError as error:
        if split_revision(name)[1]:
            raise ModelError(
                f"{name!r}: the revision of the base model is a key of its own in a configuration, "
                f"model.revision"
            ) from error
        raise ModelError(
            f"base model {name!r} is neither a directory nor the bundled {BUNDLED_NAME!r}, and "
            f"{error}. Without a network, give the path of a downloaded model directory"
        ) from error


def resolve_given_base(text: str, revision: str | None = None) -> Path:
    """Return the local directory of a base model that the user names on the command line.

    Args:
        text: As for `resolve_base`; for the hub also `NAME@REVISION`.
        revision: The revision if the text has none.

    Raises:
        ModelError: If there is no such directory, and the hub does not provide it.
    """
    name, own_revision = split_revision(text)
    return resolve_base(name, own_revision or revision)
