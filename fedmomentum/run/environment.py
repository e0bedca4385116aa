"""The environment of a run (versions, threads, device), and a warning if it changes."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedmomentum.base_model.devices import rounds_to_tf32
from fedmomentum.errors import ModelError
from fedmomentum.formats.run_files import EnvironmentFile, read_facts
from fedmomentum.utils.process import installed_version
from fedmomentum.utils.quantized import quantized_layers

if TYPE_CHECKING:
    from fedmomentum.client.local_model import LocalModel


LOG = logging.getLogger("fedmomentum")


PACKAGES = (
    "fedmomentum",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)
# Libraries that quantize weights and multiply by them.
QUANTIZING_PACKAGES = ("bitsandbytes", "torchao")


def process_environment() -> dict[str, Any]:
    """Return the versions and threads of this process."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: installed_version(package) for package in PACKAGES},
        },
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def environment(local: LocalModel) -> dict[str, Any]:
    """Return what the last bits of a result depend on: versions, threads, device, dtype, hashes."""
    facts = process_environment()
    if any(True for _ in quantized_layers(local.peft)):
        libraries = {package: installed_version(package) for package in QUANTIZING_PACKAGES}
        facts["versions"] |= libraries
    return {
        **facts,
        "device": str(local.peft.device),
        "tf32": rounds_to_tf32(local.peft.device),
        "dtype": str(local.dtype).removeprefix("torch."),
        "adapted_weights": local.weight_format,
        "attention": getattr(local.peft.get_base_model().config, "_attn_implementation", None),
        "base_sha256": local.identity.sha256,
        "tokenizer_sha256": local.identity.tokenizer_sha256,
    }


def warn_of_another_environment(now: Mapping[str, Any], out: Path) -> None:
    """Warn if a run is resumed with other versions, threads or the like than it began with.

    Raises:
        ModelError: If environment.json was damaged.
    """
    file = out / "environment.json"
    try:
        before, _ = read_facts(file, EnvironmentFile)
    except FileNotFoundError:
        LOG.warning("%s is missing: whether this is the run's environment is not known", file)
        return
    except ModelError as error:
        raise ModelError(
            f"{error}. Restore it from a copy; or delete it, and resume without its check"
        ) from error
    changed = [key for key in now if now[key] != before.get(key)]
    if changed:
        LOG.warning(
            "resumed in another environment (%s differ): the rounds from here on may differ in "
            "their last bits",
            ", ".join(changed),
        )
