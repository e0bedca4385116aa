"""The model card that comes with an export."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.base_model.hub import BUNDLED_NAME
from fedmomentum.global_model.base_loading import is_classifier, num_labels
from fedmomentum.lora.base_names import public_base
from fedmomentum.results.formatting import number, points, with_interval
from fedmomentum.utils.io import write_atomically

if TYPE_CHECKING:
    from fedmomentum.formats.scores import Score
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.results.benchmarks import BenchmarkLine

# How stock transformers quantizes a base on loading, by kind of quantization: the configuration
# class, its arguments, and the argument that names modules to skip.
_CONFIGS = {
    "nf4": (
        "BitsAndBytesConfig",
        'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
        "llm_int8_skip_modules",
    ),
    "int8": ("BitsAndBytesConfig", "load_in_8bit=True", "llm_int8_skip_modules"),
    "torchao-int8": ("TorchAoConfig", "Int8WeightOnlyConfig()", "modules_to_not_convert"),
}


@dataclass(frozen=True)
class CardFacts:
    """Facts for a card that the model itself does not hold.

    Attributes:
        data: The user's description of the clients' data.
        scores: Held-out scores of the base model and of this one; None if there are none.
        benchmarks: This model's scores on standard benchmarks.
        location: Where the export can be loaded from; empty for its directory.
    """

    data: str = ""
    scores: tuple[Score | None, Score | None] = (None, None)
    benchmarks: Sequence[BenchmarkLine] = ()
    location: str = ""


NO_FACTS = CardFacts()


def write_card(
    model: GlobalModel,
    out: Path,
    library: str,
    load: str,
    *,
    facts: CardFacts = NO_FACTS,
    is_dequantized: bool = False,
    unquantized: Sequence[str] = (),
    stop_ids: Sequence[int] = (),
) -> None:
    """Write the model card of an export.

    Args:
        model: The global model.
        out: The export's directory.
        library: `peft` or `transformers`.
        load: The line of code that loads the export.
        facts: Facts that the model itself does not hold.
        is_dequantized: Whether the base was quantized, and the export is based on its dequantized
            weights.
        unquantized: The linear layers that are not quantized, if the base is quantized on loading.
        stop_ids: All stop tokens that the model needs; empty if the base has them already.
    """
    base = model.base
    is_adapter_directory = library == "peft"
    kind = "LoRA adapter" if is_adapter_directory else "merged model"
    revision = f" (revision {base.revision})" if base.revision else ""
    addition = " when loaded on the base model" if is_adapter_directory else ""
    labels = ""
    head = ""
    if base.labels:
        names = dict(enumerate(base.labels))
        labels = f"| labels | {len(names)}: {', '.join(map(_cell, base.labels))} |\n"
        if is_adapter_directory:
            head = (
                "\nThe base is a sequence classifier with the labels in this order; its head is in "
                "the adapter.\n"
            )
    if base.quantization is not None:
        labels += f"| base quantized on loading | {base.quantization} |\n"
    if is_dequantized:
        head += (
            "\nThe base model was quantized in training. These are its dequantized weights with "
            "what was trained; quantizing them again would round away what was trained.\n"
        )
    elif base.quantization is not None:
        head += (
            "\nIt was trained on the base model as it is when quantized on loading. On the base as "
            "it is stored it gives other answers.\n"
        )
    if is_adapter_directory:
        head += _loading(model, load, unquantized, stop_ids)
    title = base.name or "a base model that is not published"
    card = f"""---
{_metadata(model, library)}
---

# Federated {kind} of {title}

Made with fedmomentum: several clients fine-tuned one model with LoRA on data that stayed with them.

| | |
|---|---|
| method | `{model.method}` |
| rounds | {model.server_round} |
| base model | {base.name or "not published"}{revision} |
| base SHA-256 | `{base.sha256 or "unknown: combined without the base at hand"}` |
| tokenizer SHA-256 | `{base.tokenizer_sha256 or "unknown"}` |
| base version after all merges | `{model.version}` |
| adapted modules | {len(model.adapter.modules)} |
{labels}
This directory is the complete result{addition}: `{load}`.
{head}{_data(facts)}{_scores(facts)}{_benchmarks(facts)}"""
    write_atomically(out / "README.md", card.encode())


def _metadata(model: GlobalModel, library: str) -> str:
    """Return the card's front matter; JSON strings are valid YAML."""
    base = model.base
    lines = [f"library_name: {library}"]
    # The hub only accepts names on the hub.
    name, _ = public_base(base.name, base.revision)
    if name and name not in (BUNDLED_NAME, "unknown"):
        relation = "adapter" if library == "peft" else "finetune"
        lines += [f"base_model: {json.dumps(name)}", f"base_model_relation: {relation}"]
    task = "text-classification" if is_classifier(model.adapter) else "text-generation"
    lines += [f"pipeline_tag: {task}", "tags: [fedmomentum, federated-learning, lora]"]
    return "\n".join(lines)


def _data(facts: CardFacts) -> str:
    return f"\n## Data\n\n{facts.data.strip()}\n" if facts.data.strip() else ""


def _scores(facts: CardFacts) -> str:
    """Return the table of held-out scores of the base model and this one."""
    base, tuned = facts.scores
    if tuned is None:
        return ""
    lines = [
        "",
        "## Held-out examples of the clients",
        "",
        f"| | {tuned.measure}, % [95 % interval] | loss, {tuned.loss_unit} | examples |",
        "|---|---|---|---|",
    ]
    for name, score in (("base model", base), ("this model", tuned)):
        if score is not None:
            cells = (with_interval(score.exact_match, score.interval), number(score.loss))
            lines.append(f"| {name} | {cells[0]} | {cells[1]} | {score.num_examples:,} |")
    return "\n".join(lines) + "\n\nThe intervals are Wilson's.\n"


def _benchmarks(facts: CardFacts) -> str:
    """Return the table of scores on standard benchmarks."""
    if not facts.benchmarks:
        return ""
    lines = [
        "",
        "## Benchmarks",
        "",
        "| task, metric | base model, % [95 % interval] | this model | difference in points | "
        "examples |",
        "|---|---|---|---|---|",
    ]
    for line in facts.benchmarks:
        score = line.score
        base = "–" if line.base is None else with_interval(line.base.fraction, line.base.interval)
        cells = [f"{line.task}, {score.name}", base, with_interval(score.fraction, score.interval)]
        cells += [_difference(line), f"{score.num_examples:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _difference(line: BenchmarkLine) -> str:
    if line.difference is None:
        return "–"
    change, low, high = line.difference
    return f"{points(change)} [{points(low)}, {points(high)}]"


def _loading(
    model: GlobalModel, load: str, unquantized: Sequence[str], stop_ids: Sequence[int]
) -> str:
    """Return the code that loads an adapter on its base with stock libraries."""
    base = model.base
    is_labeled = is_classifier(model.adapter)
    kind = "AutoModelForSequenceClassification" if is_labeled else "AutoModelForCausalLM"
    imports = ["from peft import PeftModel"]
    lines = [f"    {base.name or 'PATH-OF-THE-BASE-MODEL'!r},"]
    if base.name == BUNDLED_NAME:
        # It is in a Python package, neither on the hub nor in a directory that transformers finds.
        imports.insert(0, "from fedmomentum.base_model.hub import resolve_base")
        lines = [f"    resolve_base({base.name!r}),"]
    if base.revision:
        lines.append(f"    revision={base.revision!r},")
    if base.labels:
        lines.append(f"    num_labels={len(base.labels)},")
        lines.append(f"    id2label={dict(enumerate(base.labels))},")
    elif is_labeled:
        lines.append(f"    num_labels={num_labels(model)},")
    if base.quantization is not None:
        config, arguments, skip = _CONFIGS[base.quantization.kind]
        imports.append(f"from transformers import {kind}, {config}")
        if config == "TorchAoConfig":
            imports.append("from torchao.quantization import Int8WeightOnlyConfig")
        lines.append(f"    quantization_config={config}(")
        lines.append(f"        {arguments},")
        if unquantized:
            # The libraries treat names as patterns.
            patterns = [re.escape(path) for path in unquantized]
            lines.append(f"        {skip}={patterns!r},")
        lines.append("    ),")
    else:
        imports.append(f"from transformers import {kind}")
    call = [f"base = {kind}.from_pretrained(", *lines, ")", f"model = {load}"]
    if stop_ids:
        call.append(f"model.generation_config.eos_token_id = {list(stop_ids)}")
    return "\n```python\n" + "\n".join([*imports, "", *call]) + "\n```\n"


def _cell(text: str) -> str:
    """Return text that is safe in a Markdown table."""
    return re.sub(r"[`|<>]", "_", text)
