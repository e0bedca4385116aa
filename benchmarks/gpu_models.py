"""What the parts of `gpu.py` share: models of real shapes, peak memory, precision, time left."""

from __future__ import annotations

import gc
import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""All linear modules of a Llama's decoder layer."""

PRECISIONS = ("highest", "high")
"""Names of torch for how float32 products are made: in float32, or on a GPU in TF32."""


@dataclass(frozen=True)
class Size:
    """A model shape, and the training that is measured on it.

    Attributes:
        name: How the tables call it.
        config: The shape, as fields of `LlamaConfig`.
        batch: Rows of a step.
        length: Tokens of a row; there is no padding.
        steps: Steps of a timed training.
        repeats: Timed trainings of each side.
        local_steps: Steps of a client's round.
        seconds: About what all of it takes on an H100, by which it is decided whether it still fits
            into the time.
        quantization: `model.quantization`; the plain side loads it as QLoRA does.
        is_checkpointed: Whether layers are computed again in the backward pass, on both sides.
    """

    name: str
    config: dict[str, Any]
    batch: int
    length: int
    steps: int
    repeats: int
    local_steps: int
    seconds: float
    quantization: str = "none"
    is_checkpointed: bool = False

    def training_arguments(self) -> dict[str, Any]:
        """Return `training.arguments` of a client."""
        return {"gradient_checkpointing": True} if self.is_checkpointed else {}

    def llama(self) -> LlamaConfig:
        """Return the model's configuration."""
        return LlamaConfig(**self.config, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def parameters(self) -> int:
        """Count the parameters, without making them."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.llama())
        return sum(parameter.numel() for parameter in model.parameters())


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    shape = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 128256,
        "max_position_embeddings": 4096,
    }
    return shape | more


SIZES = {
    "1B": Size(
        "1B", _shape(2048, 8192, 16, 32, 8, tie_word_embeddings=True), 8, 512, 10, 3, 10, 45
    ),
    "3B": Size(
        "3B", _shape(3072, 8192, 28, 24, 8, tie_word_embeddings=True), 8, 512, 10, 3, 10, 85
    ),
    "8B": Size(
        "8B", _shape(4096, 14336, 32, 32, 8, tie_word_embeddings=False), 4, 512, 10, 2, 10, 150
    ),
}
"""The shapes of Llama-3.2-1B and 3B and of Llama-3.1-8B."""
for _name in list(SIZES):
    SIZES[f"{_name}-nf4"] = replace(SIZES[_name], name=f"{_name}, nf4", quantization="nf4")
SIZES["8B-long"] = replace(
    SIZES["8B"],
    name="8B, checkpointed",
    length=2048,
    steps=4,
    local_steps=4,
    seconds=150,
    is_checkpointed=True,
)
"""Long rows, with gradient checkpointing."""

TINY = Size(
    "tiny", _shape(64, 128, 2, 4, 2, tie_word_embeddings=False, vocab_size=128), 2, 16, 2, 2, 2, 5
)
"""A shape that shows within seconds, and without a GPU, that everything runs."""
TINY_SIZES = {
    "tiny": TINY,
    "tiny-nf4": replace(TINY, name="tiny, nf4", quantization="nf4"),
    "tiny-long": replace(TINY, name="tiny, checkpointed", length=32, is_checkpointed=True),
}


def write_model(
    config: LlamaConfig, folder: Path, device: torch.device, dtype: torch.dtype
) -> None:
    """Initialize a model on the device and save it, with a tokenizer of special tokens only."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Save a tokenizer with padding, start and end tokens; benchmarks make their own token ids."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder)


@contextmanager
def scratch_folder(needed: int) -> Iterator[Path]:
    """Return a directory for checkpoints, in memory if 1.5 times `needed` bytes are free there."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 1.5 * needed
    with tempfile.TemporaryDirectory(
        dir=memory if fits else None, prefix="fedmomentum-gpu-"
    ) as folder:
        yield Path(folder)


# ── the device ────────────────────────────────────────────────────────────────────────────────────


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return the device's name, memory and driver, and the CUDA version of torch."""
    if device.type != "cuda":
        return {"name": device.type, "memory_bytes": None, "driver": None, "cuda": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back the memory of tensors that nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Have float32 products made in this precision of `PRECISIONS`, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Grown:
    """Bytes of tensors on a device beyond those before a block of code; NaN on a CPU.

    Attributes:
        peak: The most at any time within the block.
        after: What is left at its end.
    """

    peak: float = math.nan
    after: float = math.nan


@contextmanager
def watch_memory(device: torch.device) -> Iterator[Grown]:
    """Measure by how many bytes the device's tensors grow while the block runs."""
    grown = Grown()
    if device.type != "cuda":
        yield grown
        return
    free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield grown
    synchronize(device)
    grown.peak = torch.cuda.max_memory_allocated(device) - before
    grown.after = torch.cuda.memory_allocated(device) - before


# ── the time ──────────────────────────────────────────────────────────────────────────────────────


class Budget:
    """The time that a run of the benchmark may take.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._ends = time.perf_counter() + seconds

    def left(self) -> float:
        """Return the seconds that are left; below zero where it is over."""
        return self._ends - time.perf_counter()
