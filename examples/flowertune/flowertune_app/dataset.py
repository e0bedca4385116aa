"""One client's share of the rows, as batches of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer


def load_rows(run_config: Mapping[str, Any], partition: int, num_partitions: int) -> list[str]:
    """Return this client's texts."""
    lines = Path(str(run_config["data.file"])).read_text().splitlines()
    rows = [json.loads(line) for line in lines[partition::num_partitions]]
    return [f"{row['instruction']}\n{row['response']}" for row in rows]


def batches(
    texts: list[str], run_config: Mapping[str, Any], num_steps: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of randomly chosen texts, with labels."""
    tokenizer: Any = AutoTokenizer.from_pretrained(
        str(run_config["model.name"]), trust_remote_code=False
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        size = int(run_config["train.batch-size"])
        chosen = torch.randint(len(texts), (size,), generator=generator).tolist()
        batch = tokenizer(
            [texts[i] + tokenizer.eos_token for i in chosen],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=int(run_config["data.max-length"]),
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }
