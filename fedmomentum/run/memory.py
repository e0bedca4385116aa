"""A run's use of host and device memory in each of its phases; computed, not measured.

Weights and optimizer states are counted from their shapes, activations by simulating a step without
allocating memory (`training.step_memory`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedmomentum.base_model.quantization import NONE
from fedmomentum.base_model.weight_format import FLOAT32, resolve_weight_format
from fedmomentum.formats.plan import MemoryUse
from fedmomentum.lora.module_names import weight_path
from fedmomentum.training.arguments import DEFAULT_OPTIMIZER
from fedmomentum.training.step_memory import StepShape, step_bytes

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.run.outline import ModelOutline

LOG = logging.getLogger("fedmomentum")

# Bytes per element in each form, including scales: nf4 has a scale per block of 64, and scales are
# themselves quantized in blocks of 256.
QUANTIZED_BYTES = {
    "nf4": 0.5 + (1 + 4 / 256) / 64,
    "fp4": 0.5 + 4 / 64,
    "int8": 1.0,
    "torchao-int8": 1.0,
}
# Private memory of a process for torch, transformers, PEFT and what they load.
LIBRARIES = 400 * 2**20
# The live factors, the fresh adapter, the global one and its bytes, a reply and its bytes.
ADAPTER_COPIES = 6
# Vectors per layer and token that a step keeps; a guess for models that cannot be simulated.
VECTORS_PER_LAYER = 34


@dataclass(frozen=True)
class BaseSizes:
    """Numbers of elements in a base model, grouped by how they are held.

    Attributes:
        adapted: Elements of the adapted matrices.
        linear: Elements of the other linear layers, which quantization would include.
        other: Elements of everything else.
        trained: Elements of modules that are trained in full, of which there is a second copy.
        largest: Elements of the largest linear layer, which may be converted to another form.
    """

    adapted: int
    linear: int
    other: int
    trained: int
    largest: int

    @classmethod
    def of(cls, model: Any, adapter: Adapter, saved: Collection[str]) -> BaseSizes:
        """Count the parameters of a model, with or without allocated weights."""
        adapted_paths = {weight_path(module) for module in adapter.modules}
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        counts = {"adapted": 0, "linear": 0, "other": 0}
        linear = {
            f"{path}.weight"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head and path not in saved
        }
        largest = 0
        for name, parameter in model.named_parameters():
            kind = "other"
            if name in adapted_paths:
                kind = "adapted"
            elif name in linear:
                kind = "linear"
            counts[kind] += parameter.numel()
            # Everything else keeps the form in which it is read.
            if kind != "other":
                largest = max(largest, parameter.numel())
        trained = sum(tensor.numel() for tensor in adapter.saved.values())
        return cls(**counts, trained=trained, largest=largest)


@dataclass(frozen=True)
class Placement:
    """Where and how a model is held.

    Attributes:
        on_gpu: Whether it is on a device with its own memory.
        dtype: The dtype of its weights; the compute dtype of quantized ones.
        stored_dtype: The dtype on disk.
        weight_format: The format of the adapted weights: `float32` or `as-loaded`.
        quantization: `none`, or how linear layers are quantized.
    """

    on_gpu: bool
    dtype: torch.dtype
    stored_dtype: torch.dtype
    weight_format: str
    quantization: str

    @property
    def quantized_bytes(self) -> float | None:
        """Bytes of a quantized element; None if nothing is quantized."""
        return QUANTIZED_BYTES.get(self.quantization)

    def describe(self, device: str) -> str:
        """Return the text for a plan: `cuda:0, bfloat16, adapted modules as-loaded`."""
        parts = [device, str(self.dtype).removeprefix("torch.")]
        if self.quantization != NONE:
            parts.append(self.quantization)
        return ", ".join([*parts, f"adapted modules {self.weight_format}"])


def choose_placement(config: Config, outline: ModelOutline) -> Placement:
    """Return how a configuration holds its model.

    Raises:
        ModelError: If float32 is requested, but the weights are quantized.
    """
    quantization = outline.quantization or config.model.quantization
    on_gpu = outline.device.type != "cpu"
    weight_format = resolve_weight_format(
        config.model.adapted_weights,
        on_gpu=on_gpu,
        dtype=outline.dtype,
        is_quantized=quantization != NONE,
    )
    return Placement(on_gpu, outline.dtype, outline.stored_dtype, weight_format, quantization)


@dataclass(frozen=True)
class ServerBytes:
    """The server's memory use in bytes.

    Attributes:
        adapter: An adapter in float32.
        update: The parts merged over all rounds, at most, in the form in which they are kept.
        aggregating: The working memory of an aggregation.
    """

    adapter: int
    update: int
    aggregating: int


def weight_bytes(sizes: BaseSizes, place: Placement) -> int:
    """Return the bytes of the base model's weights as they are held."""
    itemsize = place.dtype.itemsize
    quantized = place.quantized_bytes
    adapted: float = 4 if place.weight_format == FLOAT32 else itemsize
    linear: float = itemsize
    if quantized is not None:
        adapted = linear = quantized
    total = sizes.adapted * adapted + sizes.linear * linear + sizes.other * itemsize
    return int(total) + 4 * sizes.trained


def branch_bytes(sizes: BaseSizes, place: Placement, update: int) -> int:
    """Return the most bytes of merged parts that are kept beside weights held as loaded."""
    if place.weight_format == FLOAT32:
        return 0
    # Kept as factors in the model's dtype, as long as they are smaller than int8.
    return min(update // 4 * place.dtype.itemsize, sizes.adapted)


def moment_bytes(config: Config, trained: int) -> int:
    """Return the bytes of the optimizer's state for a number of trained elements."""
    name = str(config.training.arguments.get("optim", DEFAULT_OPTIMIZER))
    options = str(config.training.arguments.get("optim_args", ""))
    if name == "sgd":
        return 4 * trained if "momentum" in options else 0
    if "8bit" in name:
        return 2 * trained
    return 8 * trained


def rows_of_pass(config: Config) -> int:
    """Return how many examples of a training step go through the model together."""
    dp = config.privacy.dp
    if dp is None or dp.max_rows is None:
        return config.training.batch_size
    return min(dp.max_rows, config.training.batch_size)


def private_bytes(config: Config, trained: int) -> int:
    """Return the bytes of per-example gradients and their float64 sum."""
    dp = config.privacy.dp
    if dp is None:
        return 0
    # Gradients over several rows are summed in float64.
    is_summed = dp.unit_column is not None or config.training.objective == "dpo"
    itemsize = 12 if is_summed else 4
    return trained * (itemsize * rows_of_pass(config) + 8)


def estimate(
    config: Config,
    sizes: BaseSizes,
    place: Placement,
    steps: tuple[int, int],
    server: ServerBytes,
    trained: int,
    num_workers: int = 0,
) -> tuple[MemoryUse, MemoryUse | None]:
    """Return the memory use of host and device in each phase; the device's is None on a CPU.

    With workers, the host's covers all processes, and the device's a single worker.

    Args:
        config: The configuration.
        sizes: The base model's sizes.
        place: Where and how it is held.
        steps: The activations of a training step, including gradients, and of an evaluation.
        server: The server's memory use.
        trained: Number of trained elements.
        num_workers: Number of `run.devices` workers; 0 if this process holds the model.
    """
    weights = weight_bytes(sizes, place)
    branch = branch_bytes(sizes, place, server.update)
    live = weights + 4 * trained
    training = max(steps[0], 12 * trained) + moment_bytes(config, trained)
    training += private_bytes(config, trained)
    # While a layer is converted, its old and new forms coexist.
    one_layer = sizes.largest * (place.stored_dtype.itemsize + 4)
    model = MemoryUse(
        at_rest=live,
        loading=live + one_layer,
        training=live + branch + training,
        evaluating=live + branch + steps[1],
        aggregating=live + branch,
    )
    rest = LIBRARIES + ADAPTER_COPIES * server.adapter
    converted = place.dtype != place.stored_dtype and place.quantized_bytes is None
    everything = sizes.adapted + sizes.linear + sizes.other
    if place.on_gpu:
        clients = MemoryUse(
            at_rest=rest,
            # Unconverted weights stay in pages of the checkpoint's files, which the system owns.
            loading=rest + (everything * place.dtype.itemsize if converted else one_layer),
            training=rest + server.update,
            evaluating=rest + server.update,
            aggregating=rest + server.update,
        )
        return _with_server(clients, rest, server, num_workers), model
    # Until everything is loaded, converted weights and their float32 copies coexist.
    copies = (
        sizes.adapted * place.dtype.itemsize if place.weight_format == FLOAT32 and converted else 0
    )
    clients = MemoryUse(
        at_rest=rest + model.at_rest,
        loading=rest + model.at_rest + max(copies, one_layer),
        training=rest + model.training + server.update,
        evaluating=rest + model.evaluating + server.update,
        aggregating=rest + model.aggregating + server.update,
    )
    return _with_server(clients, rest, server, num_workers), None


def _with_server(clients: MemoryUse, rest: int, server: ServerBytes, num_workers: int) -> MemoryUse:
    """Return the host's memory use for clients and server.

    Args:
        clients: The memory use of a process that runs clients.
        rest: The bytes of an idle process.
        server: The server's memory use.
        num_workers: How many processes run clients, besides the server's; 0: the server's does.
    """
    if num_workers == 0:
        return replace(clients, aggregating=clients.aggregating + server.aggregating)
    alone = rest + server.update
    return MemoryUse(
        at_rest=rest + num_workers * clients.at_rest,
        loading=rest + num_workers * clients.loading,
        training=alone + num_workers * clients.training,
        evaluating=alone + num_workers * clients.evaluating,
        aggregating=alone + num_workers * clients.aggregating + server.aggregating,
    )


def simulate_steps(
    config: Config, outline: ModelOutline, place: Placement, longest: tuple[int, int]
) -> tuple[int, int]:
    """Return the activations of a training step and of an evaluation's batch, in bytes.

    Args:
        config: The configuration.
        outline: The base model and its adapter.
        place: How the model is held.
        longest: Number of tokens of the longest example and of the longest answer.
    """
    rows = rows_of_pass(config)
    if config.training.objective == "dpo":
        rows *= 2  # the two answers of a pair
    length, positions = longest
    shape = StepShape(
        rows=rows,
        length=length,
        positions=min(length, positions + 1),
        dtype=place.dtype,
        in_float32=place.weight_format == FLOAT32,
        rank=config.lora.rank,
        dropout=config.lora.dropout,
        checkpointing=bool(config.training.arguments.get("gradient_checkpointing")),
        trained=tuple(outline.saved),
    )
    evaluated = replace(shape, rows=config.evaluation.batch_size, is_training=False)
    modules = outline.targets.modules
    skeleton = outline.skeleton
    try:
        if skeleton is not None:
            return step_bytes(skeleton, modules, shape), step_bytes(skeleton, modules, evaluated)
    except Exception as error:  # the model's control flow depends on tensor values
        LOG.debug("the step cannot be run without memory", exc_info=error)
    return _guess_steps(outline.base.config.get_text_config(), shape)


def _guess_steps(text: Any, shape: StepShape) -> tuple[int, int]:
    """Estimate the bytes of a training step and an evaluation from the model's configuration."""
    width = getattr(text, "hidden_size", 1024) * getattr(text, "num_hidden_layers", 24)
    kept = VECTORS_PER_LAYER * shape.rows * shape.length * width * shape.dtype.itemsize
    logits = 4 * shape.rows * shape.positions * getattr(text, "vocab_size", 32000)
    return kept + 3 * logits, logits
