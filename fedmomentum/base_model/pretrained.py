"""The pretrained weights of adapted modules, read from the checkpoint when they are needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fedmomentum.base_model.checkpoint_files import stored_tensors
from fedmomentum.base_model.stored_experts import StoredExperts
from fedmomentum.base_model.stored_names import find_stored_names
from fedmomentum.base_model.weight_slots import WeightSlot
from fedmomentum.errors import ModelError
from fedmomentum.utils.tensors import is_finite


class PretrainedWeights:
    """Where a checkpoint holds the weights of adapted modules.

    Args:
        slots: Name of a matrix to its place in the live model.
        directory: The model's directory; its weights are read from memory-mapped files.
        tied: See `tied_names`; needed if a layer shares its weight with one that is stored for
            both.
        model: The model as it was loaded, which knows under which names its weights are stored;
            needed if there are experts among the layers.

    Raises:
        ModelError: If the checkpoint does not hold the weight of a module.
    """

    def __init__(
        self,
        slots: Mapping[str, WeightSlot],
        directory: Path,
        tied: Mapping[str, Collection[str]] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self._slots = slots
        self._directory = directory
        experts = {slot.path for slot in slots.values() if slot.expert is not None}
        self._experts = StoredExperts(directory, model or nn.Module(), experts)
        files = {name: tensor.file for name, tensor in stored_tensors(directory).items()}
        paths = [slot.path for slot in slots.values() if slot.expert is None]
        converted = find_stored_names(model, files, paths)
        # Module to the file of its weight, and the weight's name in it.
        self._stored: dict[str, tuple[Path, str]] = {}
        for module, slot in slots.items():
            name = converted.get(slot.path)
            if slot.expert is None and name is not None:
                self._stored[module] = (files[name], name)
            elif slot.expert is None:
                tied_to = (tied or {}).get(slot.path, ())
                self._stored[module] = _find_checkpoint_tensor(slot.path, files, tied_to)

    def iterate(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield modules and their weights as they are stored, `(out, in)`; a file is opened once.

        Raises:
            ModelError: If a stored weight has another shape than the live one.
        """
        modules_by_file: dict[Path, list[str]] = {}
        experts_by_parameter: dict[str, list[str]] = {}
        for module in modules:
            if module in self._stored:
                modules_by_file.setdefault(self._stored[module][0], []).append(module)
            else:
                experts_by_parameter.setdefault(self._slots[module].path, []).append(module)
        for file, modules_in_file in modules_by_file.items():
            with safe_open(file, framework="pt") as opened:
                for module in modules_in_file:
                    name = self._stored[module][1]
                    tensor = opened.get_tensor(name)
                    yield module, self._matrix(module, name, tensor)
        # All experts of a parameter are read together: they may be stored in one tensor.
        for parameter, experts in experts_by_parameter.items():
            tensor = self._experts.read(parameter)
            for module in experts:
                yield module, self._matrix(module, parameter, tensor)

    def _matrix(self, module: str, name: str, tensor: Tensor) -> Tensor:
        """Return the matrix of a module in a stored tensor."""
        slot = self._slots[module]
        if tuple(tensor.shape) != slot.parameter_shape:
            raise ModelError(
                f"{name} is {tuple(tensor.shape)} on disk and {slot.parameter_shape} in the model"
            )
        return slot.matrix(tensor)

    def check_loaded(self, module: str, stored: Tensor, loaded: Tensor) -> None:
        """Refuse a stored weight that is not the one in the model, in the model's dtype.

        The model computes with the latter. They differ if transformers changes a checkpoint on
        loading, or if the wrong tensor of the checkpoint was found.

        Raises:
            ModelError: If they differ, or the stored one is not finite.
        """
        if not is_finite(stored):
            raise ModelError(
                f"the weight of {module} in {self._directory} holds NaN or Inf; download the model "
                "again"
            )
        as_loaded = stored.to(device=loaded.device, dtype=loaded.dtype)
        if torch.equal(as_loaded, loaded):
            return
        difference = float((as_loaded.double() - loaded.double()).norm())
        norm = float(loaded.double().norm())
        file, name = self._stored.get(module, (self._directory, "what it makes of the parts"))
        raise ModelError(
            f"module {module}: transformers loads another weight than {name} in {file.name} (they "
            f"differ by {difference:.3g}, of norm {norm:.3g}). The checkpoint is stored in a form "
            "that transformers converts; load it with transformers and write it again by "
            "save_pretrained(..., save_original_format=False)"
        )


def _find_checkpoint_tensor(
    wanted: str, files: Mapping[str, Path], tied_to: Collection[str]
) -> tuple[Path, str]:
    """Return the file and the name under which a checkpoint stores the weight of this path.

    A model with a head has a prefix that one without does not have. Of tied weights one may be
    stored for all.
    """
    names = [name for name in files if name == wanted]
    if not names:
        names = [
            name for name in files if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")
        ]
    if not names:
        names = [name for name in files if name in tied_to]
    if len(names) != 1:
        stored = f"several tensors ({', '.join(names[:3])})" if names else "no tensor"
        raise ModelError(
            f"the checkpoint holds {stored} for {wanted}; wanted one. If transformers joins, "
            "splits or renames tensors of this model on loading, load it with transformers and "
            "write it again by save_pretrained(..., save_original_format=False)"
        )
    return files[names[0]], names[0]
