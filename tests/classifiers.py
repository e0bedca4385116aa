"""Tiny bases for sequence classification, labeled data, and runs on them in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedTokenizerFast,
)

from fedmomentum.config.schema import Config
from fedmomentum.config.toml import from_dict
from tests.tiny import END_TOKEN_ID, PAD_TOKEN_ID, START_TOKEN_ID, tiny_tokenizer

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": PAD_TOKEN_ID,
    "bos_token_id": START_TOKEN_ID,
    "eos_token_id": END_TOKEN_ID,
}
DISTILBERT = {
    "vocab_size": 100,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": PAD_TOKEN_ID,
}
BERT = {"type_vocab_size": 2}
MODERNBERT = {
    "cls_token_id": START_TOKEN_ID,
    "sep_token_id": END_TOKEN_ID,
    "attn_implementation": "sdpa",
    "reference_compile": False,
}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "type_vocab_size": 0,
    "position_biased_input": False,
}
LLAMA = {"num_key_value_heads": 2}
# Kind to the model type, its settings, the class of the checkpoint, and modules to adapt.
KINDS: dict[str, tuple[str, dict[str, Any], Any, list[str]]] = {
    "bert": ("bert", SIZES | BERT, AutoModel, ["query", "value"]),
    "bert-mlm": ("bert", SIZES | BERT, AutoModelForMaskedLM, ["query", "value"]),
    "roberta": ("roberta", SIZES, AutoModelForMaskedLM, ["query", "value"]),
    "distilbert": ("distilbert", DISTILBERT, AutoModelForMaskedLM, ["q_lin", "v_lin"]),
    "deberta": ("deberta-v2", SIZES | DEBERTA, AutoModel, ["query_proj", "value_proj"]),
    "modernbert": ("modernbert", SIZES | MODERNBERT, AutoModelForMaskedLM, ["Wqkv", "Wo"]),
    "llama": ("llama", SIZES | LLAMA, AutoModelForCausalLM, ["q_proj", "v_proj"]),
    "qwen2": ("qwen2", SIZES | LLAMA, AutoModelForCausalLM, ["q_proj", "v_proj"]),
}
LABELS = ("north", "east", "south")


def classifier_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """One token a character, `[start] text [end]`; segments for models that have them."""
    tokenizer = tiny_tokenizer(None)
    if model_type in ("llama", "qwen2"):
        return tokenizer
    special = [("<|im_start|>", START_TOKEN_ID), ("<|im_end|>", END_TOKEN_ID)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=special,
    )
    names = ["input_ids", "attention_mask"]
    if model_type == "bert":
        names.append("token_type_ids")
    tokenizer.model_input_names = names
    tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def tiny_base(folder: Path, kind: str, *, seed: int = 0) -> Path:
    """Write a base model of a kind with its tokenizer, unless it is there; return the folder."""
    model_type, settings, auto_class, _ = KINDS[kind]
    if not (folder / "config.json").is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = AutoConfig.for_model(model_type, **settings)
            auto_class.from_config(config).save_pretrained(folder)
        classifier_tokenizer(model_type).save_pretrained(folder)
    return folder


def labeled_rows(client: int, num_rows: int, labels=LABELS, *, pairs: bool = False) -> list[dict]:
    """Rows whose label follows from their text."""
    rows = []
    for number in range(num_rows):
        label = labels[(number + client) % len(labels)]
        text = f"{client}{number} {str(label)[:2]}" + "x" * (number % 5)
        texts = {"text_a": text, "text_b": f"to {number}"} if pairs else {"text": text}
        rows.append({**texts, "label": label})
    return rows


def write_rows(file: Path, rows: list[dict]) -> str:
    """Write rows as JSON lines; return the file's path."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def classifier_config(
    folder: Path, kind: str = "bert", *, num_clients: int = 3, pairs: bool = False, **sections
) -> Config:
    """A configuration of a classifier of a kind, with a file of 12, 24, ... rows a client."""
    base = tiny_base(folder / f"base-{kind}", kind)
    files = {}
    for client in range(num_clients):
        rows = labeled_rows(client, 12 * (client + 1), pairs=pairs)
        files[f"site{client}"] = write_rows(folder / f"site{client}.jsonl", rows)
    tables: dict[str, dict[str, Any]] = {
        "model": {
            "name": str(base),
            "dtype": "float32",
            "device": "cpu",
            "task": "sequence-classification",
        },
        "lora": {"rank": 2, "lora-alpha": 6.0, "target-modules": KINDS[kind][3]},
        "data": {"client-files": files, "test-fraction": 0.25, "max-length": 32},
        "training": {
            "local-steps": 2,
            "batch-size": 4,
            "learning-rate": 0.01,
            "optimizer-state": "fresh",  # stand-ins for training return no moments
        },
        "federation": {"num-rounds": 2},
        "evaluation": {"num-examples": 3, "final-num-examples": 6},
        "run": {"threads": 1, "keep-checkpoints": 2},
    }
    for name, table in sections.items():
        tables[name] = {
            **tables.get(name, {}),
            **{key.replace("_", "-"): value for key, value in table.items()},
        }
    return from_dict(tables)
