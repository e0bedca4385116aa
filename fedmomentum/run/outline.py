"""What a run is made of, before the weights of its model are loaded: settings, data, shapes."""

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
        base: The base model; its tensors need not have memory.
        skeleton: The base model without memory; None if it runs with its weights only.
        loaded: The base model, where it had to be loaded.
        tokenizer: Its tokenizer.
        labels: Of a classifier.
        targets: What is adapted.
        adapter: The adapter's shapes.
        saved: Paths of the modules that are trained in full.
        device: The device, as far as it is known: one that is not here may be planned for.
        dtype: The dtype of the weights in memory.
        stored_dtype: The dtype of the weights on disk, as config.json says.
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
    """Return the shapes of the base model and of the run's adapter.

    The weights are loaded only where an architecture does not run without.

    Args:
        config: The configuration.
        labels: Of a classifier; empty for a language model.
        is_plan: Whether nothing is to be run: then weights may be missing, and so may the device.

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
        # Where it has to be loaded for its shapes, the workers' devices hold no copy of it.
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
        # What it computes depends on values, or transformers cannot make it: loading says why.
        loaded = LoadedBase.from_config(settings, labels, config.lora.modules_to_save)
        base = loaded.model
        linear = find_linear_modules(base)
    check_max_length(base, config.data.max_length)
    tokenizer = load_tokenizer(directory, vocabulary_size(base), generates=not labels)
    set_chat_date(tokenizer, settings.chat_date)

    # As the clients' models will have it.
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
    """Return the device of a name, and whether it is here; a GPU may be planned for elsewhere."""
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
    """Return the first of the workers' devices, and whether all are here; none is opened here.

    Raises:
        ModelError: If one is no device, or is not here and is to be used.
    """
    for name in names:
        if find_device(name) is None and not is_plan:
            raise ModelError(f"run.devices: this machine has no {name}")
    return torch.device(names[0]), all(find_device(name) is not None for name in names)


def _stored_quantization(directory: Path) -> str | None:
    """Return how a checkpoint is quantized, by its configuration."""
    settings = read_config(directory).get("quantization_config")
    return stored_kind(settings) if isinstance(settings, dict) else None


def _declared_dtype(directory: Path, otherwise: torch.dtype) -> torch.dtype:
    """Return the dtype of a checkpoint by its configuration, which may not say it."""
    stored = read_config(directory)
    name = stored.get("dtype") or stored.get("torch_dtype")
    return DTYPES.get(str(name), otherwise)
