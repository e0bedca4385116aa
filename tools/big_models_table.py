"""Make the tables of docs/big-models.md: `python tools/big_models_table.py`.

The numbers are what `fedmomentum run --plan` computes, from configurations that are written here,
without weights. Run by `make docs`; tests/test_docs.py checks rows against the plan.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fedmomentum.aggregation.registry import build_method  # noqa: E402
from fedmomentum.base_model.skeleton import Skeleton  # noqa: E402
from fedmomentum.config.schema import Config  # noqa: E402
from fedmomentum.config.toml import from_dict  # noqa: E402
from fedmomentum.formats.plan import MemoryUse  # noqa: E402
from fedmomentum.lora.linear_modules import LinearModules, find_linear_modules  # noqa: E402
from fedmomentum.lora.outline import outline_adapter  # noqa: E402
from fedmomentum.lora.targets import choose_targets  # noqa: E402
from fedmomentum.run.outline import ModelOutline  # noqa: E402
from fedmomentum.run.plan import plan_memory  # noqa: E402

PAGE = ROOT / "docs" / "big-models.md"
MARK = "<!-- table {}: made by `make docs` -->\n"
END = "<!-- end -->"
GIB = 2**30
CARDS = (16, 24, 40, 48, 80, 141)
"""Memory of GPUs, in GB, of which a tenth is left to the driver and to gaps."""
RESERVE = 0.9
NUM_CLIENTS = 10


def _shape(
    kind: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    } | more


TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
MODELS = {
    "Llama 3.2 1B": _shape("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, **TIED),
    "Llama 3.2 3B": _shape("llama", 3072, 8192, 28, 24, 8, 128256, head_dim=128, **TIED),
    "Llama 3.1 8B": _shape("llama", 4096, 14336, 32, 32, 8, 128256, **UNTIED),
    "Mistral 7B": _shape("mistral", 4096, 14336, 32, 32, 8, 32768, head_dim=128, **UNTIED),
    "Qwen2.5 7B": _shape("qwen2", 3584, 18944, 28, 28, 4, 152064, **UNTIED),
    "Qwen2.5 14B": _shape("qwen2", 5120, 13824, 48, 40, 8, 152064, **UNTIED),
    "Qwen2.5 32B": _shape("qwen2", 5120, 27648, 64, 40, 8, 152064, **UNTIED),
    "Gemma 2 9B": _shape("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, **TIED),
}
"""Shapes as in the models' own config.json."""


@dataclass(frozen=True)
class Setting:
    """What a row varies.

    Attributes:
        quantization: `model.quantization`.
        targets: `lora.target-modules`.
        batch: `training.batch-size`.
        length: Tokens of an example, half of them an answer's.
        checkpointing: Whether `gradient_checkpointing` is set.
        rank: `lora.rank`.
        holding: `model.adapted-weights`.
    """

    quantization: str = "none"
    targets: str = "all-linear"
    batch: int = 4
    length: int = 1024
    checkpointing: bool = True
    rank: int = 16
    holding: str = "auto"

    def config(self) -> Config:
        """Return the configuration of a run with it."""
        return from_dict(
            {
                "model": {
                    "name": "planned",
                    "dtype": "bfloat16",
                    "device": "cuda",
                    "quantization": self.quantization,
                    "adapted-weights": self.holding,
                },
                "lora": {"rank": self.rank, "target-modules": self.targets},
                "data": {"source": "reasoning-gym", "max-length": self.length},
                "training": {
                    "batch-size": self.batch,
                    "local-steps": 10,
                    "arguments": {"gradient_checkpointing": self.checkpointing},
                },
                "federation": {"num-rounds": 20},
                "evaluation": {"batch-size": self.batch},
            }
        )


@cache
def _model(name: str) -> tuple[Skeleton, LinearModules]:
    """Return a model without memory, and its linear modules."""
    shape = dict(MODELS[name])
    kind = shape.pop("model_type")

    def make(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape), dtype=dtype)

    skeleton = Skeleton.of(make, torch.bfloat16)
    with skeleton.active():
        return skeleton, find_linear_modules(skeleton.model)


def plan_model(name: str, setting: Setting) -> tuple[int, MemoryUse, MemoryUse]:
    """Return a model's number of parameters, and what host and device take."""
    skeleton, linear = _model(name)
    config = setting.config()
    targets = choose_targets(linear, setting.targets, rank=setting.rank)
    adapter = outline_adapter(
        skeleton.model, targets, rank=setting.rank, scaling=config.lora.scaling, saved=()
    )
    outline = ModelOutline(
        directory=ROOT,
        base=skeleton.model,
        skeleton=skeleton,
        loaded=None,
        tokenizer=None,
        labels=(),
        targets=targets,
        adapter=adapter,
        saved=[],
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        stored_dtype=torch.bfloat16,
        is_here=False,
        quantization=None,
        num_parameters=sum(p.numel() for p in skeleton.model.parameters()),
    )
    method = build_method("fedmomentum", {})
    longest = (setting.length, setting.length // 2)
    host, device = plan_memory(config, outline, method, NUM_CLIENTS, longest)
    assert device is not None
    return outline.num_parameters, host, device


def card(use: MemoryUse) -> str:
    """Return the smallest GPU on which a run fits."""
    fitting = [size for size in CARDS if use.peak <= RESERVE * size * GIB]
    return f"{fitting[0]} GB" if fitting else "more"


def _gib(value: int) -> str:
    return f"{value / GIB:.1f}"


def model_row(name: str) -> str:
    """Return a model's row: in bfloat16 and in nf4."""
    cells = [name]
    for quantization in ("none", "nf4"):
        num_parameters, _, device = plan_model(name, Setting(quantization))
        if quantization == "none":
            cells.append(f"{num_parameters / 1e9:.1f}")
        cells += [_gib(device.at_rest), _gib(device.peak), card(device)]
    return f"| {' | '.join(cells)} |"


SETTINGS = {
    "as above": Setting(),
    "without gradient checkpointing": Setting(checkpointing=False),
    "batch of 1": Setting(batch=1),
    "4096 tokens, batch of 1": Setting(batch=1, length=4096),
    "rank 64": Setting(rank=64),
    "attention only": Setting(targets="attention"),
    "adapted modules in float32": Setting(holding="float32"),
    "int8": Setting("int8"),
    "nf4": Setting("nf4"),
    "nf4, without gradient checkpointing": Setting("nf4", checkpointing=False),
    "nf4, batch of 1": Setting("nf4", batch=1),
}
VARIED = "Llama 3.1 8B"


def setting_row(name: str) -> str:
    """Return the row of a setting, for one model."""
    _, host, device = plan_model(VARIED, SETTINGS[name])
    cells = [name, _gib(device.at_rest), _gib(device.training), _gib(device.evaluating)]
    return f"| {' | '.join([*cells, _gib(device.peak), card(device), _gib(host.peak)])} |"


def tables() -> Iterator[tuple[str, str]]:
    """Yield the names and texts of the page's tables."""
    lines = [
        "| model | billion parameters | bfloat16: at rest | peak | GPU "
        "| nf4: at rest | peak | GPU |",
        "|---|---|---|---|---|---|---|---|",
        *map(model_row, MODELS),
    ]
    yield "models", "\n".join(lines)
    lines = [
        "| setting | at rest | training | evaluation | peak | GPU | host, in aggregation |",
        "|---|---|---|---|---|---|---|",
        *map(setting_row, SETTINGS),
    ]
    yield "settings", "\n".join(lines)


def main() -> None:
    """Write the tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables():
        before, _, rest = text.partition(MARK.format(name))
        _, end, after = rest.partition(END)
        text = f"{before}{MARK.format(name)}{table}\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
