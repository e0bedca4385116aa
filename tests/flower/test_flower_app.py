"""The example app of our own server and clients: its two apps in one process; see also tests/faults/flower_app.py."""

import importlib
import subprocess
import sys
import tomllib

import pytest

pytest.importorskip("flwr")

from fedmomentum.errors import ConfigError, QuorumError
from fedmomentum.flower import app_client, process_clients, transport
from fedmomentum.flower.app_settings import read_node, read_run
from fedmomentum.formats.status_file import read_status
from tests.flower.app_config import EXAMPLE, flat
from tests.flower.loop_grid import LoopGrid
from tests.runs import chain, objects, start, timeless, tiny_config

# after fedmomentum.flower, which sets what flwr reads when it is imported
from flwr.app import Context, RecordDict  # isort: skip


@pytest.fixture
def apps(monkeypatch):
    """The example's ServerApp and ClientApp; all nodes are in this process, as in the simulation engine."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.setattr(app_client, "_process_lives_on", lambda: True)
    monkeypatch.setattr(process_clients, "_CLIENTS", {})
    monkeypatch.setattr(transport, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(transport, "POLL_SECONDS", 0.01)
    modules = [importlib.import_module(f"flower_app.{name}_app") for name in ("server", "client")]
    return [module.app for module in modules]


def run(apps, run_config, *node_configs):
    server, client = apps
    contexts = [
        Context(1, i, config, RecordDict(), run_config) for i, config in enumerate(node_configs)
    ]
    nodes = {10 + i: (lambda message, c=c: client(message, c)) for i, c in enumerate(contexts)}
    server(LoopGrid(nodes), Context(1, 1, {}, RecordDict(), run_config))


def test_every_bit_is_that_of_a_run_in_one_process_and_it_resumes(apps, tmp_path, monkeypatch):
    """Three rounds, the last in a second run of the app, as after a SuperLink that died."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(
        tmp_path,
        num_clients=2,
        training={"function": "tests.runs:nudge"},
        run={"keep_checkpoints": 99},
    )
    files = config.data.client_files
    nodes = [{"name": name, "data": file} for name, file in files.items()]
    values = flat(config, tmp_path / "app")
    run(apps, values | {"federation.num-rounds": 2}, *nodes)
    run(apps, values | {"resume": True}, *nodes)
    start(config, tmp_path / "one", function=None)
    assert chain(tmp_path / "app") == chain(tmp_path / "one") and len(chain(tmp_path / "app")) == 4
    assert objects(tmp_path / "app") == objects(tmp_path / "one")
    accepted = [row["accepted"] for row in timeless(tmp_path / "app")]
    assert accepted == [[], *[["site0", "site1"]] * 3]
    # what users look at: the status, the log, the report, and stores beside the nodes
    assert read_status(tmp_path / "app").phase == "ended"
    assert "Round 3 is saved, 2 of 2 clients count" in (tmp_path / "app" / "server.log").read_text()
    assert (tmp_path / "app" / "report.html").is_file()
    assert {path.name for path in (tmp_path / "nodes").iterdir()} == {"site0", "site1"}


def test_with_partition_ids_the_nodes_share_the_runs_data(apps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(
        tmp_path,
        num_clients=1,
        training={"function": "tests.runs:nudge"},
        federation={"num_rounds": 1, "join_timeout": 5.0},
        evaluation={"every": 0},
    )
    (file,) = config.data.client_files.values()
    values = flat(
        config, tmp_path / "app", data__source=file, data__num_clients=2, data__min_examples=2
    )
    nodes = [{"partition-id": i, "num-partitions": 2} for i in (1, 0)]
    run(apps, values, *nodes)
    assert timeless(tmp_path / "app")[-1]["accepted"] == ["client-0", "client-1"]
    with pytest.raises(ConfigError, match="partition-id is 2, .* clients client-0, client-1"):
        node = read_node(values, {"partition-id": 2})
        app_client._client_name(node, Context(1, 1, {}, RecordDict(), {}))


def test_a_run_without_its_clients_ends_with_the_reason(apps, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, num_clients=2, federation={"join_timeout": 0.1})
    values = flat(config, tmp_path / "app")
    with pytest.raises(QuorumError, match="0 of 2 .* 2 that have not joined"):
        run(apps, values, {"data": "x"}, {"name": "site1"})
    log = "\n".join(record.message for record in caplog.records)
    assert "node 10 takes no part: ConfigError: the node config has" in log
    assert "node 11 takes no part: ConfigError: the node config names no data of site1" in log
    assert not (tmp_path / "app" / "config.toml").exists()
    # nothing of the failed run blocks the next
    with pytest.raises(ConfigError, match="privacy.secure-aggregation needs a server and nodes"):
        run(apps, values | {"privacy.secure-aggregation": True})


def test_the_settings_of_the_example_are_valid():
    table = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    values = {}
    for key, value in table["config"].items():
        inner = value if isinstance(value, dict) else {None: value}
        values |= {key if name is None else f"{key}.{name}": v for name, v in inner.items()}
    settings, config = read_run(values)
    assert settings.num_clients == 2 and not settings.resume
    assert config.federation.num_rounds == 3 and config.model.name == "smollm2-135m-instruct"
    node = read_node(values, {"name": "north", "data": "letters.jsonl"})
    assert node.config.lora == config.lora and node.keep_warm == 600


def test_a_clientapp_starts_without_torch_and_its_threads_wait_briefly():
    """Flower starts a process for every message, and torch takes seconds to load."""
    code = """
import os, sys, flower_app.client_app
from fedmomentum.utils.process import WAIT_SETTINGS
print(sorted({"torch", "transformers", "peft"} & {*sys.modules}), any(name in os.environ for name in WAIT_SETTINGS))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLE, check=True)
    assert result.stdout.strip() == "[] True"
