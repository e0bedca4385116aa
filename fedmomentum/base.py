"""The base model in memory: loaded, and held so that what is merged into it arrives.

The base on disk is never touched. In memory only the adapted modules change, and they are held in float32 also
where the rest of the model is in 16 bits: a round's residual is some 3e-4 of a weight's norm, and rounding
`base + residual` to bfloat16 would let about a fifth of it through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from fedmomentum.errors import ModelError
from fedmomentum.global_model import Blob
from fedmomentum.identity import checkpoint_files
from fedmomentum.lowrank import LowRank

# ── loaded ───────────────────────────────────────────────────────────────────────────────────────────────────────


def pick_device(device: str) -> torch.device:
    """`auto`: the first GPU if torch sees one, else the CPU.

    Raises:
        ModelError: a device that torch does not know or see.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the processor multiplies it natively, else float32.

    Raises:
        ModelError: not a floating dtype's name.
    """
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype)
    if chosen is None:
        raise ModelError(f"dtype {dtype!r}; choose auto, float32, bfloat16 or float16")
    return chosen


def load_base(
    folder: Path, dtype: torch.dtype, device: torch.device, *, num_labels: int | None = None
) -> PreTrainedModel:
    """The model in `folder`, in eval mode, without remote code.

    Args:
        folder: as written by `save_pretrained`.
        dtype: of the weights.
        device: where to.
        num_labels: load a sequence classifier with so many labels instead of a causal language model.

    Raises:
        ModelError: transformers cannot load it.
    """
    kind: Any = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    more = {} if num_labels is None else {"num_labels": num_labels}
    try:
        model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, **more)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{kind.__name__} cannot load a model from {folder}: {error}") from error
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`; a missing pad token is the end token.

    Raises:
        ModelError: there is none, or it has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot load a tokenizer from {folder}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no end token (eos_token); answers could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ── held ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class HeldBase:
    """The adapted modules of a live base, in float32, set to `pristine + base_update` and back at will.

    `W = pristine + sum of the update's parts`, added one after the other in float32, so that adding the newest
    part to what is there gives the same bits as starting anew. A factored part `B A` is added in place, in
    `2 out in rank` operations: no second matrix of the weight's size is made.

    Args:
        layers: module path to the live layer that holds the weight: `nn.Linear`, or `Conv1D`, whose weight is
            `(in, out)`. Each gets a weight of its own; the old one is left as it was to whoever shares it.
        folder: the model folder with the pristine weights, read from memory-mapped files when needed.

    Raises:
        ModelError: a layer of another kind, quantised weights, or a checkpoint without the layer's weight.
    """

    def __init__(self, layers: Mapping[str, nn.Module], folder: Path) -> None:
        self.layers: dict[str, Any] = dict(layers)
        files: dict[str, Path] = {}
        for file in checkpoint_files(folder):
            with safe_open(file, framework="pt") as opened:
                files.update(dict.fromkeys(opened.keys(), file))
        self._stored: dict[str, tuple[Path, str]] = {}
        for module, layer in self.layers.items():
            if not isinstance(layer, (nn.Linear, Conv1D)) or type(layer).__module__.startswith("bitsandbytes"):
                raise ModelError(f"module {module} is a {type(layer).__name__}; supported are Linear and Conv1D")
            weight = layer.weight
            if not weight.is_floating_point():
                raise ModelError(f"module {module} is held in {weight.dtype}; load the base in a floating dtype")
            self._stored[module] = _stored_under(module, files)
            _hold_in_float32(layer)
        self.reset()

    def pristine(self, module: str) -> Tensor:
        """The stored weight of `module`, `(out, in)`, float32, on the CPU."""
        return next(self.each_pristine([module]))[1]

    def each_pristine(self, modules: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Modules and their stored weights, one after the other; a file is opened once for all that it holds."""
        by_file: dict[Path, list[str]] = {}
        for module in modules:
            by_file.setdefault(self._stored[module][0], []).append(module)
        for file, held in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for module in held:
                    layer, name = self.layers[module], self._stored[module][1]
                    tensor = opened.get_tensor(name).to(torch.float32)
                    if tensor.shape != layer.weight.shape:
                        sizes = f"{tuple(tensor.shape)} on disk and {tuple(layer.weight.shape)} in the model"
                        raise ModelError(f"{name} is {sizes}")
                    yield module, tensor.mT if isinstance(layer, Conv1D) else tensor

    def reset(self) -> None:
        """Set every module to its stored weight."""
        self._is_whole = False
        for module, weight in self.each_pristine(self.layers):
            self.weight(module).copy_(weight)
        self._applied: list[str] = []
        self._is_whole = True

    def weight(self, module: str) -> Tensor:
        """The live weight of `module` as `(out, in)`, a view."""
        layer = self.layers[module]
        return layer.weight.detach().mT if isinstance(layer, Conv1D) else layer.weight.detach()

    def apply(self, base_update: Sequence[Blob]) -> None:
        """Set every module to `pristine + sum of base_update`; what is there already is not added again.

        All or nothing: every part is checked before the first is added, and a base that was left half changed (memory
        ran out, somebody pressed Ctrl-C) is reset before the next one is applied.

        Raises:
            ModelError: a module that is not held here, or a shape that differs.
        """
        for blob in base_update:
            for module, matrix in blob.matrices.items():
                if module not in self.layers or tuple(matrix.shape) != tuple(self.weight(module).shape):
                    raise ModelError(
                        f"base update {blob.name[:16]} changes module {module} {tuple(matrix.shape)}, which is not "
                        "adapted here or has another shape"
                    )
        names = [blob.name for blob in base_update]
        if not self._is_whole or names[: len(self._applied)] != self._applied:
            self.reset()
        num_applied = len(self._applied)
        self._is_whole = False
        for blob in base_update[num_applied:]:
            for module, matrix in blob.matrices.items():
                weight = self.weight(module)
                if isinstance(matrix, LowRank):
                    weight.addmm_(matrix.B.to(weight.device), matrix.A.to(weight.device))
                else:
                    weight += matrix.to(weight.device)
        self._applied = names
        self._is_whole = True


def _stored_under(module: str, files: Mapping[str, Path]) -> tuple[Path, str]:
    """Where a checkpoint keeps the weight of `module`: a model with a head has a prefix that one without lacks."""
    wanted = f"{module}.weight"
    names = [n for n in files if n == wanted] or [
        n for n in files if n.endswith(f".{wanted}") or wanted.endswith(f".{n}")
    ]
    if len(names) != 1:
        raise ModelError(f"the checkpoint has {len(names)} tensors for {wanted} ({names[:3]}); wanted one")
    return files[names[0]], names[0]


def _hold_in_float32(layer: Any) -> None:
    """Give the layer room for float32 weights of its own; a 16-bit layer's input is cast up, its output back."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.float32), requires_grad=False)
    if dtype == torch.float32:
        return
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    layer.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
    layer.register_forward_hook(lambda _, __, output: output.to(dtype))
