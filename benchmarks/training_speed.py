"""What a LoRA training step costs: our `train` against a plain loop, and what matters.

    python benchmarks/training_speed.py [--only train overhead settings attention merged] [--threads
    2] [--cpu-time]
                                        [--json FILE]
    python benchmarks/training_speed.py --only compile

train: `fedmomentum.training.train` against a plain PyTorch loop over the same batches of the same
model, taken in turn;
paired ratios. overhead: what `train` costs besides the model, in processor time. settings: one step
each, one thing changed against the first. attention: one attention of the model, forward and
backward, by kernel and length of the rows. compile: a step of compiled layers, and how long
compiling takes; needs a C++ compiler. merged: one linear module, forward and backward: its weight
in float32 against the weight in 16 bits with a float32 branch that holds what was merged. Default
model: the embedded SmolLM2-135M-Instruct; the rows have the lengths of the default job's.
`--cpu-time`, with one thread, is for a machine that is busy with other things.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Target, alternate, finish, medians
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from fedmomentum.base_model.bundled import bundled_model_directory
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.config.training import LocalTraining
from fedmomentum.data.tokenization import TokenizedExamples
from fedmomentum.lora.peft_model import lora_layers
from fedmomentum.objectives.collation import (
    IGNORED,
    completion_batch,
    model_inputs,
    next_token_pairs,
)
from fedmomentum.training.hf_trainer import CompletionTrainer
from fedmomentum.training.isolation import MAX_MATH_SDPA_TOKENS, sdpa_backend_for
from fedmomentum.training.trainer import train
from fedmomentum.utils.process import quiet_libraries

CONSOLE = Console()
STEPS = 5  # the default job's local-steps
BATCH = 8
LENGTHS = [
    20,
    22,
    24,
    25,
    26,
    28,
    31,
    37,
]  # mean 26.6, longest 37: a usual batch of the default job
ANSWER = 8


def lora_model(
    folder: str, dtype: torch.dtype = torch.bfloat16, *, attention: str = "sdpa", held: bool = True
) -> Any:
    """The model as a client trains it: adapted modules in float32 where `held`."""
    with quiet_libraries():
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ).train()
    if held:
        Float32Weights(
            {module: layer.base_layer for module, layer in lora_layers(model).items()}, Path(folder)
        )
    return model


def example_rows(lengths: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Random rows of these lengths, and the lengths of their prompts."""
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(3, 40000, (n,), generator=generator).tolist()) for n in lengths]
    return ids, [n - ANSWER for n in lengths]


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True
    )


def padded_loss(
    model: nn.Module, batch: dict, change: Callable[[dict], dict] = dict
) -> torch.Tensor:
    logits, labels = next_token_pairs(
        model(**change(model_inputs(model, batch))).logits, batch["labels"]
    )
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def packed_loss(model: nn.Module, ids: list[tuple[int, ...]], prompts: list[int]) -> torch.Tensor:
    """The same loss with all rows in one, distinguished by restarting positions."""
    places, labels, start = [], [], 0
    for row, num_prompt in zip(ids, prompts, strict=True):
        places += range(start + num_prompt - 1, start + len(row) - 1)
        labels += row[num_prompt:]
        start += len(row)
    inputs = {
        "input_ids": torch.tensor([[token for row in ids for token in row]]),
        "position_ids": torch.tensor([[place for row in ids for place in range(len(row))]]),
    }
    logits = model(**inputs, logits_to_keep=torch.tensor(places), use_cache=False).logits[0]
    return F.cross_entropy(logits.float(), torch.tensor(labels))


def step(
    model: nn.Module, adamw: torch.optim.Optimizer, loss: Callable[[nn.Module], torch.Tensor]
) -> None:
    loss(model).backward()
    torch.nn.utils.clip_grad_norm_(
        [p for group in adamw.param_groups for p in group["params"]], 1.0
    )
    adamw.step()
    adamw.zero_grad()


def compare_train(folder: str, repeats: int) -> tuple[dict[str, Any], list[Target]]:
    """A client's local training: `STEPS` steps, the trainer's work included."""
    model = lora_model(folder)
    ids, prompts = example_rows(LENGTHS)
    examples = TokenizedExamples(tuple(ids), tuple(prompts), ("",) * BATCH, (False,) * BATCH, 0)
    batch = completion_batch(ids, prompts, 0)

    def plain() -> None:
        adamw = optimiser(model)
        with sdpa_backend_for(model, max(LENGTHS)):
            for _ in range(STEPS):
                step(model, adamw, partial(padded_loss, batch=batch))

    ours = partial(
        train,
        model,
        examples,
        LocalTraining(learning_rate=1e-4, batch_size=BATCH, local_steps=STEPS),
        pad_token_id=0,
        seed=0,
    )
    seconds = alternate({"plain loop": plain, "train()": ours}, repeats)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    tokens = STEPS * sum(LENGTHS)
    table = Table(
        "local training of 5 steps", "s", "s a step", "tokens/s", "ratio to plain, paired"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        shown = f"{ratio:.3f}" if name == "train()" else "1"
        table.add_row(
            name, f"{median:.3f}", f"{median / STEPS:.3f}", f"{tokens / median:.0f}", shown
        )
    CONSOLE.print(table)
    return seconds, [Target.at_least("tokens/s of train() against a plain loop", 0.97, ratio)]


def measure_overhead(folder: str, repeats: int) -> tuple[dict[str, Any], list[Target]]:
    """CPU seconds of everything in `train` except the model: the loss is of parameters alone.

    Processor time, not wall time, so that a busy machine does not change it much.
    """
    model = lora_model(folder)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, prompts = example_rows(LENGTHS)
    examples = TokenizedExamples(tuple(ids), tuple(prompts), ("",) * BATCH, (False,) * BATCH, 0)

    def loss(self: Any, model: nn.Module, inputs: dict, **rest: Any) -> torch.Tensor:
        value = torch.stack([(p * 0).sum() for p in trained]).sum() + 1
        self.recorder.add(value.item(), 1)
        return value

    original, found = CompletionTrainer.compute_loss, {}
    CompletionTrainer.compute_loss = loss  # type: ignore[method-assign,assignment]
    try:
        for steps in (1, STEPS, 25):
            times = []
            for _ in range(repeats + 1):
                started = time.process_time()
                train(
                    model,
                    examples,
                    LocalTraining(learning_rate=1e-4, batch_size=BATCH, local_steps=steps),
                    pad_token_id=0,
                    seed=0,
                )
                times.append(time.process_time() - started)
            found[steps] = statistics.median(times[1:])
    finally:
        CompletionTrainer.compute_loss = original  # type: ignore[method-assign]
    table = Table("steps of a call", "CPU s besides the model", "a step more costs, ms")
    previous = None
    for steps, seconds in found.items():
        more = f"{1000 * (seconds - previous[1]) / (steps - previous[0]):.1f}" if previous else ""
        table.add_row(str(steps), f"{seconds:.3f}", more)
        previous = steps, seconds
    CONSOLE.print(table)
    return found, []


def compare_settings(folder: str, repeats: int) -> tuple[dict[str, Any], list[Target]]:
    """One step, one thing changed."""
    rows = example_rows(LENGTHS)
    padded = completion_batch(*rows, 0)
    whole = completion_batch(
        *example_rows([round(sum(LENGTHS) / BATCH)] * BATCH), 0
    )  # as many tokens, no padding
    model, plain = lora_model(folder), lora_model(folder, held=False)
    no_mask = next(iter(model_inputs(model, whole)))

    with_padding = partial(padded_loss, batch=padded)

    def stepping(
        model: nn.Module,
        loss: Callable[[nn.Module], torch.Tensor] = with_padding,
        kernel: Callable[[], AbstractContextManager] | None = None,
    ) -> Callable[[], None]:
        adamw = optimiser(model)

        def run() -> None:
            with kernel() if kernel else sdpa_backend_for(model, max(LENGTHS)):
                step(model, adamw, loss)

        return run

    def with_batch(
        batch: dict, change: Callable[[dict], dict] = dict
    ) -> Callable[[nn.Module], torch.Tensor]:
        return partial(padded_loss, batch=batch, change=change)

    flash, eager = (
        partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
        lora_model(folder, attention="eager"),
    )
    packed, wide = (
        partial(packed_loss, ids=rows[0], prompts=rows[1]),
        lora_model(folder, torch.float32),
    )
    sides = {
        "as clients train: bfloat16, adapted modules in float32": stepping(model),
        "adapted modules in bfloat16 too": stepping(plain),
        "float32 base": stepping(wide),
        "attention: flash, torch's own choice": stepping(model, kernel=flash),
        "attention: transformers' eager": stepping(eager),
        "logits of all positions": stepping(
            model, with_batch(padded, lambda inputs: {**inputs, "logits_to_keep": 0})
        ),
        "logits by a slice": stepping(
            model,
            with_batch(
                padded, lambda inputs: {**inputs, "logits_to_keep": len(inputs["logits_to_keep"])}
            ),
        ),
        "as many tokens without padding": stepping(model, with_batch(whole)),
        "the same with a mask of ones": stepping(
            model,
            with_batch(
                whole, lambda inputs: {**inputs, "attention_mask": torch.ones_like(inputs[no_mask])}
            ),
        ),
        "packed into one row": stepping(model, packed),
        "packed, flash": stepping(model, packed, flash),
        "packed, eager": stepping(eager, packed),
    }
    apart = _gradients_apart(wide, partial(padded_loss, batch=padded), packed)
    seconds = alternate(sides, repeats)
    found = medians(seconds)
    first = next(iter(found.values()))
    table = Table(f"a step of {BATCH} rows, {sum(LENGTHS)} tokens", "s", "times the first")
    for name, median in found.items():
        table.add_row(name, f"{median:.3f}", f"{median / first:.2f}")
    CONSOLE.print(table)
    return seconds, [
        Target.at_least(
            "all logits against the answers' only, times",
            1,
            found["logits of all positions"] / first,
        ),
        Target.at_least(
            "torch's own attention against ours, times",
            1,
            found["attention: flash, torch's own choice"] / first,
        ),
        Target.at_most("packed in float32, relative difference of the gradient", 1e-5, apart),
    ]


def _gradients_apart(model: nn.Module, *losses: Callable[[nn.Module], torch.Tensor]) -> float:
    """How far two losses' gradients are from each other, relative to the first's norm."""
    found = []
    for loss in losses:
        model.zero_grad()
        loss(model).backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    model.zero_grad()
    return float((found[0] - found[1]).norm() / found[0].norm())


def compare_attention(repeats: int) -> tuple[list[dict[str, Any]], list[Target]]:
    """One attention of SmolLM2-135M, 8 rows, 9 heads of 64, causal: forward and backward by kernel.

    "kept" is what autograd keeps from the forward for the backward.
    """
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for length in (32, 64, 128, 256, 512):
            q, k, v = (
                torch.randn(BATCH, 9, length, 64).to(dtype).requires_grad_() for _ in range(3)
            )
            mask = (
                torch.ones(length, length, dtype=torch.bool).tril().expand(BATCH, 1, length, length)
            )
            added = torch.zeros(length, length, dtype=dtype).masked_fill(
                ~mask[0, 0], torch.finfo(dtype).min
            )

            def sdpa(
                backend: Any, q: Any = q, k: Any = k, v: Any = v, mask: Any = mask
            ) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            def eager(
                q: Any = q, k: Any = k, v: Any = v, added: Any = added, dtype: Any = dtype
            ) -> torch.Tensor:
                scores = q @ k.transpose(2, 3) * 64**-0.5 + added
                return F.softmax(scores, dim=-1, dtype=torch.float32).to(dtype) @ v

            kernels = {
                "flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
                "plain": partial(sdpa, SDPBackend.MATH),
                "eager": eager,
            }
            sides: dict[str, Callable[[], Any]] = {
                name: lambda run=run: run().float().sum().backward()
                for name, run in kernels.items()
            }
            row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "length": length}
            row |= {
                f"{name}, ms": 1000 * seconds
                for name, seconds in medians(alternate(sides, repeats)).items()
            }
            row |= {f"{name} keeps, MB": _kept(run) / 1e6 for name, run in kernels.items()}
            rows.append(row)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(
            *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    CONSOLE.print(table)
    worst = max(
        row["plain, ms"] / row["flash, ms"]
        for row in rows
        if row["dtype"] == "bfloat16" and row["length"] <= MAX_MATH_SDPA_TOKENS
    )
    return rows, [
        Target.at_most(
            f"plain attention up to {MAX_MATH_SDPA_TOKENS} tokens in bfloat16, times flash",
            1,
            worst,
        )
    ]


def _kept(run: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps of a forward, each tensor's memory once."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    del out
    return sum(sizes.values())


def compare_compiled(folder: str, repeats: int) -> tuple[dict[str, Any], list[Target]]:
    """Every layer compiled, for any shape, against the model as it is; and steps at new lengths."""
    model, compiled = lora_model(folder), lora_model(folder)
    for layer in compiled.get_base_model().model.layers:
        layer.compile(dynamic=True)
    batches = [
        completion_batch(*example_rows([n + more for n in LENGTHS]), 0) for more in (0, 3, -2, 9)
    ]

    def stepping(model: nn.Module, batch: dict) -> Callable[[], None]:
        adamw = optimiser(model)

        def run() -> None:
            with sdpa_backend_for(model, max(LENGTHS) + 9):
                step(model, adamw, partial(padded_loss, batch=batch))

        return run

    first = []
    for batch in batches:
        started = time.perf_counter()
        stepping(compiled, batch)()
        first.append(time.perf_counter() - started)
    found = medians(
        alternate(
            {"plain": stepping(model, batches[0]), "compiled": stepping(compiled, batches[0])},
            repeats,
        )
    )
    told = " ".join(f"{seconds:.2f}" for seconds in first)
    CONSOLE.print(f"a step: {found['plain']:.3f} s, compiled {found['compiled']:.3f} s")
    CONSOLE.print(f"the first compiled steps at four lengths: {told} s")
    return {"first": first, **found}, []


def compare_merged(repeats: int) -> tuple[list[dict[str, Any]], list[Target]]:
    """Which way of keeping what was merged is cheaper in a step, by size, rank and tokens."""
    rows = []
    for size, ranks in ((576, (24, 120, 480)), (2048, (24, 120, 480))):
        linear = nn.Linear(size, size, bias=False).requires_grad_(False)
        wide, narrow = linear.weight.data, linear.weight.data.bfloat16()
        for tokens in (64, 512):
            x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)

            def in_float32(x: torch.Tensor = x, wide: torch.Tensor = wide) -> None:
                F.linear(x.float(), wide).bfloat16().sum().backward()

            def branch(
                A: torch.Tensor, B: torch.Tensor, x: torch.Tensor, narrow: torch.Tensor
            ) -> None:
                (
                    F.linear(x, narrow) + F.linear(F.linear(x.float(), A), B).bfloat16()
                ).sum().backward()

            sides = {
                "float32": in_float32,
                "bfloat16, nothing merged": lambda x=x, w=narrow: F.linear(x, w).sum().backward(),
            }
            for rank in ranks:
                A, B = torch.randn(rank, size), torch.randn(size, rank)
                sides[f"branch of rank {rank}"] = partial(branch, A, B, x, narrow)
            found = medians(alternate(sides, 2 * repeats))
            row = {name: 1000 * seconds for name, seconds in found.items()}
            rows.append({"size": size, "tokens": tokens, **row})
    table = Table(*("size", "tokens"), *(f"{name}, ms" for name in list(rows[0])[2:]))
    for row in rows:
        table.add_row(
            *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    CONSOLE.print(table)
    return rows, []


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", default=["train", "overhead", "settings", "attention", "merged"]
    )
    parser.add_argument("--model", help="directory of the base model; default: the embedded one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall time"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.cpu_time:
        time.perf_counter = time.process_time  # what `alternate` reads
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)
    folder = options.model or str(bundled_model_directory(print))
    measured: dict[str, Any] = {}
    targets: list[Target] = []
    parts = {
        "train": lambda: compare_train(folder, options.repeats),
        "overhead": lambda: measure_overhead(folder, options.repeats),
        "settings": lambda: compare_settings(folder, options.repeats),
        "attention": lambda: compare_attention(options.repeats),
        "compile": lambda: compare_compiled(folder, options.repeats),
        "merged": lambda: compare_merged(options.repeats),
    }
    for name in options.only:
        measured[name], more = parts[name]()
        targets += more
    finish(targets, options.json, CONSOLE, "transformers", "peft", **measured)


if __name__ == "__main__":
    main()
