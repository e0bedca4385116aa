"""Which clients screening rejects: honest ones of very unequal sizes, and attackers.

    python experiments/screening.py --measure    trains, writes screening.json (ten minutes)
    python experiments/screening.py              prints the tables of docs/appendix/screening.md

What is measured is real training on a tiny model: how far the adapter has moved after 1, 2, 3, ...
1,250 optimizer steps, for clients with other data, optimizers, learning rates, ranks and modules,
from a fresh adapter and from a trained one. Federations of any size are then drawn from these
curves, and screened by the rule that a run uses and by the one it used before (20 times the median
norm of the round). `tests/server/test_screening.py` compares a real run with the draws.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fedmomentum.data import TokenizedExamples
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.server.screening import Displacement

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "screening.json"

BATCH_SIZE = 8
MOST_STEPS = 1250  # an epoch of 10,000 examples
FEW_STEPS = 128  # what clients with one or eight examples are trained for
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "rank 8 on q, v": (8, ["q_proj", "v_proj"]),
    "rank 2 on q, v": (2, ["q_proj", "v_proj"]),
    "rank 8 on all": (8, ALL),
}
TRAININGS = {
    "AdamW 1e-4": (1e-4, {}),
    "AdamW 1e-3": (1e-3, {}),
    "AdamW 1e-2": (1e-2, {}),
    "SGD 0.1": (0.1, {"optim": "sgd"}),
    "SGD 1": (1.0, {"optim": "sgd"}),
}
SETTINGS = [
    *(("rank 8 on q, v", training) for training in TRAININGS),
    ("rank 2 on q, v", "AdamW 1e-3"),
    ("rank 8 on all", "AdamW 1e-3"),
]
DATA = ("add", "copy", "yes", "noise")
STAGES = ("first round", "late round")
RATIO = 20.0


# ── measuring ──


def examples(kind: str, count: int, tokenizer: Any) -> TokenizedExamples:
    """Return examples of one kind of task; `noise` cannot be learned, `yes` needs no input."""
    from fedmomentum.data import Example, tokenize

    draw = random.Random(kind)
    rows = []
    for _ in range(count):
        word = "".join(draw.choice("abcdefgh") for _ in range(4))
        a = draw.randrange(10)
        b = draw.randrange(10)
        prompt, answer = {
            "add": (f"{a}+{b}=", str(a + b)),
            "copy": (f"c {word}:", word),
            "yes": (f"y {word}:", "yes"),
            "noise": (f"n {word}:", "".join(draw.choice("abcdefgh") for _ in range(4))),
        }[kind]
        rows.append(Example(prompt, answer))
    return tokenize(rows, tokenizer, max_length=64, max_truncated_fraction=0.0, owner=kind)


def measure() -> dict[str, Any]:
    """Train, and return the curves and the cosines between clients' updates."""
    sys.path.insert(0, str(HERE.parent))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedmomentum.config.toml import from_dict
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.data import TokenizedExamples
    from fedmomentum.lora.peft_model import attach_adapter, copy_adapter, load_adapter
    from fedmomentum.server.client_deltas import distance
    from fedmomentum.server.screening import step_norms
    from fedmomentum.training.step_bounds import StepSize
    from fedmomentum.training.trainer import train
    from tests.tiny import PAD_TOKEN_ID, tiny_llama

    torch.set_num_threads(1)
    grid = sorted({*(round(2 ** (k / 2)) for k in range(21)), MOST_STEPS})
    curves: list[dict[str, Any]] = []
    cosines: list[dict[str, Any]] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_llama(Path(scratch) / "base")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = {
            (kind, count): examples(kind, count, tokenizer)
            for kind in DATA
            for count in (10_000, 200, 8, 1)
        }
        mixed = TokenizedExamples.concatenate([texts[kind, 200] for kind in DATA[:3]])
        for adapter_name, training_name in SETTINGS:
            rank, modules = ADAPTERS[adapter_name]
            learning_rate, arguments = TRAININGS[training_name]
            step_size = StepSize.of(
                from_dict({"training": {"arguments": arguments}}), learning_rate
            )
            model = attach_adapter(
                AutoModelForCausalLM.from_pretrained(folder),
                rank=rank,
                lora_alpha=16.0,
                target_modules=modules,
                dropout=0.0,
                use_rslora=False,
                modules_to_save=[],
                seed=0,
            )
            hyperparameters = LocalTraining(
                learning_rate=learning_rate,
                batch_size=BATCH_SIZE,
                local_steps=MOST_STEPS,
                arguments=arguments,
            )
            start = copy_adapter(model, "start")
            for stage in STAGES:
                if stage == "late round":
                    common_rounds = replace(hyperparameters, local_steps=400)
                    train(model, mixed, common_rounds, pad_token_id=PAD_TOKEN_ID, seed=1)
                    start = copy_adapter(model, "start")
                (step, _) = step_norms(start, step_size, trained="BA", shared="BA").values()
                moved: dict[int, list[Adapter]] = {}
                for kind, count in [
                    *((k, 10_000) for k in DATA),
                    ("add", 8),
                    ("noise", 8),
                    ("add", 1),
                    ("noise", 1),
                ]:
                    norms: dict[int, float] = {}

                    def on_step(
                        number: int,
                        total: int,
                        loss: float,
                        *,
                        norms: dict[int, float] = norms,
                        count: int = count,
                        start: Adapter = start,
                        model: Any = model,
                        moved: dict[int, list[Adapter]] = moved,
                    ) -> None:
                        if number in grid:
                            now = copy_adapter(model, "now")
                            norms[number] = float(f"{distance(now, start):.4g}")
                            if count == 10_000 and number in (8, 64, 512):
                                moved.setdefault(number, []).append(now)

                    load_adapter(model, start)
                    steps = MOST_STEPS if count == 10_000 else FEW_STEPS
                    train(
                        model,
                        texts[kind, count],
                        replace(hyperparameters, local_steps=steps),
                        pad_token_id=PAD_TOKEN_ID,
                        seed=1,
                        on_step=on_step,
                    )
                    curves.append(
                        {
                            "adapter": adapter_name,
                            "training": training_name,
                            "stage": stage,
                            "data": kind,
                            "examples": count,
                            "step": float(f"{step:.4g}"),
                            "norms": norms,
                        }
                    )
                for number, updates in moved.items():
                    for cosine in pair_cosines(start, updates):
                        cosines.append(
                            {"stage": stage, "steps": number, "cosine": round(cosine, 3)}
                        )
                load_adapter(model, start)
            print(
                f"{adapter_name}, {training_name}: {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return {"curves": curves, "cosines": cosines}


def pair_cosines(start: Adapter, updates: Sequence[Adapter]) -> list[float]:
    """Return the cosines between the changes of every two adapters, over all modules."""
    from fedmomentum.linalg.matrix import inner

    products = [[0.0] * len(updates) for _ in updates]
    for module in start.modules:
        before: Tensor = start.effective(module).dense()
        changes = [update.effective(module).dense() - before for update in updates]
        for i, one in enumerate(changes):
            for j, other in enumerate(changes):
                products[i][j] += inner(one, other)
    cosines = []
    for i in range(len(updates)):
        for j in range(i):
            cosines.append(products[i][j] / math.sqrt(products[i][i] * products[j][j]))
    return cosines


# ── drawing federations ──


@dataclass(frozen=True)
class Member:
    """A client of a drawn federation: what it has, how many steps it makes, how far it goes."""

    num_examples: int
    num_steps: int
    norm: float
    step: float

    @property
    def displacement(self) -> Displacement:
        """How far it went, as the screening takes it."""
        from fedmomentum.server.screening import Displacement

        return Displacement(self.norm, self.step, self.num_steps)


class Curves:
    """The measured curves, looked up between the steps at which they were measured."""

    def __init__(self, curves: Sequence[Mapping[str, Any]]) -> None:
        self._curves: dict[tuple[str, str, str, bool], list[Mapping[str, Any]]] = {}
        for curve in curves:
            points = sorted((int(number), norm) for number, norm in curve["norms"].items())
            for is_small in (False, True):
                if (curve["examples"] < 10_000) == is_small:
                    key = curve["adapter"], curve["training"], curve["stage"], is_small
                    self._curves.setdefault(key, []).append(
                        {"step": curve["step"], "points": points}
                    )

    def draw(
        self,
        draw: random.Random,
        adapter: str,
        training: str,
        stage: str,
        num_examples: int,
        steps: int,
    ) -> Member:
        """Sample a client; with few examples and many steps it follows a curve of few examples."""
        is_small = num_examples <= 16 and 2 < steps <= FEW_STEPS
        curve = draw.choice(self._curves[adapter, training, stage, is_small])
        return Member(num_examples, steps, _between(curve["points"], steps), curve["step"])


def _between(points: Sequence[tuple[int, float]], steps: int) -> float:
    """Return the norm after a number of steps, interpolated linearly in logarithms."""
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if before <= steps <= after:
            share = math.log(steps / before) / math.log(after / before)
            return float(low * (high / low) ** share)
    raise ValueError(f"no curve has {steps} steps")


Sizes = Callable[[random.Random, int], list[int]]


def _log_uniform(draw: random.Random, count: int) -> list[int]:
    return [round(10 ** draw.uniform(0, 4)) for _ in range(count)]


SIZES: dict[str, Sizes] = {
    "equal": lambda draw, count: [1000] * count,
    "from 1 to 10,000": _log_uniform,
    "one of 10,000, others of 8": lambda draw, count: [10_000] + [8] * (count - 1),
    "one of 1, others of 10,000": lambda draw, count: [1] + [10_000] * (count - 1),
}
AMOUNTS: dict[str, Callable[[int], int]] = {
    "1 epoch": lambda num_examples: math.ceil(num_examples / BATCH_SIZE),
    "10 steps": lambda num_examples: 10,
    "128 steps": lambda num_examples: 128,
}
CLIENTS = (2, 3, 10, 100)


def federations(
    curves: Curves,
    sizes: str,
    amount: str,
    count: int,
    draws: int,
    *,
    training: str = "",
    mixed: bool = False,
) -> Iterator[list[Member]]:
    """Draw federations of honest clients: each of one training and stage, with any data.

    Args:
        curves: What was measured.
        sizes: One of `SIZES`.
        amount: One of `AMOUNTS`.
        count: How many clients.
        draws: How many federations.
        training: Only this training; empty: any.
        mixed: Whether clients have other ranks and modules, too.
    """
    draw = random.Random(f"{sizes}/{amount}/{count}/{training}/{mixed}")
    for _ in range(draws):
        adapter, one = draw.choice(
            [s for s in SETTINGS if not training or s[1].startswith(training)]
        )
        stage = draw.choice(STAGES)
        if mixed:
            one = "AdamW 1e-3"
        yield [
            curves.draw(
                draw,
                draw.choice(list(ADAPTERS)) if mixed else adapter,
                one,
                stage,
                size,
                AMOUNTS[amount](size),
            )
            for size in SIZES[sizes](draw, count)
        ]


# ── screening ──


def left_out_now(clients: Sequence[Member], ratio: float = RATIO) -> set[int]:
    """Return who is left out by the rule of a run."""
    from fedmomentum.server.screening import screen

    displacements = {str(i): {"adapter": c.displacement} for i, c in enumerate(clients)}
    return {
        int(name)
        for name, result in screen(displacements, ratio, is_step_known=True).items()
        if result.reason
    }


def left_out_before(clients: Sequence[Member], ratio: float = RATIO) -> set[int]:
    """Return who was left out by the rule before: norms as they are, against their median."""
    if len(clients) < 3:
        return set()
    median = statistics.median(client.norm for client in clients)
    return {i for i, client in enumerate(clients) if client.norm > ratio * median}


def _still(clients: Sequence[Member]) -> list[Member]:
    """Return the federation with all but one or two clients converged: they hardly move."""
    return [
        c
        if i < 1 + (len(clients) > 3)
        else Member(c.num_examples, c.num_steps, c.norm * 1e-6, c.step)
        for i, c in enumerate(clients)
    ]


def attacked(
    clients: Sequence[Member], number: int, factor: float, amount: str, claim: int | None
) -> list[Member]:
    """Return the federation with the first clients' updates scaled, maybe with a false claim."""
    members = list(clients)
    for i in range(number):
        one = clients[i]
        size = claim or one.num_examples
        steps = AMOUNTS[amount](size)
        members[i] = Member(size, steps, one.norm * factor, one.step)
    return members


# ── tables ──


def _share(left_out: int, all_of_them: int) -> str:
    share = 100 * left_out / all_of_them
    return "0" if share == 0 else f"{share:.2g}" if share < 10 else f"{share:.0f}"


def honest_table(measured: Mapping[str, Any]) -> str:
    """Return the table of honest clients left out, in percent: before, and now."""
    curves = Curves(measured["curves"])
    lines = [
        "| local work | examples | others | " + " | ".join(f"{n} clients" for n in CLIENTS) + " |",
        "|---|---|---|" + "---|" * len(CLIENTS),
    ]
    kinds = [(amount, sizes, "as they are") for amount in AMOUNTS for sizes in SIZES]
    kinds += [
        ("1 epoch", "from 1 to 10,000", "other ranks and modules"),
        ("10 steps", "equal", "hardly move"),
        ("1 epoch", "from 1 to 10,000", "hardly move"),
    ]
    for amount, sizes, others in kinds:
        cells = []
        for count in CLIENTS:
            before = now = total = 0
            for drawn in federations(
                curves,
                sizes,
                amount,
                count,
                max(20, 600 // count),
                mixed=others.startswith("other"),
            ):
                clients = _still(drawn) if others == "hardly move" else drawn
                before += len(left_out_before(clients))
                now += len(left_out_now(clients))
                total += len(clients)
            cells.append(f"{_share(before, total)} → {_share(now, total)}")
        lines.append(f"| {amount} | {sizes} | {others} | {' | '.join(cells)} |")
    return "\n".join(lines)


ATTACKS = {
    "× 10": (10.0, None),
    "× 100": (100.0, None),
    "× 10,000": (1e4, None),
    "× 100, claims 10,000 examples": (100.0, 10_000),
    "× −1": (-1.0, None),
}


def attack_table(measured: Mapping[str, Any]) -> str:
    """Return the table of rejected attackers and honest clients in percent: before, and now."""
    curves = Curves(measured["curves"])
    groups = ((1, 2), (1, 3), (1, 10), (3, 10))
    lines = [
        "| local work, training | update | "
        + " | ".join(f"{bad} of {count}" for bad, count in groups)
        + " | honest clients |",
        "|---|---|" + "---|" * (len(groups) + 1),
    ]
    for amount, sizes, training in (
        ("10 steps", "equal", "AdamW"),
        ("128 steps", "equal", "AdamW"),
        ("128 steps", "equal", "SGD"),
        ("1 epoch", "from 1 to 10,000", "AdamW"),
    ):
        for attack, (factor, claim) in ATTACKS.items():
            if claim and amount != "1 epoch":
                continue
            cells = []
            honest_before = honest_now = honest_total = 0
            for bad, count in groups:
                before = now = total = 0
                for drawn in federations(curves, sizes, amount, count, 200, training=training):
                    clients = attacked(drawn, bad, abs(factor), amount, claim)
                    out_before = left_out_before(clients)
                    out_now = left_out_now(clients)
                    before += len({i for i in out_before if i < bad})
                    now += len({i for i in out_now if i < bad})
                    total += bad
                    honest_before += len({i for i in out_before if i >= bad})
                    honest_now += len({i for i in out_now if i >= bad})
                    honest_total += count - bad
                cells.append(f"{_share(before, total)} → {_share(now, total)}")
            cells.append(
                f"{_share(honest_before, honest_total)} → {_share(honest_now, honest_total)}"
            )
            lines.append(f"| {amount}, {training} | {attack} | {' | '.join(cells)} |")
    return "\n".join(lines)


def largest_ratio(drawn: Iterator[list[Member]]) -> float:
    """Return how many times as far as the others an honest client moved at most."""
    from fedmomentum.server.screening import screen

    largest = 0.0
    for clients in drawn:
        displacements = {
            str(i): {"adapter": client.displacement} for i, client in enumerate(clients)
        }
        for result in screen(displacements, RATIO, is_step_known=True).values():
            largest = max(largest, result.ratio or 0.0)
    return largest


def facts(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that the text of docs/appendix/screening.md names."""
    reach = [
        norm / (curve["step"] * int(number))
        for curve in measured["curves"]
        for number, norm in curve["norms"].items()
    ]
    cosines = [pair["cosine"] for pair in measured["cosines"]]
    curves = Curves(measured["curves"])
    return {
        "largest_ratio_equal": largest_ratio(federations(curves, "equal", "10 steps", 10, 50)),
        "largest_ratio_unequal": largest_ratio(
            federations(curves, "from 1 to 10,000", "1 epoch", 10, 50)
        ),
        "largest_reach": max(reach),
        "smallest_reach": min(reach),
        "least_cosine": min(cosines),
        "most_cosine": max(cosines),
        "share_below_tenth": sum(abs(cosine) < 0.1 for cosine in cosines) / len(cosines),
    }


def main() -> None:
    """Measure, if asked, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="train, and write screening.json")
    if parser.parse_args().measure:
        measured = measure()
        text = json.dumps(measured)
        MEASURED.write_text(
            text.replace('{"adapter"', '\n{"adapter"').replace('"cosines"', '\n"cosines"') + "\n"
        )
    measured = json.loads(MEASURED.read_text())
    print(honest_table(measured), attack_table(measured), facts(measured), sep="\n\n")


if __name__ == "__main__":
    main()
