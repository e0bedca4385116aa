"""The model card that comes with an export."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.utils.io import write_atomically

if TYPE_CHECKING:
    from fedmomentum.base_model.identity import BaseIdentity
    from fedmomentum.global_model.model import GlobalModel

# How stock transformers quantizes a base on loading, by the kind of quantization: the class that
# says so, its arguments, and the one that names modules to leave alone.
_CONFIGS = {
    "nf4": (
        "BitsAndBytesConfig",
        'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
        "llm_int8_skip_modules",
    ),
    "int8": ("BitsAndBytesConfig", "load_in_8bit=True", "llm_int8_skip_modules"),
    "torchao-int8": ("TorchAoConfig", "Int8WeightOnlyConfig()", "modules_to_not_convert"),
}


def write_card(
    model: GlobalModel,
    out: Path,
    library: str,
    load: str,
    *,
    is_dequantized: bool = False,
    unquantized: Sequence[str] = (),
) -> None:
    """Write the model card of an export.

    Args:
        model: The global model.
        out: The export's directory.
        library: `peft` or `transformers`.
        load: The line of code that loads the export.
        is_dequantized: Whether the base was quantized, and merged into what it dequantizes to.
        unquantized: Of a base that is quantized on loading, the linear layers that are not.
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
        head += _loading(base, load, unquantized)
    card = f"""---
library_name: {library}
base_model: {base.name}
tags: [fedmomentum, federated-learning, lora]
---

# Federated {kind} of {base.name}

Made with fedmomentum: several clients fine-tuned one model with LoRA on data that stayed with them.

| | |
|---|---|
| method | `{model.method}` |
| rounds | {model.server_round} |
| base model | {base.name}{revision} |
| base SHA-256 | `{base.sha256 or "unknown: combined without the base at hand"}` |
| tokenizer SHA-256 | `{base.tokenizer_sha256 or "unknown"}` |
| base version after all merges | `{model.version}` |
| adapted modules | {len(model.adapter.modules)} |
{labels}
This directory is the complete result{addition}: `{load}`.
{head}"""
    write_atomically(out / "README.md", card.encode())


def _loading(base: BaseIdentity, load: str, unquantized: Sequence[str]) -> str:
    """Return the code that loads an adapter on its base with stock libraries."""
    kind = "AutoModelForSequenceClassification" if base.labels else "AutoModelForCausalLM"
    imports = ["from peft import PeftModel"]
    lines = [f"    {base.name!r},"]
    if base.labels:
        lines.append(f"    num_labels={len(base.labels)},")
        lines.append(f"    id2label={dict(enumerate(base.labels))},")
    if base.quantization is not None:
        config, arguments, skip = _CONFIGS[base.quantization.kind]
        imports.append(f"from transformers import {kind}, {config}")
        if config == "TorchAoConfig":
            imports.append("from torchao.quantization import Int8WeightOnlyConfig")
        lines.append(f"    quantization_config={config}(")
        lines.append(f"        {arguments},")
        if unquantized:
            # The libraries take names for patterns.
            patterns = [re.escape(path) for path in unquantized]
            lines.append(f"        {skip}={patterns!r},")
        lines.append("    ),")
    else:
        imports.append(f"from transformers import {kind}")
    call = [f"base = {kind}.from_pretrained(", *lines, ")", f"model = {load}"]
    return "\n```python\n" + "\n".join([*imports, "", *call]) + "\n```\n"


def _cell(text: str) -> str:
    """Return text as it may stand in a table of Markdown."""
    return re.sub(r"[`|<>]", "_", text)
