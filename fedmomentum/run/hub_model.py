"""Download everything that a model on the hub needs."""

from __future__ import annotations

from pathlib import Path

from fedmomentum.base_model.hub import resolve_base, resolve_given_base
from fedmomentum.formats.directories import ADAPTER_CONFIG
from fedmomentum.lora.hub_adapter import OTHER_FILES, find_adapter
from fedmomentum.run.saved_model import find_base, open_result
from fedmomentum.utils.hub import download, parse_hub_name


def fetch(path: Path, base: str) -> tuple[Path, str]:
    """Return the directories of a model and of its base, downloading them if needed.

    Args:
        path: The directory of a run or model; or the hub name of an adapter or a plain model.
        base: The base model, a directory or a hub name; empty: the model's own.

    Returns:
        The directories of the model and of the base; the latter is empty if `base` is.

    Raises:
        FedMomentumError: If the hub does not provide them.
    """
    name = parse_hub_name(path)
    if name is not None:
        # The small files show whether it is an adapter or a model.
        small = download(name, allow_patterns=["*.json"], ignore_patterns=OTHER_FILES)
        is_model = (small / "config.json").is_file() and not (small / ADAPTER_CONFIG).is_file()
        path = resolve_base(name.repository, name.revision) if is_model else find_adapter(path)
    if base:
        return path, str(resolve_given_base(base))
    if (path / ADAPTER_CONFIG).is_file():
        find_base(open_result(path))
    return path, base
