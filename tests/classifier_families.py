"""A tiny sequence classifier of every family, trained by two clients and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KINDS,
)

from fedmomentum.base_model.families import ClassifierFamily
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import from_dict
from fedmomentum.errors import FedMomentumError
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.lora.linear_modules import find_linear_modules
from fedmomentum.lora.module_summary import summarize
from fedmomentum.objectives.classification import SequenceClassification
from fedmomentum.run.saved_model import open_result
from tests.classifiers import LABELS, classifier_tokenizer, labeled_rows, write_rows
from tests.families import (
    FAMILIES,
    RANK,
    SMALLEST_CHANGE,
    TOLERANCE,
    TOO_LARGE,
    gradient_step,
    make_config,
    make_model,
    reason,
)
from tests.runs import start

NOT_TRIED = {
    "canine": "reads characters, and has no table of tokens",
    "cohere_compass_text": "its default configuration is incomplete",
    "funnel": "AutoModel cannot make its encoder",
    "layoutlmv2": "needs detectron2",
    "layoutlmv3": "reads the layout of a page",
    "lilt": "reads the layout of a page",
    "mistral4": "the language model of image-text models",
    "modernvbert": "images with text",
    "perceiver": "large whatever the configuration",
    "reformer": "autograd has no record of its reversible layers",
    "t5gemma2": "large whatever the configuration",
    "ultravbert": "images with text",
}
"""Why no tiny classifier is made of a family."""
CLASSIFIERS = sorted(KINDS.keys() - NOT_TRIED.keys())
OBJECTIVE = SequenceClassification(LABELS)
OVERRIDES: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "hidden_dim": 48},
    "esmc": {"num_key_value_heads": 4},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 32},
    "squeezebert": {
        f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")
    },
}
TOKENS = torch.tensor([[2, 9, 30, 41, 7, 12, 60, 33, 8, 3]])


def write_base(family: str, folder: Path) -> None:
    """Write the tiny encoder or decoder of a family, without a classifier's head."""
    is_seq2seq = CONFIG_MAPPING[family]().is_encoder_decoder
    if family in FAMILIES and not is_seq2seq:
        model = make_model(family)
    else:
        config = make_config(CONFIG_MAPPING[family], family, OVERRIDES.get(family))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModel.from_config(config).eval()
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.1)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size < TOO_LARGE, f"{family} is not tiny: {size} parameters"
    model.save_pretrained(folder)
    classifier_tokenizer("llama" if family in FAMILIES else "roberta").save_pretrained(folder)


def classifier_settings(folder: Path) -> Config:
    """Two clients, two rounds, and the default targets."""
    files = {}
    for client in range(2):
        rows = labeled_rows(client, 12)
        files[f"site{client}"] = write_rows(folder / f"site{client}.jsonl", rows)
    return from_dict(
        {
            "model": {
                "name": str(folder / "base"),
                "dtype": "float32",
                "device": "cpu",
                "task": "sequence-classification",
            },
            "lora": {"rank": RANK, "lora-alpha": 6.0, "target-modules": []},
            "data": {"client-files": files, "test-fraction": 0.25, "max-length": 32},
            "training": {"local-steps": 1, "batch-size": 4, "optimizer-state": "fresh"},
            "federation": {"num-rounds": 2},
            "evaluation": {"every": 0, "final-num-examples": 6},
            "run": {"threads": 1},
        }
    )


def one_step(model, examples, *, on_step, **_):
    """Train by one large step of gradient descent; every factor must have a gradient."""
    batch = OBJECTIVE.collate([examples.example(row) for row in range(4)], 0)
    return gradient_step(model, OBJECTIVE, batch, size=0.1, on_step=on_step)


def run_classifier(family: str, folder: Path) -> ClassifierFamily:
    """Train and export a family's tiny classifier, check the exports, and record the result.

    Raises:
        AssertionError: If an export is another model than the other, or than it should be.
    """
    base = folder / "base"
    write_base(family, base)
    adapted: list[str] = []
    is_peft_default = False
    refused = ""
    try:
        start(classifier_settings(folder), folder / "run", function=one_step)
        result = open_result(folder / "run").model
        export_adapter(result, folder / "adapter", base_directory=base)
        export_merged(result, folder / "merged", base_directory=base)
        adapted = summarize(result.adapter.modules)
        is_peft_default = _compare_exports(folder)
    except FedMomentumError as error:
        # A training that fails is a bug, not a refusal.
        assert "usable update" not in str(error), error
        refused = reason(error, base)
    return ClassifierFamily(family, KINDS[family], adapted, is_peft_default, refused)


def _compare_exports(folder: Path) -> bool:
    """Compare the exports by stock libraries alone; return whether PEFT knows the architecture."""
    load = AutoModelForSequenceClassification.from_pretrained
    with torch.no_grad():
        stock = load(folder / "base", num_labels=len(LABELS)).eval()
        is_peft_default = find_linear_modules(stock).default is not None
        adapted = PeftModel.from_pretrained(stock, folder / "adapter").eval()
        by_adapter = adapted(input_ids=TOKENS).logits
        with adapted.disable_adapter():
            before = adapted(input_ids=TOKENS).logits
        by_merged = load(folder / "merged").eval()(input_ids=TOKENS).logits
    norm = by_merged.norm()
    assert (by_adapter - by_merged).norm() < TOLERANCE * norm
    assert (by_merged - before).norm() > SMALLEST_CHANGE * norm
    return is_peft_default
