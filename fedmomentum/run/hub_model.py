"""Everything that a model named on the hub needs, downloaded at once."""

from __future__ import annotations

from pathlib import Path

from fedmomentum.base_model.hub import resolve_base, resolve_given_base
from fedmomentum.formats.directories import ADAPTER_CONFIG
from fedmomentum.lora.hub_adapter import OTHER_FILES, find_adapter
from fedmomentum.run.saved_model import find_base, open_result
from fedmomentum.utils.hub import download, parse_hub_name


def fetch(path: Path, base: str) -> tuple[Path, str]:
    """Return the directories of a model and of the base that was named for it.

    Args:
        path: The directory of a run or a model; or an adapter's or a plain model's hub name.
        base: The base model, a directory or a hub name; empty: the model's own.

    Returns:
        The directory of the model, and that of the base; empty where the model's own was found.

    Raises:
        FedMomentumError: If the hub does not provide them.
    """
    name = parse_hub_name(path)
    if name is not None:
        # The small files show what it is.
        small = download(name, allow_patterns=["*.json"], ignore_patterns=OTHER_FILES)
        is_model = (small / "config.json").is_file() and not (small / ADAPTER_CONFIG).is_file()
        path = resolve_base(name.repository, name.revision) if is_model else find_adapter(path)
    if base:
        return path, str(resolve_given_base(base))
    if (path / ADAPTER_CONFIG).is_file():
        find_base(open_result(path))
    return path, base
