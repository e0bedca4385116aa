"""What quantization does to a model's logits, and what is left of merged updates in each form.

    pip install 'fedmomentum[quantization]'
    python experiments/quantization.py --measure    measures, writes quantization.json: a minute
    python experiments/quantization.py              prints the tables of quantization.json

The model is the bundled SmolLM2-135M-Instruct; all is on a CPU and in float32.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUMBERS = Path(__file__).with_suffix(".json")
MODEL = "smollm2-135m-instruct"
CPU = torch.device("cpu")
TEXT = "The quick brown fox jumps over the lazy dog and"
LONGER = f"{TEXT} runs into the forest, where nobody has seen it since"
NUM_TOKENS = 8
# Of a weight's rows and columns, of the residuals that are merged into it, and of one residual's
# norm relative to the weight's.
SIZE = 1024
NUM_RESIDUALS = 50
RANK = 16
RELATIVE_NORM = 3e-4

# ── logits ──


def measure_logits() -> dict[str, dict[str, float]]:
    """Return, by form of the base, how far its logits are from others, relative to their norm.

    `quantization`: from the unquantized model's; `padding`: from its own for the text alone. All
    compute in float32, as far as the libraries do.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    from fedmomentum.base_model.hub import resolve_base
    from fedmomentum.base_model.loading import load_base, load_tokenizer
    from fedmomentum.base_model.quantization import ON_LOADING

    disable_progress_bar()
    directory = resolve_base(MODEL)
    tokenizer = load_tokenizer(directory)
    short = tokenizer(TEXT).input_ids[:NUM_TOKENS]
    longer = tokenizer(LONGER).input_ids
    plain = logits(load_base(directory, torch.float32, CPU), short, longer)
    forms: dict[str, Callable[[], Any]] = {}
    for kind, quantization in ON_LOADING.items():
        forms[kind] = partial(load_base, directory, torch.float32, CPU, quantization=quantization)
    forms["bitsandbytes' own int8"] = lambda: AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
    ).eval()
    rows = {"none": {"quantization": 0.0, "padding": distance(plain[1], plain[0])}}
    for name, load in forms.items():
        alone, padded = logits(load(), short, longer)
        rows[name] = {
            "quantization": distance(alone, plain[0]),
            "padding": distance(padded, alone),
        }
    return rows


def logits(model: Any, short: list[int], longer: list[int]) -> tuple[Tensor, Tensor]:
    """Return a row's logits alone, and in a batch with a longer row, padded to its length."""
    padding = len(longer) - len(short)
    batch = torch.tensor([short + [0] * padding, longer])
    mask = torch.tensor([[1] * len(short) + [0] * padding, [1] * len(longer)])
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([short])).logits[0]
        together = model(input_ids=batch, attention_mask=mask).logits[0, : len(short)]
    return alone.double(), together.double()


def distance(got: Tensor, wanted: Tensor) -> float:
    """Return the distance of two tensors relative to the norm of the second."""
    return float((got - wanted).norm() / wanted.norm())


# ── merged updates ──


def measure_holding() -> dict[str, dict[str, float]]:
    """Return, by way of holding a weight, what arrives of residuals that are merged one by one."""
    from fedmomentum.base_model.side_branch import make_branch
    from fedmomentum.linalg.low_rank import LowRank

    noise = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(SIZE, SIZE, generator=noise)
    parts = []
    for _ in range(NUM_RESIDUALS):
        B = torch.randn(SIZE, RANK, generator=noise)
        A = torch.randn(RANK, SIZE, generator=noise)
        size = RELATIVE_NORM * float(weight.norm()) / float((B @ A).norm())
        parts.append(LowRank(size * B, A))
    total = sum((part.dense().double() for part in parts), torch.zeros(SIZE, SIZE).double())
    half = weight.bfloat16()

    def in_every_round(rounded: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the rounds change in a weight that is rounded after each of them."""
        start = rounded(weight)
        held = start
        for part in parts:
            held = rounded(held + part.dense())
        return held.double() - start.double()

    branch = make_branch(parts, None, (SIZE, SIZE), half)
    assert branch.dense is not None
    merged_once = (half.float() + total.float()).bfloat16()
    changes = {
        "float32": (4.0, in_every_round(lambda held: held)),
        "bfloat16 and D in 8 bits": (3.0, branch.dense.rows(0, SIZE, torch.float32).double()),
        "bfloat16, rounded once at the end": (2.0, merged_once.double() - half.double()),
        "bfloat16, rounded in every round": (
            2.0,
            in_every_round(lambda held: held.bfloat16().float()),
        ),
        "bfloat16, rounded at random in every round": (
            2.0,
            in_every_round(lambda held: randomly_rounded(held, noise)),
        ),
        "int8, quantized in every round": (1.0, in_every_round(as_int8)),
        "nf4, quantized in every round": (0.52, in_every_round(as_nf4)),
    }
    rows = {}
    for name, (num_bytes, change) in changes.items():
        share = float((change * total).sum() / (total * total).sum())
        rows[name] = {"bytes": num_bytes, "share": share, "error": distance(change, total)}
    return rows


def randomly_rounded(weight: Tensor, noise: torch.Generator) -> Tensor:
    """Return a float32 weight rounded to bfloat16, up or down with the right mean."""
    below = torch.randint(0, 2**16, weight.shape, generator=noise, dtype=torch.int32)
    bits = (weight.view(torch.int32) + below) & ~0xFFFF
    return bits.view(torch.float32)


def as_int8(weight: Tensor) -> Tensor:
    """Return what a weight is in 8 bits with one scale a row."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scales).round() * scales


def as_nf4(weight: Tensor) -> Tensor:
    """Return what a weight is in bitsandbytes' NF4 with double quantization."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    result: Tensor = functional.dequantize_4bit(codes, state)
    return result


# ── tables ──


def tables() -> dict[str, str]:
    """Return the tables of quantization.json as Markdown: of logits, and of merged updates."""
    numbers = json.loads(NUMBERS.read_text())
    lines = [
        "| the base's weights | its logits, from the unquantized ones | a text's logits, when it is "
        "padded in a batch |",
        "|---|---|---|",
    ]
    for name, row in numbers["logits"].items():
        quantization = f"{100 * row['quantization']:.1f} %" if row["quantization"] else "–"
        lines.append(f"| `{name}` | {quantization} | {100 * row['padding']:.1g} % |")
    held = [
        "| a weight is held as | bytes | share of the residuals that arrives, % | error, relative "
        "to their sum |",
        "|---|---|---|---|",
    ]
    for name, row in numbers["holding"].items():
        held.append(
            f"| {name} | {row['bytes']:g} | {100 * row['share']:.2f} | {row['error']:.2g} |"
        )
    return {"logits": "\n".join(lines), "holding": "\n".join(held)}


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        numbers = {"logits": measure_logits(), "holding": measure_holding()}
        NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")
    print("\n\n".join(tables().values()))


if __name__ == "__main__":
    main()
