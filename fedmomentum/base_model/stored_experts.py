"""The pretrained weights of experts, read from a checkpoint that may store each one separately.

Most checkpoints store one tensor per expert and projection; transformers fuses them into 3-D
parameters when it loads the model. Here the same conversions are applied to single parameters,
which are read from the files when needed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from fedmomentum.base_model.checkpoint_files import stored_tensors
from fedmomentum.base_model.stored_names import NameConversion
from fedmomentum.errors import ModelError


class StoredExperts:
    """The stored parts of 3-D parameters in a checkpoint.

    Args:
        directory: The model's directory.
        model: The model as loaded by transformers, which knows the conversions; it may have LoRA
            layers.
        parameters: The paths of the parameters.

    Raises:
        ModelError: If the checkpoint lacks the tensors for one of them.
    """

    def __init__(self, directory: Path, model: nn.Module, parameters: Collection[str]) -> None:
        self._model = model
        self._files = {name: tensor.file for name, tensor in stored_tensors(directory).items()}
        # Parameter to the names of the stored tensors that it is made from, each with the pattern
        # that says which part it is; None for a parameter that is stored as is.
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        self._converters: dict[str, Any] = {}
        if not parameters:
            return
        from transformers.core_model_loading import dot_natural_key

        conversion = NameConversion(model, parameters)
        for converter in conversion.converters:
            self._converters |= dict.fromkeys(converter.source_patterns, converter)
        for name in sorted(self._files, key=dot_natural_key):
            match = conversion.find_parameter(name)
            if match is not None:
                path, pattern = match
                self._sources.setdefault(path, []).append((name, pattern))
        for wanted in parameters:
            self._check(wanted, directory)

    def _check(self, parameter: str, directory: Path) -> None:
        sources = self._sources.get(parameter, [])
        patterns = {pattern for _, pattern in sources}
        is_whole = patterns == {None} and len(sources) == 1
        is_converted = bool(sources) and None not in patterns
        if not is_whole and not is_converted:
            names = ", ".join(name for name, _ in sources[:3]) or "nothing"
            raise ModelError(
                f"{directory} holds {names} for the experts {parameter}; wanted one tensor, or the "
                "parts that transformers makes it of. Load the model with transformers and write "
                "it again by save_pretrained"
            )

    def read(self, parameter: str) -> Tensor:
        """Return a parameter in the model's layout, in the stored dtype, on the CPU.

        Raises:
            ModelError: If its parts do not form one tensor.
        """
        sources = self._sources[parameter]
        tensors = self._read_tensors([name for name, _ in sources])
        first_pattern = sources[0][1]
        if first_pattern is None:
            return tensors[sources[0][0]]
        converter = copy.deepcopy(self._converters[first_pattern])
        for name, pattern in sources:
            converter.add_tensor(parameter, name, pattern, tensors[name])
        config = getattr(self._model, "config", None)
        converted = converter.convert(parameter, model=self._model, config=config)
        result = converted.get(parameter)
        if isinstance(result, list) and len(result) == 1:
            result = result[0]
        if not isinstance(result, Tensor):
            raise ModelError(
                f"transformers makes {sorted(converted)} of the stored parts of {parameter}; "
                "wanted that parameter. Load the model with transformers and write it again by "
                "save_pretrained(..., save_original_format=False)"
            )
        return result

    def _read_tensors(self, names: Collection[str]) -> Mapping[str, Tensor]:
        """Read stored tensors, opening each file once."""
        names_by_file: dict[Path, list[str]] = {}
        for name in names:
            names_by_file.setdefault(self._files[name], []).append(name)
        tensors = {}
        for file, names_in_file in names_by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in names_in_file:
                    tensors[name] = opened.get_tensor(name)
        return tensors
