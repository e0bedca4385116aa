"""What a LoRA training step costs on this machine, and which settings matter.

Run: python benchmarks/training_speed.py [--model FOLDER] [--length 64] [--batch-size 8] [--repeats 7]

Each row changes one thing against the first. The rows take turns, so that a slow minute of the machine hits all of
them, and the table gives medians. Default model: the embedded SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedmomentum.data.batches import completion_batch, model_inputs, next_token_pairs
from fedmomentum.data.tokens import TokenisedExamples
from fedmomentum.embedded import smollm2_folder
from fedmomentum.training import train

TARGETS = ["q_proj", "v_proj"]
TRAINER_STEPS = 4


def lora_model(folder: str, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa") -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)).train()


def base_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for name, module in model.named_modules() if name.endswith("base_layer")]


def adapted_in_float32(model: nn.Module) -> nn.Module:
    """Hold the adapted modules' own weights in float32; the rest of the model stays as it is."""
    for layer in base_layers(model):
        layer.float()
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        layer.register_forward_hook(lambda _, __, output: output.bfloat16())
    return model


def with_side_branch(model: nn.Module, rank: int) -> nn.Module:
    """Add a frozen float32 branch of the given rank to each adapted module, as accumulated residuals would be."""

    def hook(layer, inputs, output, *, A, B):
        del layer
        return output + F.linear(F.linear(inputs[0].float(), A), B).to(output.dtype)

    for layer in base_layers(model):
        A, B = torch.randn(rank, layer.in_features) * 1e-3, torch.randn(layer.out_features, rank) * 1e-3
        layer.register_forward_hook(partial(hook, A=A, B=B))
    return model


def rows(batch_size: int, length: int, answer: int, *, padded: bool) -> tuple[list[tuple[int, ...]], list[int]]:
    """Return random rows, all of one length or (padded) from half of it upwards, and their prompts' lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length - (i * length // (2 * batch_size) if padded else 0) for i in range(batch_size)]
    ids = [tuple(torch.randint(3, 40000, (n,), generator=generator).tolist()) for n in lengths]
    return ids, [n - answer for n in lengths]


def by_slice(inputs: dict) -> dict:
    return {**inputs, "logits_to_keep": len(inputs["logits_to_keep"])}


def step(model: nn.Module, optimiser: torch.optim.Optimizer, batch: dict, change: Callable[[dict], dict]) -> None:
    inputs = change(model_inputs(model, batch))
    logits, labels = next_token_pairs(model(**inputs).logits, batch["labels"])
    F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
    optimiser.step()
    optimiser.zero_grad()


def forward(model: nn.Module, batch: dict, mode: Callable) -> None:
    with mode():
        model(**model_inputs(model, batch))


def variants(folder: str, batch_size: int, length: int, answer: int) -> dict[str, tuple[Callable[[], None], int]]:
    """Return name -> (what to time, how many steps that is)."""
    whole = completion_batch(*rows(batch_size, length, answer, padded=False), 0)
    padded = completion_batch(*rows(batch_size, length, answer, padded=True), 0)
    ones = whole["attention_mask"]

    def stepping(model, batch=whole, change=lambda inputs: inputs):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        return partial(step, model, optimiser, batch, change), 1

    def with_threads(number, action):
        def run():
            before = torch.get_num_threads()
            torch.set_num_threads(number)
            action()
            torch.set_num_threads(before)

        return run

    def flushing(action):
        def run():
            torch.set_flush_denormal(True)
            action()
            torch.set_flush_denormal(False)

        return run

    model = lora_model(folder)
    base = stepping(model)
    ids, num_prompt = rows(batch_size, length, answer, padded=False)
    examples = TokenisedExamples(tuple(ids), tuple(num_prompt), ("",) * batch_size, (False,) * batch_size, 0)
    trainer = partial(
        train,
        model,
        examples,
        pad_token_id=0,
        learning_rate=1e-4,
        local_steps=TRAINER_STEPS,
        local_epochs=None,
        batch_size=batch_size,
        seed=0,
    )
    return {
        "bfloat16, sdpa, no mask, logits of the answer": base,
        f"the same by train(), {TRAINER_STEPS} steps a call": (trainer, TRAINER_STEPS),
        "attention: eager": stepping(lora_model(folder, attention="eager")),
        "mask of ones": stepping(model, change=lambda inputs: {**inputs, "attention_mask": ones}),
        "rows padded on the left (mean 3/4 full)": stepping(model, padded),
        "all logits": stepping(model, change=lambda inputs: {**inputs, "logits_to_keep": 0}),
        "logits of the answer by a slice": stepping(model, change=by_slice),
        "float32 base": stepping(lora_model(folder, torch.float32)),
        "adapted modules in float32": stepping(adapted_in_float32(lora_model(folder))),
        "float32 side branch, rank 24": stepping(with_side_branch(lora_model(folder), 24)),
        "float32 side branch, rank 120": stepping(with_side_branch(lora_model(folder), 120)),
        "flush denormals": (flushing(base[0]), 1),
        "one thread": (with_threads(1, base[0]), 1),
        "forward only, no_grad": (partial(forward, model, whole, torch.no_grad), 1),
        "forward only, inference_mode": (partial(forward, model, whole, torch.inference_mode), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of the base model; default: the embedded one")
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--answer", type=int, default=6, help="of which the answer's")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder = options.model or str(smollm2_folder(print))
    table = variants(folder, options.batch_size, options.length, options.answer)
    times: dict[str, list[float]] = {name: [] for name in table}
    for repeat in range(options.repeats + 1):
        for name, (action, num_steps) in table.items():
            start = time.perf_counter()
            action()
            if repeat > 0:  # the first turn warms up
                times[name].append((time.perf_counter() - start) / num_steps)
    tokens = options.batch_size * options.length
    reference = statistics.median(next(iter(times.values())))
    print(f"batch {options.batch_size} x {options.length} tokens, {options.threads} threads, torch {torch.__version__}")
    print(f"{'':48} {'s/step':>8} {'min':>8} {'tokens/s':>9} {'ratio':>6}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:48} {median:8.3f} {min(values):8.3f} {tokens / median:9.0f} {median / reference:6.2f}")


if __name__ == "__main__":
    main()
