"""The example in FlowerTune's shape: its two apps in one process, and by `flwr run` on a SuperLink."""

import importlib
import json
import os
import signal
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


@pytest.mark.long
def test_flwr_run_trains_it_on_a_superlink_with_two_supernodes(tmp_path):
    """Stock flwr throughout, without TLS, on loopback; a new process for each message."""
    values = settings(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    with socket.socket() as probe, socket.socket() as probe_0, socket.socket() as probe_1:
        ports = []
        for unused in (probe, probe_0, probe_1):
            unused.bind(("127.0.0.1", 0))
            ports.append(unused.getsockname()[1])
    address = f"127.0.0.1:{ports[0]}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "{address}"\ninsecure = true\n'
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(EXAMPLE.parents[1]),
    }
    link = f"flower-superlink --insecure --host 127.0.0.1 --port {ports[0]}"
    commands = [[*link.split(), "--disable-runtime-dependency-installation"]]
    for number in (0, 1):
        node = f"flower-supernode --insecure --superlink {address} --port {ports[number + 1]}"
        data = f"partition-id={number} num-partitions=2"
        commands.append([*node.split(), "--node-config", data])
    shared = {"env": environment, "cwd": tmp_path}
    started = []
    try:
        for number, command in enumerate(commands):
            log = (tmp_path / f"{number}.log").open("w")
            started.append(
                subprocess.Popen(command, **shared, stdout=log, stderr=log, start_new_session=True)
            )
            time.sleep(8 if number == 0 else 0)
        changes = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        run = ["flwr", "run", str(EXAMPLE), "loop", "--stream", "-c", changes]
        result = subprocess.run(run, **shared, capture_output=True, text=True, timeout=420)
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # flwr's exit code is 0 also where the run failed
    text = result.stdout + result.stderr
    assert "Strategy execution finished" in text, text
    assert text.count("aggregate_train: 2 replies count") == 2
    check(tmp_path)
