"""A model in transformers' own format, such as a merged export, that is scored alone."""

from __future__ import annotations

from pathlib import Path

from fedmomentum.base_model.devices import pick_device, pick_dtype, set_up_device
from fedmomentum.base_model.identity import identify
from fedmomentum.base_model.load_checks import vocabulary_size
from fedmomentum.base_model.loading import load_base, load_tokenizer
from fedmomentum.formats.directories import MANIFEST, is_adapter_directory, retained_rounds


def is_plain_model(path: Path) -> bool:
    """Return whether a directory holds a plain model rather than a run or part of one.

    Raises:
        ModelError: If it holds more than one of these.
    """
    if is_adapter_directory(path) or (path / MANIFEST).exists() or retained_rounds(path):
        return False
    return (path / "config.json").is_file()


class PlainModel:
    """A loaded plain model.

    Args:
        path: Its directory.
        dtype: The dtype of its weights; empty for `auto`.
        device: The device to run it on; empty for `auto`.

    Raises:
        ModelError: If it cannot be loaded.
    """

    def __init__(self, path: Path, dtype: str, device: str) -> None:
        self.base = identify(str(path), path)
        # There is no run that specifies a device.
        place = pick_device(device or "auto")
        set_up_device(place, tf32=False)
        self.model = load_base(path, pick_dtype(dtype or "auto", place), place)
        self.tokenizer = load_tokenizer(path, vocabulary_size(self.model))
