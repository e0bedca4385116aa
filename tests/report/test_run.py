"""Reading a run folder, whole or damaged."""

import json

import pytest

from fedmomentum.errors import DataError, ModelError
from fedmomentum.report import read_run
from tests.report.folders import row, write_run

CLIENTS, CATEGORIES = ["client-0", "client-1"], ["a", "b"]
FILES = ["config.toml", "environment.json", "plan.json", "partition.json", "metrics.jsonl"]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", [row(r, CLIENTS, CATEGORIES) for r in range(3)])


def test_read_run_gives_what_the_files_hold(folder):
    run = read_run(folder)
    assert run.name == "run"
    assert run.rows == [row(r, CLIENTS, CATEGORIES) for r in range(3)]
    assert run.plan == json.loads((folder / "plan.json").read_text())
    assert run.environment["threads"] == 2
    assert set(run.partition) == set(CLIENTS)
    assert run.config_text == (folder / "config.toml").read_text()


def test_no_folder(tmp_path):
    with pytest.raises(ModelError, match="no run folder .*nowhere"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"has no {name}"):
        read_run(folder)


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_not_text_is_named(folder, name):
    (folder / name).write_bytes(b"{}\n\xff\xfe\n")
    with pytest.raises(DataError, match=name):
        read_run(folder)


@pytest.mark.parametrize("name", ["environment.json", "plan.json", "partition.json"])
@pytest.mark.parametrize("content", ["{", "[]", "", "3"])
def test_file_that_is_not_an_object_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=name):
        read_run(folder)


def test_partition_without_splits_names_the_client(folder):
    (folder / "partition.json").write_text('{"client-1": {"train": 3}}')
    with pytest.raises(DataError, match="client-1"):
        read_run(folder)


@pytest.mark.parametrize("rest", ['{"round": 3, "particip', '{"round', "{", '{"round": 3, "x": "\\ud8'])
def test_row_being_written_is_left_out(folder, rest):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert [one["round"] for one in read_run(folder).rows] == [0, 1, 2]


@pytest.mark.parametrize("line", ['{"round": 1, "parti', "[1]", '{"loss": 1}', '{"round": "1"}', '{"round": true}'])
def test_damaged_row_is_named_by_its_line(folder, line):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1] = line
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 2"):
        read_run(folder)


@pytest.mark.parametrize("content", ["", "\n", '{"round": 0'])
def test_no_row_yet(folder, content):
    (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="no finished row"):
        read_run(folder)


def test_round_written_again_counts_once(folder):
    again = row(1, CLIENTS, CATEGORIES, seed=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    rows = read_run(folder).rows
    assert [one["round"] for one in rows] == [0, 1, 2]
    assert rows[1] == again != row(1, CLIENTS, CATEGORIES)


def test_names_lose_what_cannot_be_printed(folder):
    rows = [row(0, CLIENTS, CATEGORIES), row(1, CLIENTS, CATEGORIES, failures={"a\u0000\ud800b": "x\u001b[31m\ny"})]
    write_run(folder, rows)
    assert read_run(folder).rows[1]["failures"] == {"a\ufffd\ufffdb": "x\ufffd[31m\ny"}
