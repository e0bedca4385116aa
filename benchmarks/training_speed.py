"""What a LoRA training step costs: our `train` against a plain loop, and what matters.

    python benchmarks/training_speed.py [--only train overhead settings attention merged] [--threads
    2] [--cpu-time] [--json FILE]
    python benchmarks/training_speed.py --only compile

train: `fedmomentum.training.trainer.train` against a plain PyTorch loop over the same batches of
the same model, taken in turn; paired ratios. overhead: what `train` costs without the model, in
processor time. settings: one step each, one thing changed against the first. attention: one
attention of the model, forward and backward, by kernel and length of the rows. compile: a step of
compiled layers, and how long compiling takes; needs a C++ compiler. merged: one linear module,
forward and backward: its weight in float32 against the weight in 16 bits with a float32 branch that
holds what was merged. Default model: the bundled SmolLM2-135M-Instruct; the rows have the lengths
of the default job's. `--cpu-time`, with one thread, is for a machine that is busy with other
things.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Clock, Target, alternate, finish, medians
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from fedmomentum.base_model.bundled import bundled_model_directory
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.config.training import LocalTraining
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.lora.live_layers import lora_layers
from fedmomentum.objectives.collation import (
    IGNORED,
    completion_batch,
    model_inputs,
    next_token_pairs,
)
from fedmomentum.objectives.objective import BatchLoss, CausalLM, Predictions
from fedmomentum.training.isolation import MAX_MATH_SDPA_TOKENS, sdpa_backend_for
from fedmomentum.training.trainer import train
from fedmomentum.utils.process import quiet_libraries

CONSOLE = Console()
STEPS = 5  # the default job's local-steps
BATCH = 8
# Mean 26.6, longest 37: a typical batch of the default job.
LENGTHS = [20, 22, 24, 25, 26, 28, 31, 37]
ANSWER = 8
Batch = Mapping[str, Tensor]
ModelLoss = Callable[[nn.Module], Tensor]


def lora_model(
    folder: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    attention: str = "sdpa",
    in_float32: bool = True,
) -> Any:
    """Load the model as a client trains it: the adapted modules `in_float32`."""
    with quiet_libraries():
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention
        )
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ).train()
    if in_float32:
        Float32Weights(
            {module: item.layer.base_layer for module, item in lora_layers(model).items()},
            Path(folder),
        )
    return model


def example_rows(lengths: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Draw rows of these lengths; return them and the lengths of their prompts."""
    generator = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(3, 40000, (n,), generator=generator).tolist()) for n in lengths]
    return ids, [n - ANSWER for n in lengths]


def typical_examples() -> TokenizedExamples:
    """Return one batch of examples of `LENGTHS`."""
    ids, prompts = example_rows(LENGTHS)
    return TokenizedExamples(tuple(ids), tuple(prompts), ("",) * BATCH, (False,) * BATCH, 0)


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters, as `train` configures it."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True
    )


def padded_loss(
    model: nn.Module,
    batch: Batch,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict[str, Any],
) -> Tensor:
    """Compute the loss of a padded batch, its inputs changed by `change`."""
    logits, labels = next_token_pairs(model(**change(model_inputs(model, batch))).logits, batch)
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def packed_loss(model: nn.Module, ids: Sequence[tuple[int, ...]], prompts: Sequence[int]) -> Tensor:
    """Compute the same loss with all rows in one, distinguished by restarting positions."""
    places: list[int] = []
    labels: list[int] = []
    start = 0
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


def step(model: nn.Module, adamw: torch.optim.Optimizer, loss: ModelLoss) -> None:
    """Take one optimizer step on a loss, with the gradient clipped."""
    loss(model).backward()
    torch.nn.utils.clip_grad_norm_(
        [p for group in adamw.param_groups for p in group["params"]], 1.0
    )
    adamw.step()
    adamw.zero_grad()


def compare_train(folder: str, repeats: int, clock: Clock) -> tuple[dict[str, Any], list[Target]]:
    """Time a client's local training: `STEPS` steps, the trainer's work included."""
    model = lora_model(folder)
    examples = typical_examples()
    batch = completion_batch(examples.input_ids, examples.num_prompt_tokens, 0)

    def plain() -> None:
        adamw = new_optimizer(model)
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
    seconds = alternate({"plain loop": plain, "train()": ours}, repeats, clock=clock)
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


@dataclass(frozen=True)
class WithoutModel(CausalLM):
    """An objective on the parameters alone; the model does not run.

    Attributes:
        parameters: The parameters that are trained.
    """

    parameters: tuple[Tensor, ...] = ()

    def predict(self, model: nn.Module, batch: Batch) -> Predictions:
        """Return no logits."""
        del model
        return Predictions(torch.empty(0), batch["labels"])

    def loss(self, predictions: Predictions, *, label_smoothing: float = 0.0) -> BatchLoss:
        """Return a constant, with a gradient of zero for every parameter."""
        del predictions, label_smoothing
        value = torch.stack([(p * 0).sum() for p in self.parameters]).sum() + 1
        return BatchLoss(value, value, 1)


def measure_overhead(folder: str, repeats: int) -> tuple[dict[str, Any], list[Target]]:
    """Measure CPU seconds of everything in `train` except the model.

    Processor time, not wall time, so that a busy machine does not change it much.
    """
    model = lora_model(folder)
    objective = WithoutModel(parameters=tuple(p for p in model.parameters() if p.requires_grad))
    examples = typical_examples()
    seconds_by_steps: dict[int, float] = {}
    for steps in (1, STEPS, 25):
        hyperparameters = LocalTraining(learning_rate=1e-4, batch_size=BATCH, local_steps=steps)
        times = []
        for _ in range(repeats + 1):
            started = time.process_time()
            train(model, examples, hyperparameters, pad_token_id=0, seed=0, objective=objective)
            times.append(time.process_time() - started)
        seconds_by_steps[steps] = statistics.median(times[1:])
    table = Table("steps of a call", "CPU s without the model", "a step more costs, ms")
    previous: tuple[int, float] | None = None
    for steps, seconds in seconds_by_steps.items():
        more = f"{1000 * (seconds - previous[1]) / (steps - previous[0]):.1f}" if previous else ""
        table.add_row(str(steps), f"{seconds:.3f}", more)
        previous = (steps, seconds)
    CONSOLE.print(table)
    return {str(steps): seconds for steps, seconds in seconds_by_steps.items()}, []


def compare_settings(
    folder: str, repeats: int, clock: Clock
) -> tuple[dict[str, Any], list[Target]]:
    """Time one step with one setting changed at a time."""
    ids, prompts = example_rows(LENGTHS)
    padded = completion_batch(ids, prompts, 0)
    # As many tokens, no padding.
    full = completion_batch(*example_rows([round(sum(LENGTHS) / BATCH)] * BATCH), 0)
    model = lora_model(folder)
    narrow = lora_model(folder, in_float32=False)
    wide = lora_model(folder, torch.float32)
    eager = lora_model(folder, attention="eager")
    no_mask = next(iter(model_inputs(model, full)))

    with_padding = partial(padded_loss, batch=padded)
    packed = partial(packed_loss, ids=ids, prompts=prompts)
    flash = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)

    def stepping(
        model: nn.Module,
        loss: ModelLoss = with_padding,
        kernel: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Callable[[], None]:
        adamw = new_optimizer(model)

        def run() -> None:
            with kernel() if kernel else sdpa_backend_for(model, max(LENGTHS)):
                step(model, adamw, loss)

        return run

    def all_logits(inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "logits_to_keep": 0}

    def logits_slice(inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "logits_to_keep": len(inputs["logits_to_keep"])}

    def mask_of_ones(inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "attention_mask": torch.ones_like(inputs[no_mask])}

    sides = {
        "as clients train: bfloat16, adapted modules in float32": stepping(model),
        "adapted modules in bfloat16 too": stepping(narrow),
        "float32 base": stepping(wide),
        "attention: flash, torch's own choice": stepping(model, kernel=flash),
        "attention: transformers' eager": stepping(eager),
        "logits of all positions": stepping(model, partial(with_padding, change=all_logits)),
        "logits by a slice": stepping(model, partial(with_padding, change=logits_slice)),
        "as many tokens without padding": stepping(model, partial(padded_loss, batch=full)),
        "the same with a mask of ones": stepping(
            model, partial(padded_loss, batch=full, change=mask_of_ones)
        ),
        "packed into one row": stepping(model, packed),
        "packed, flash": stepping(model, packed, flash),
        "packed, eager": stepping(eager, packed),
    }
    difference = _gradient_difference(wide, with_padding, packed)
    seconds = alternate(sides, repeats, clock=clock)
    middle = medians(seconds)
    first = next(iter(middle.values()))
    table = Table(f"a step of {BATCH} rows, {sum(LENGTHS)} tokens", "s", "times the first")
    for name, median in middle.items():
        table.add_row(name, f"{median:.3f}", f"{median / first:.2f}")
    CONSOLE.print(table)
    return seconds, [
        Target.at_least(
            "all logits against the answers' only, times",
            1,
            middle["logits of all positions"] / first,
        ),
        Target.at_least(
            "torch's own attention against ours, times",
            1,
            middle["attention: flash, torch's own choice"] / first,
        ),
        Target.at_most("packed in float32, relative difference of the gradient", 1e-5, difference),
    ]


def _gradient_difference(model: nn.Module, *losses: ModelLoss) -> float:
    """Return the difference of two losses' gradients, relative to the first's norm."""
    gradients = []
    for loss in losses:
        model.zero_grad()
        loss(model).backward()
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    model.zero_grad()
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


@dataclass(frozen=True)
class AttentionInputs:
    """Causal attention of SmolLM2-135M: 8 rows, 9 heads of 64.

    Attributes:
        q: Queries `(rows, heads, length, 64)`.
        k: Keys.
        v: Values.
        mask: `(rows, 1, length, length)`, true where a position is seen.
        added: The same as numbers that are added to the scores, `(length, length)`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    added: Tensor

    @classmethod
    def drawn(cls, length: int, dtype: torch.dtype) -> AttentionInputs:
        """Draw queries, keys and values of a length."""
        q, k, v = (torch.randn(BATCH, 9, length, 64).to(dtype).requires_grad_() for _ in range(3))
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        lowest = torch.finfo(dtype).min
        added = torch.zeros(length, length, dtype=dtype).masked_fill(~mask, lowest)
        return cls(q, k, v, mask.expand(BATCH, 1, length, length), added)

    def sdpa(self, backend: SDPBackend) -> Tensor:
        """Compute attention by one of torch's kernels."""
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.mask)

    def eager(self) -> Tensor:
        """Compute attention as transformers' eager implementation does."""
        scores = self.q @ self.k.transpose(2, 3) * 64**-0.5 + self.added
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(self.q.dtype) @ self.v


def _forward_backward(forward: Callable[[], Tensor]) -> None:
    forward().float().sum().backward()


def compare_attention(repeats: int, clock: Clock) -> tuple[list[dict[str, Any]], list[Target]]:
    """Time one attention, forward and backward, by kernel.

    A kernel "keeps" what autograd stores in the forward for the backward.
    """
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for length in (32, 64, 128, 256, 512):
            inputs = AttentionInputs.drawn(length, dtype)
            kernels: dict[str, Callable[[], Tensor]] = {
                "flash": partial(inputs.sdpa, SDPBackend.FLASH_ATTENTION),
                "plain": partial(inputs.sdpa, SDPBackend.MATH),
                "eager": inputs.eager,
            }
            sides = {name: partial(_forward_backward, run) for name, run in kernels.items()}
            row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "length": length}
            for name, seconds in medians(alternate(sides, repeats, clock=clock)).items():
                row[f"{name}, ms"] = 1000 * seconds
            for name, run in kernels.items():
                row[f"{name} keeps, MB"] = _kept_bytes(run) / 1e6
            rows.append(row)
    _print_rows(rows)
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


def _print_rows(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] | None = None) -> None:
    """Print rows of numbers as a table, with the rows' keys as columns unless others are given."""
    table = Table(*(columns or rows[0]))
    for row in rows:
        table.add_row(
            *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        )
    CONSOLE.print(table)


def _kept_bytes(run: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps of a forward, each tensor's memory once."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    del out
    return sum(sizes.values())


def compare_compiled(
    folder: str, repeats: int, clock: Clock
) -> tuple[dict[str, Any], list[Target]]:
    """Time a step with every layer compiled, for any shape, and steps at new lengths."""
    model = lora_model(folder)
    compiled = lora_model(folder)
    for layer in compiled.get_base_model().model.layers:
        layer.compile(dynamic=True)
    batches = [
        completion_batch(*example_rows([n + more for n in LENGTHS]), 0) for more in (0, 3, -2, 9)
    ]

    def stepping(model: nn.Module, batch: Batch) -> Callable[[], None]:
        adamw = new_optimizer(model)

        def run() -> None:
            with sdpa_backend_for(model, max(LENGTHS) + 9):
                step(model, adamw, partial(padded_loss, batch=batch))

        return run

    first = []
    for batch in batches:
        started = clock()
        stepping(compiled, batch)()
        first.append(clock() - started)
    sides = {"plain": stepping(model, batches[0]), "compiled": stepping(compiled, batches[0])}
    middle = medians(alternate(sides, repeats, clock=clock))
    shown = " ".join(f"{seconds:.2f}" for seconds in first)
    CONSOLE.print(f"a step: {middle['plain']:.3f} s, compiled {middle['compiled']:.3f} s")
    CONSOLE.print(f"the first compiled steps at four lengths: {shown} s")
    return {"first": first, **middle}, []


def _in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by a float32 weight, with its output in bfloat16."""
    return F.linear(x.float(), weight).bfloat16()


def _with_branch(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Multiply by a bfloat16 weight, and add a float32 branch `B A`."""
    return F.linear(x, weight) + F.linear(F.linear(x.float(), A), B).bfloat16()


def _sum_backward(product: Callable[..., Tensor], *tensors: Tensor) -> None:
    product(*tensors).sum().backward()


def compare_merged(repeats: int, clock: Clock) -> tuple[list[dict[str, Any]], list[Target]]:
    """Time the ways of keeping what was merged, in a step, by size, rank and tokens."""
    rows: list[dict[str, Any]] = []
    for size in (576, 2048):
        linear = nn.Linear(size, size, bias=False).requires_grad_(False)
        wide = linear.weight.data
        narrow = wide.bfloat16()
        for tokens in (64, 512):
            x = torch.randn(tokens, size, dtype=torch.bfloat16, requires_grad=True)
            sides = {
                "float32": partial(_sum_backward, _in_float32, x, wide),
                "bfloat16, nothing merged": partial(_sum_backward, F.linear, x, narrow),
            }
            for rank in (24, 120, 480):
                A = torch.randn(rank, size)
                B = torch.randn(size, rank)
                sides[f"branch of rank {rank}"] = partial(
                    _sum_backward, _with_branch, x, narrow, A, B
                )
            middle = medians(alternate(sides, 2 * repeats, clock=clock))
            row = {name: 1000 * seconds for name, seconds in middle.items()}
            rows.append({"size": size, "tokens": tokens, **row})
    _print_rows(rows, ["size", "tokens", *(f"{name}, ms" for name in list(rows[0])[2:])])
    return rows, []


Part = Callable[[], tuple[Any, list[Target]]]
DEFAULT_PARTS = ("train", "overhead", "settings", "attention", "merged")


def main() -> None:
    """Run the parts that are asked for, and print their tables and targets."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--only", nargs="*", choices=(*DEFAULT_PARTS, "compile"), default=DEFAULT_PARTS
    )
    parser.add_argument("--model", help="directory of the base model; default: the bundled one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall time"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock: Clock = time.process_time if options.cpu_time else time.perf_counter
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)
    folder = options.model or str(bundled_model_directory(print))
    measured: dict[str, Any] = {}
    targets: list[Target] = []
    parts: dict[str, Part] = {
        "train": partial(compare_train, folder, options.repeats, clock),
        "overhead": partial(measure_overhead, folder, options.repeats),
        "settings": partial(compare_settings, folder, options.repeats, clock),
        "attention": partial(compare_attention, options.repeats, clock),
        "compile": partial(compare_compiled, folder, options.repeats, clock),
        "merged": partial(compare_merged, options.repeats, clock),
    }
    for name in options.only:
        measured[name], more = parts[name]()
        targets += more
    finish(targets, options.json, CONSOLE, "transformers", "peft", **measured)


if __name__ == "__main__":
    main()
