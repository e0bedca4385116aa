"""Adapters as training tools write them, and how each is read; docs/adapters.md has the table.

`python -m tests.lora.adapter_cases` writes it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedmomentum.aggregation.registry import build_method
from fedmomentum.errors import FedMomentumError
from fedmomentum.run.aggregate import aggregate_directories
from tests.tiny import tiny_llama

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
MARKS = ("<!-- adapters: made by `python -m tests.lora.adapter_cases` -->", "<!-- end -->")
HUB_NAME = "org/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Case:
    """An adapter beside one of PEFT's that names `org/model`.

    Attributes:
        title: What wrote it.
        config: How its adapter_config.json differs.
        outcome: `combined`, or what the refusal says.
        base: `--base` that helps, where one is needed.
    """

    title: str
    config: Mapping[str, Any]
    outcome: str
    base: str = ""


CASES = [
    Case("PEFT, TRL", {"base_model_name_or_path": HUB_NAME}, "combined"),
    Case(
        "the same base in the hub's cache, under its revision",
        {
            "base_model_name_or_path": f"/home/a/.cache/huggingface/hub/models--org--model/snapshots/{COMMIT}"
        },
        "different revisions",
        base=f"{HUB_NAME}@main",
    ),
    Case(
        "Unsloth",
        {
            "base_model_name_or_path": "unsloth/model-bnb-4bit",
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
            "corda_config": None,
            "qalora_group_size": 16,
            "target_modules": "(?:.*?(?:self_attn).*?(?:q_proj|v_proj).*?)",
        },
        "different base models",
        base=HUB_NAME,
    ),
    Case(
        "LLaMA-Factory, axolotl: a local path",
        {"base_model_name_or_path": "/workspace/model"},
        "different base models",
        base=HUB_NAME,
    ),
    Case(
        "made from Python: no base",
        {"base_model_name_or_path": None},
        "different base models",
        base=HUB_NAME,
    ),
    Case(
        "another revision",
        {"revision": COMMIT},
        "different revisions",
        base=f"{HUB_NAME}@{COMMIT}",
    ),
    Case(
        "fields of other initializations, unused",
        {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "gaussian"},
        "combined",
    ),
    Case("rsLoRA, ranks by pattern", {"use_rslora": True, "lora_dropout": 0.1}, "combined"),
    Case("PiSSA", {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    Case("DoRA", {"use_dora": True}, "has use_dora = True"),
    Case("trained biases", {"bias": "lora_only"}, "has bias = 'lora_only'"),
]


def write_adapter(base: Path, out: Path, changes: Mapping[str, Any], seed: int = 0) -> Path:
    """Write an adapter by PEFT, and change its configuration as another tool would have it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2 + seed, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(out)
    file = out / "adapter_config.json"
    settings = {**json.loads(file.read_text()), "base_model_name_or_path": HUB_NAME, **changes}
    file.write_text(json.dumps(settings))
    return out


def outcome(case: Case, first: Path, second: Path, *, base: str = "") -> str:
    """Return what combining says: `combined`, or the refusal."""
    try:
        result = aggregate_directories([first, second], build_method("fedmomentum", {}), base=base)
    except FedMomentumError as error:
        return str(error)
    assert result.num_adapters == 2
    return "combined"


def results() -> list[tuple[Case, str, str]]:
    """Return each case with its outcome, and that with the options that help."""
    found = []
    with TemporaryDirectory() as folder:
        base = tiny_llama(Path(folder) / "base")
        first = write_adapter(base, Path(folder) / "first", {}, seed=1)
        for number, case in enumerate(CASES):
            second = write_adapter(base, Path(folder) / str(number), case.config)
            alone = outcome(case, first, second)
            helped = ""
            if case.base:
                helped = outcome(case, first, second, base=case.base)
            found.append((case, alone, helped))
    return found


def table(found: list[tuple[Case, str, str]]) -> str:
    """Return the table of docs/adapters.md."""
    rows = ["| adapter | beside one of `org/model` |", "|---|---|"]
    for case, alone, helped in found:
        result = alone
        if helped == "combined":
            option = case.base.replace(COMMIT, COMMIT[:8])
            result = f"asks which it is; combined with `--base {option}`"
        elif alone != "combined":
            result = f"refused: `{case.outcome.replace(' is ', ' = ').removeprefix('has ')}`"
        rows.append(f"| {case.title} | {result} |")
    return "\n".join(rows)


def page(text: str, found: list[tuple[Case, str, str]]) -> str:
    """Return the page with a new table."""
    start, end = map(re.escape, MARKS)
    new = f"{MARKS[0]}\n{table(found)}\n{MARKS[1]}"
    return re.sub(f"{start}.*?{end}", lambda _: new, text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), results()))
