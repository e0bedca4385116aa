"""The pretrained weights of adapted modules, read from the checkpoint when needed."""

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
    """The weights of adapted modules in a checkpoint.

    Args:
        slots: Name of a matrix to its place in the live model.
        directory: The model's directory; its weights are read from memory-mapped files.
        tied: See `tied_names`; needed if a layer's tied weight is stored under another name.
        model: The model as loaded, which knows the stored names of its weights; needed if the
            layers include experts.

    Raises:
        ModelError: If the checkpoint does not contain the weight of a module.
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
        """Yield modules and their weights as stored, `(out, in)`, opening each file once.

        Raises:
            ModelError: If a stored weight's shape differs from the live one's.
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
        # Read all experts of a parameter together: they may be stored in one tensor.
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
        """Reject a stored weight that, in the model's dtype, differs from the model's weight.

        They differ if transformers converts a checkpoint on loading, or if the wrong tensor of the
        checkpoint was found.

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
    """Return the file and name under which a checkpoint stores the weight at this path.

    Models with a head have a prefix that models without one lack. Tied weights may be stored under
    only one of their names.
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
