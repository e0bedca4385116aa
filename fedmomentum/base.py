"""The base model in memory: loaded, and held so that what is merged into it arrives.

The base on disk is never touched. In memory only the adapted modules change, and they are held in float32 also
where the rest of the model is in 16 bits: a round's residual is some 3e-4 of a weight's norm, and rounding
`base + residual` to bfloat16 would let about a fifth of it through.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
from fedmomentum.loaded import refuse_incomplete, refuse_other_kinds, told_by_name, within_memory
from fedmomentum.lowrank import LowRank
from fedmomentum.precision import cast_around
from fedmomentum.stored import read_config, read_json_object, refuse_unusable, stored_tensors

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
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_labels: int | None = None,
    supplied: Collection[str] = (),
) -> PreTrainedModel:
    """Load the model in a directory, in eval mode, without remote code, every weight from the checkpoint.

    What transformers would load with random, quantized or left-out weights is refused, and so is what is no causal
    language model.

    Args:
        folder: As written by `save_pretrained`.
        dtype: Of the weights.
        device: Where to.
        num_labels: Load a sequence classifier with so many labels instead of a causal language model.
        supplied: Names of tensors that the caller sets afterwards, so that the checkpoint may lack them.

    Raises:
        ModelError: If transformers cannot load it, or would load something else than the checkpoint holds.
    """
    refuse_unusable(folder)
    kind: Any = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    more = {} if num_labels is None else {"num_labels": num_labels}
    with told_by_name(f"{kind.__name__} cannot load a model from {folder}", read_config(folder)):
        model, info = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **more,
        )  # fmt: skip
    refuse_incomplete(folder, model, info, supplied, is_classifier=num_labels is not None)
    with within_memory(f"the model in {folder} does not fit on {device}"):
        model = model.to(device).eval()
    if num_labels is None:
        refuse_other_kinds(folder, model)
    return model


def load_tokenizer(folder: Path, vocabulary: int | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a directory, without remote code.

    A pad token that is missing, or beyond the model's vocabulary, becomes the end token: padding is masked, so any
    token that the model can embed will do.

    Args:
        folder: Where it lies.
        vocabulary: How many tokens the model embeds, where that is known; see `vocabulary_size`.

    Raises:
        ModelError: If there is none, or it has no end token.
    """
    tables = [read_json_object(folder / "tokenizer_config.json"), read_config(folder)]
    code = next((table for table in tables if table.get("auto_map")), {})
    with told_by_name(f"transformers cannot load a tokenizer from {folder}", code):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no end token (eos_token); answers could never end")
    pad = tokenizer.pad_token_id
    if pad is None or (vocabulary is not None and pad >= vocabulary):
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
        tied: see `tied_names`; needed where a layer shares its weight with one that is stored for both.

    Raises:
        ModelError: a layer of another kind, quantised weights, a checkpoint without the layer's weight, or with
            another than the one that was loaded.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], folder: Path, tied: Mapping[str, Collection[str]] | None = None
    ) -> None:
        self.layers: dict[str, Any] = dict(layers)
        files = {name: tensor.file for name, tensor in stored_tensors(folder).items()}
        self._stored: dict[str, tuple[Path, str]] = {}
        for module, layer in self.layers.items():
            if not isinstance(layer, (nn.Linear, Conv1D)) or type(layer).__module__.startswith("bitsandbytes"):
                raise ModelError(f"module {module} is a {type(layer).__name__}; supported are Linear and Conv1D")
            _refuse_other_forward(module, layer)
            if layer.weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                raise ModelError(f"module {module} is held in {layer.weight.dtype}; load the base in a floating dtype")
            self._stored[module] = _stored_under(module, files, (tied or {}).get(f"{module}.weight", ()))
        with within_memory(f"the adapted modules of {folder} do not fit in float32"):
            for module, weight in self.each_pristine(self.layers):
                self._refuse_other(module, weight, folder)
                _hold_in_float32(self.layers[module])
                self.weight(module).copy_(weight)
        self._applied: list[str] = []
        self._is_whole = True

    def _refuse_other(self, module: str, stored: Tensor, folder: Path) -> None:
        """Refuse a stored weight that is not the one transformers loaded, in the dtype in which it is loaded.

        The live weight is what the model computes with. The two differ where transformers changes a checkpoint on
        loading, or the name was found in the wrong place.
        """
        live = self.weight(module)
        read = stored.to(device=live.device, dtype=live.dtype)
        if not bool(stored.isfinite().all()):
            raise ModelError(f"the weight of {module} in {folder} holds NaN or Inf; download the model again")
        if torch.equal(read, live):
            return
        difference, size = float((read.double() - live.double()).norm()), float(live.double().norm())
        raise ModelError(
            f"module {module}: transformers loads another weight than {self._stored[module][1]} in "
            f"{self._stored[module][0].name} (they differ by {difference:.3g}, of norm {size:.3g}). The checkpoint is "
            "stored in a form that transformers converts; load it with transformers and write it anew by "
            "save_pretrained(..., save_original_format=False)"
        )

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
        self._applied = []
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


def _refuse_other_forward(module: str, layer: Any) -> None:
    """Refuse a kind of linear layer that computes something else than `x W + b`, such as a router of experts.

    What is merged into its weight would not be what its adapter did.
    """
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return
    weight = layer.weight.detach()
    x = torch.linspace(-1, 1, weight.shape[0 if isinstance(layer, Conv1D) else 1], device=weight.device)
    x = x.to(weight.dtype)[None]
    wanted = x @ (weight if isinstance(layer, Conv1D) else weight.mT)
    wanted = wanted if layer.bias is None else wanted + layer.bias.detach()
    with torch.no_grad():
        got = layer(x)
    tolerance = 16 * torch.finfo(weight.dtype).eps
    if not isinstance(got, Tensor) or not torch.allclose(got, wanted, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"module {module} is a {type(layer).__name__}, which computes something else than a linear layer does; "
            "leave it out of target-modules"
        )


def _stored_under(module: str, files: Mapping[str, Path], tied: Collection[str]) -> tuple[Path, str]:
    """Find where a checkpoint keeps the weight of a module.

    A model with a head has a prefix that one without lacks. Of tied weights one may be stored for all.
    """
    wanted = f"{module}.weight"
    names = [name for name in files if name == wanted]
    names = names or [name for name in files if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    names = names or [name for name in files if name in tied]
    if len(names) != 1:
        raise ModelError(
            f"the checkpoint has {len(names)} tensors for {wanted} {names[:3]}; wanted one. If transformers renames or "
            "joins tensors of this model on loading, write it anew by save_pretrained(..., save_original_format=False)"
        )
    return files[names[0]], names[0]


def tied_names(model: nn.Module) -> dict[str, set[str]]:
    """Return, for every parameter that has several names, the others; these weights are tied."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return {name: set(names) - {name} for names in by_tensor.values() if len(names) > 1 for name in names}


def _hold_in_float32(layer: Any) -> None:
    """Give the layer room for float32 weights of its own; a 16-bit layer's input is cast up, its output back."""
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.float32), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    cast_around(layer, dtype)
