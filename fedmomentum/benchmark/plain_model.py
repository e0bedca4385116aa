"""A model in transformers' own format, such as a merged export, to be scored alone."""

from __future__ import annotations

from pathlib import Path

from fedmomentum.base_model.devices import pick_device, pick_dtype, set_up_device
from fedmomentum.base_model.identity import identify
from fedmomentum.base_model.load_checks import vocabulary_size
from fedmomentum.base_model.loading import load_base, load_tokenizer
from fedmomentum.formats.directories import MANIFEST, is_adapter_directory, retained_rounds


def is_plain_model(path: Path) -> bool:
    """Return whether a directory holds a plain model, rather than a run or a part of one.

    Raises:
        ModelError: If it holds several of these.
    """
    if is_adapter_directory(path) or (path / MANIFEST).exists() or retained_rounds(path):
        return False
    return (path / "config.json").is_file()


class PlainModel:
    """A plain model, loaded.

    Args:
        path: Its directory.
        dtype: Of its weights; empty: `auto`.
        device: Where it is computed; empty: `auto`.

    Raises:
        ModelError: If it cannot be loaded.
    """

    def __init__(self, path: Path, dtype: str, device: str) -> None:
        self.base = identify(str(path), path)
        # There is no run that says which it was.
        place = pick_device(device or "auto")
        set_up_device(place, tf32=False)
        self.model = load_base(path, pick_dtype(dtype or "auto", place), place)
        self.tokenizer = load_tokenizer(path, vocabulary_size(self.model))
