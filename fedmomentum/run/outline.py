"""The shapes of a run's model and adapter, before its weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedmomentum.base_model.checkpoint_files import read_config
from fedmomentum.base_model.classifier import head_modules
from fedmomentum.base_model.devices import DTYPES, find_device, pick_device, pick_dtype
from fedmomentum.base_model.hub import resolve_base
from fedmomentum.base_model.load_checks import check_max_length, vocabulary_size
from fedmomentum.base_model.loading import load_tokenizer
from fedmomentum.base_model.quantization import stored_kind
from fedmomentum.base_model.skeleton import Skeleton, load_skeleton
from fedmomentum.client.loaded_base import LoadedBase
from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.lora.linear_modules import find_linear_modules
from fedmomentum.lora.outline import outline_adapter
from fedmomentum.lora.target_checks import find_saved_modules, names_to_save
from fedmomentum.lora.targets import Targets, choose_targets
from fedmomentum.utils.chat_date import set_chat_date

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.lora.adapter import Adapter


@dataclass(frozen=True)
class ModelOutline:
    """The base model with its adapter, as shapes.

    Attributes:
        directory: The base model's directory.
        base: The base model; its tensors may be unallocated.
        skeleton: The base model without allocated weights; None if it only runs with its weights.
        loaded: The base model, if it had to be loaded.
        tokenizer: Its tokenizer.
        labels: A classifier's labels.
        targets: The adapted modules.
        adapter: The adapter's shapes.
        saved: Paths of the modules that are trained in full.
        device: The device, as far as known; a plan may be for one that this machine does not have.
        dtype: The dtype of the weights in memory.
        stored_dtype: The dtype of the weights on disk, according to config.json.
        is_here: Whether this machine has the device.
        quantization: How the weights on disk are quantized; None if they are not.
        num_parameters: Number of parameters of the base model.
    """

    directory: Path
    base: Any = field(repr=False)
    skeleton: Skeleton | None = field(repr=False)
    loaded: LoadedBase | None = field(repr=False)
    tokenizer: Any = field(repr=False)
    labels: tuple[str, ...]
    targets: Targets = field(repr=False)
    adapter: Adapter = field(repr=False)
    saved: list[str]
    device: torch.device
    dtype: torch.dtype
    stored_dtype: torch.dtype
    is_here: bool
    quantization: str | None
    num_parameters: int


def outline_model(config: Config, labels: Sequence[str], *, is_plan: bool) -> ModelOutline:
    """Return the shapes of the base model and the run's adapter.

    The weights are loaded only if an architecture does not run without them.

    Args:
        config: The configuration.
        labels: A classifier's labels; empty for a language model.
        is_plan: Whether this is only for a plan: then weights and device may be missing.

    Raises:
        ModelError: If the base model cannot be found or is not supported.
        AdapterError: If the adapter does not fit the base model.
        ConfigError: If the model has fewer positions than `data.max-length`.
    """
    settings = config.model
    directory = resolve_base(settings.name, settings.revision, with_weights=not is_plan)
    devices = config.run.devices
    if devices:
        device, is_here = _worker_device(devices, is_plan=is_plan)
        # If it must be loaded for its shapes, do not put a copy on a worker's device.
        settings = replace(settings, device="cpu")
    else:
        device, is_here = _planned_device(settings.device, is_plan=is_plan)
    dtype = torch.bfloat16
    if is_here or settings.dtype != "auto":
        dtype = pick_dtype(settings.dtype, device)
    skeleton: Skeleton | None = None
    loaded = None
    base: Any
    try:
        loaded_skeleton = load_skeleton(directory, labels, settings.attention)
        base = loaded_skeleton.model
        with loaded_skeleton.active():
            linear = find_linear_modules(base)
        skeleton = loaded_skeleton
    except FedMomentumError:
        raise
    except Exception:
        # Its code depends on tensor values, or transformers cannot build it. Loading either works,
        # or raises an error that says why.
        loaded = LoadedBase.from_config(settings, labels, config.lora.modules_to_save)
        base = loaded.model
        linear = find_linear_modules(base)
    check_max_length(base, config.data.max_length)
    tokenizer = load_tokenizer(directory, vocabulary_size(base), generates=not labels)
    set_chat_date(tokenizer, settings.chat_date)

    # Choose modules in the same way as for the clients' models.
    lora = config.lora
    head = head_modules(base, directory) if labels else []
    saved = find_saved_modules(base, names_to_save(head, lora.modules_to_save))
    targets = choose_targets(
        linear,
        lora.target_modules,
        rank=lora.rank,
        saved=saved,
        head=head,
        parameters=lora.target_parameters,
    )
    return ModelOutline(
        directory=directory,
        base=base,
        skeleton=skeleton,
        loaded=loaded,
        tokenizer=tokenizer,
        labels=tuple(labels),
        targets=targets,
        adapter=outline_adapter(base, targets, rank=lora.rank, scaling=lora.scaling, saved=saved),
        saved=saved,
        device=device,
        dtype=dtype,
        stored_dtype=_declared_dtype(directory, dtype),
        is_here=is_here,
        quantization=_stored_quantization(directory),
        num_parameters=sum(parameter.numel() for parameter in base.parameters()),
    )


def _planned_device(name: str, *, is_plan: bool) -> tuple[torch.device, bool]:
    """Return the named device, and whether this machine has it; a plan may name a missing GPU."""
    try:
        return pick_device(name), True
    except ModelError:
        if not (is_plan and name.startswith("cuda")):
            raise
    try:
        return torch.device(name), False
    except RuntimeError as error:
        raise ModelError(f"device {name!r}: {str(error).splitlines()[0]}") from error


def _worker_device(names: Sequence[str], *, is_plan: bool) -> tuple[torch.device, bool]:
    """Return the workers' first device, and whether this machine has all; none is opened here.

    Raises:
        ModelError: If one is not a device, or is needed but missing on this machine.
    """
    for name in names:
        if find_device(name) is None and not is_plan:
            raise ModelError(f"run.devices: this machine has no {name}")
    return torch.device(names[0]), all(find_device(name) is not None for name in names)


def _stored_quantization(directory: Path) -> str | None:
    """Return how a checkpoint is quantized, according to its configuration."""
    settings = read_config(directory).get("quantization_config")
    return stored_kind(settings) if isinstance(settings, dict) else None


def _declared_dtype(directory: Path, otherwise: torch.dtype) -> torch.dtype:
    """Return a checkpoint's dtype according to its configuration, or `otherwise` if it has none."""
    stored = read_config(directory)
    name = stored.get("dtype") or stored.get("torch_dtype")
    return DTYPES.get(str(name), otherwise)
