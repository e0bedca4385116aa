"""Flower's flat run config and node config, as settings of ours."""

from pathlib import Path

import pytest

pytest.importorskip("flwr")

from fedmomentum.errors import ConfigError
from fedmomentum.flower.app_settings import read_node, read_run

RUN = {
    "out": "runs/x",
    "num-clients": 2,
    "resume": False,
    "lora.rank": 4,
    "lora.lora-alpha": 12,
    "lora.target-modules": '["q_proj", "v_proj"]',
    "method.settings.energy": 0.9,
    "federation.num-rounds": 7,
}
NODE = {"name": "north", "data": "letters.jsonl"}


def test_a_key_with_a_dot_is_a_key_of_the_configuration():
    settings, config = read_run(RUN)
    assert (settings.out, settings.num_clients, settings.resume) == ("runs/x", 2, False)
    assert (config.lora.rank, config.lora.scaling, config.federation.num_rounds) == (4, 3.0, 7)
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert config.method.settings == {"energy": 0.9}


def test_an_expression_in_brackets_stays_a_text():
    _, config = read_run(RUN | {"lora.target-modules": "[qv]_proj"})
    assert config.lora.target_modules == "[qv]_proj"


def test_a_nodes_own_values_win_and_its_data_is_its_own():
    """Nothing that a server says leads to another file on the node's machine."""
    run = RUN | {
        "data.source": "/etc/passwd",
        "data.test-source": "/etc/shadow",
        "data.client-files.north": "/etc/hosts",
        "data.max-length": 99,
    }
    node = read_node(run, NODE | {"lora.rank": 3, "data.test-fraction": 0.25})
    assert node.name == "north" and node.config.lora.rank == 3
    data = node.config.data
    assert data.client_files == {"north": "letters.jsonl"} and data.max_length == 99
    assert not data.source and data.test_source is None and data.test_fraction == 0.25
    assert node.store("north") == Path("nodes/north").resolve()


def test_a_run_does_not_say_how_much_privacy_a_node_spends_or_where_that_is_recorded():
    run = RUN | {
        "privacy.dp.epsilon": 3.0,
        "privacy.dp.budget": 1e9,
        "privacy.dp.ledger": "/elsewhere",
        "privacy.dp.public-units": 10**6,
        "privacy.dp.max-rows": 10**6,
    }
    dp = read_node(run, NODE).config.privacy.dp
    assert dp.epsilon == 3.0
    assert (dp.budget, dp.ledger, dp.public_units, dp.max_rows) == (None, None, None, None)
    own = {"privacy.dp.budget": 4.0, "privacy.dp.ledger": "spent"}
    dp = read_node(run, NODE | own).config.privacy.dp
    assert dp.budget == 4.0 and str(dp.ledger).endswith("spent")


def test_paths_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters.jsonl").touch()
    node = read_node(RUN, NODE | {"store": "kept"})
    assert node.config.data.client_files == {"north": str(tmp_path / "letters.jsonl")}
    assert node.store("north") == tmp_path / "kept"


def test_a_name_with_dots_is_one_name():
    node = read_node(RUN, {"name": "a.b", "data.client-files.a.b": "x.jsonl"})
    assert node.config.data.client_files == {"a.b": "x.jsonl"}


def test_with_a_partition_the_runs_data_counts():
    node = read_node(RUN | {"data.source": "rows.jsonl"}, {"partition-id": 1, "num-partitions": 2})
    assert node.name is None and node.partition_id == 1
    assert node.config.data.source == "rows.jsonl"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num-client": 2}, "num-client.*Keys without a section are out, num-clients, resume"),
        ({"num-clients": 0}, "num-clients: Expected `int` >= 1"),
        ({"num-clients": "two"}, "num-clients: Expected `int`, got `str`"),
        ({"training.local-step": 2}, "unknown key in .training.: local-step; did you mean"),
        ({"trainin.local-steps": 2}, "unknown section: trainin; did you mean training"),
        ({"lora.rank": "8"}, "lora.rank must be of type int; got '8'"),
        ({"lora.rank.x": 8}, "lora.rank.x contradicts rank"),
        ({"method.settings": 8}, "method.settings contradicts the keys below it"),
        ({"privacy.secure-aggregation": True}, "privacy.secure-aggregation needs a server and"),
        ({"privacy.roster": "roster.pub"}, "privacy.roster needs a server and nodes of ours"),
    ],
)
def test_settings_that_cannot_be_applied_are_refused_by_name(changes, words):
    for read in (read_run, lambda run: read_node(run, NODE)):
        if read is not read_run and not any("." in key for key in changes):
            continue  # what has no section is the server's alone
        with pytest.raises(ConfigError, match=words):
            read(RUN | changes)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({}, "the node config has no name; start the SuperNode with --node-config"),
        ({"name": "north"}, "names no data of north"),
        ({"data": "x.jsonl", "partition-id": 0}, "has data and no name"),
        (NODE | {"data.source": "y.jsonl"}, "has data as well as data.source"),
        (NODE | {"nam": "south"}, "nam.*Keys without a section are name, data, store, keep-warm"),
        (NODE | {"name": "a\x1b[2J"}, "control character"),
        (NODE | {"keep-warm": -1}, "keep-warm: Expected `float` >= 0"),
        (NODE | {"privacy.secure-aggregation": True}, "privacy.secure-aggregation needs"),
    ],
)
def test_a_node_config_that_cannot_be_applied_is_refused_by_name(node, words):
    with pytest.raises(ConfigError, match=words):
        read_node(RUN, node)
