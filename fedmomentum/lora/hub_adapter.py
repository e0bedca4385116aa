"""Adapters named on the hub: the same directories, downloaded into the hub's cache."""

from __future__ import annotations

from pathlib import Path

from fedmomentum.errors import AdapterError, HubError
from fedmomentum.utils.hub import HubName, download, list_files, parse_hub_name
from fedmomentum.utils.text import first_few, printable

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PICKLE_TEXT = (
    f"the weights are in {PICKLED_FILE}, a pickle, which can run code when it is read. Load it "
    "with PEFT if you trust it, and save_pretrained(..., safe_serialization=True)"
)
# Files to download: weights, configurations, tokenizer and chat template; no pickles, no code.
ADAPTER_FILES = ["*.json", WEIGHTS_FILE, "*.model", "*.jinja", "vocab.txt", "merges.txt"]
# Files to skip: training checkpoints, which are in subdirectories.
OTHER_FILES = ["*/*"]
# Maximum number of files listed in a message.
MAX_SHOWN = 8


def find_adapter(path: Path | str, name: str | None = None) -> Path:
    """Return the directory of an adapter given by its path or by its name on the hub.

    Args:
        path: A path, which is returned unchanged; or `OWNER/NAME`, `OWNER/NAME@REVISION`.
        name: The adapter's name in messages; by default the path.

    Raises:
        HubError: If there is no such path, and the hub does not provide the adapter.
        AdapterError: If the repository contains something else.
    """
    hub_name = parse_hub_name(path)
    if hub_name is None:
        return Path(path)
    what = f"{name}: " if name is not None and name != str(path) else ""
    try:
        directory = download(hub_name, allow_patterns=ADAPTER_FILES, ignore_patterns=OTHER_FILES)
    except HubError as error:
        raise HubError(f"{what}there is no directory {path}, and {error}") from error
    if not (directory / CONFIG_FILE).is_file() or not (directory / WEIGHTS_FILE).is_file():
        raise AdapterError(f"{what}{_describe_lack(hub_name, directory)}")
    return directory


def _describe_lack(hub_name: HubName, directory: Path) -> str:
    """Describe the contents of a repository without a readable adapter."""
    # A revision may move, but the directory is named after the commit that was downloaded.
    files = list_files(HubName(hub_name.repository, directory.name))
    files = files or sorted(file.name for file in directory.iterdir())
    if CONFIG_FILE in files and PICKLED_FILE in files and WEIGHTS_FILE not in files:
        return f"{hub_name} on the hub: {PICKLE_TEXT}"
    lacking = WEIGHTS_FILE if CONFIG_FILE in files else CONFIG_FILE
    listed = first_few([printable(file, 80) for file in files], MAX_SHOWN) or "no files"
    kind = "; it is a model, not an adapter" if "config.json" in files else ""
    return (
        f"{hub_name} on the hub has no {lacking}, but {listed}{kind}. Give the repository of "
        "an adapter that PEFT wrote"
    )
