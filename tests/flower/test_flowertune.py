"""The example in FlowerTune's shape: its two apps in one process, and by `flwr run` on a SuperLink."""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from peft import set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fedmomentum.cli.main import app as cli
from fedmomentum.flower import apply_base_residual
from fedmomentum.global_model.model import GlobalModel
from tests.flower.loop_grid import LoopGrid
from tests.tiny import tiny_llama

# after fedmomentum.flower, which sets what flwr reads when it is imported
from flwr.app import Context, RecordDict  # isort: skip

EXAMPLE = Path(__file__).parents[2] / "examples" / "flowertune"
TOKENS = torch.arange(4, 24)[None]


def settings(folder):
    """The example's own settings, with a tiny model and few steps."""
    rows = [{"instruction": f"say {i}", "response": f"it is {i % 7}"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    app = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    values = {}
    for key, value in app["config"].items():
        if isinstance(value, dict):
            values |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            values[key] = value
    return values | {
        "model.name": str(tiny_llama(folder / "base")),
        "data.file": str(folder / "rows.jsonl"),
        "data.max-length": 24,
        "train.learning-rate": 0.01,
        "train.steps": 3,
        "num-server-rounds": 2,
        "save-to": str(folder / "model"),
    }


def check(folder, capsys=None):
    """The saved model has a residual, and exports to what a client would have."""
    model = GlobalModel.load(folder / "model")
    assert model.server_round == 2 and model.base_update
    assert set(model.adapter.scalings.values()) == {2.0}
    with pytest.raises(SystemExit) as ended:
        cli(["export", str(folder / "model"), "--to", "merged", "--out", str(folder / "merged")])
    assert ended.value.code == 0
    return model


def test_the_two_apps_train_and_export(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    client_app = importlib.import_module("flowertune_app.client_app")
    server_app = importlib.import_module("flowertune_app.server_app")
    run_config = settings(tmp_path)

    def node(partition):
        config = {"partition-id": partition, "num-partitions": 2}
        context = Context(1, partition, config, RecordDict(), run_config)
        return lambda message: client_app.app(message, context)

    grid = LoopGrid({10: node(0), 20: node(1)})
    server_app.app(grid, Context(1, 1, {}, RecordDict(), run_config))
    check(tmp_path)

    # a client of the last round: the base plus residual, and the adapter of the message before it
    models = importlib.import_module("flowertune_app.models")
    live = models.get_model(run_config)
    content = grid.sent[-1].content
    apply_base_residual(live, content)
    set_peft_model_state_dict(live, content["arrays"].to_torch_state_dict())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(run_config["model.name"], dtype=torch.float32)
    with torch.no_grad():
        start, before, after = (m.eval()(TOKENS).logits for m in (base, live, merged))
    # each round moves the model, in about the same direction
    assert (before - start).norm() > 0.1 and (after - before).norm() < 2 * (after - start).norm()
