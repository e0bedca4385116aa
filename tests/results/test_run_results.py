"""Reading a run folder, whole or damaged."""

import json
from dataclasses import fields

import msgspec
import pytest

from fedmomentum.errors import DataError, ModelError
from fedmomentum.formats.metrics_file import encode_record
from fedmomentum.formats.plan import Plan
from fedmomentum.formats.run_files import PlanFile
from fedmomentum.results.run_results import RunResults
from tests.report.folders import records, row, write_record, write_run

CLIENTS, CATEGORIES = ["client-0", "client-1"], ["a", "b"]
FILES = ["config.toml", "environment.json", "plan.json", "partition.json", "metrics.jsonl"]


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", [row(r, CLIENTS, CATEGORIES) for r in range(3)])


def test_read_run_gives_what_the_files_hold(folder):
    run = RunResults.load(folder)
    assert run.name == "run"
    assert run.rounds == records([row(r, CLIENTS, CATEGORIES) for r in range(3)])
    assert msgspec.to_builtins(run.plan) == {
        "run_id": None,
        "privacy": "",
        "workers": [],
        "adapted": [],
        "not_adapted": [],
        "warnings": [],
        "optimizer_state": "fresh",
        "objective": "",
        "labels": {},
        "device": "",
        "host_memory": None,
        "device_memory": None,
        **json.loads((folder / "plan.json").read_text()),
    }
    assert run.environment["threads"] == 2
    assert set(run.partition) == set(CLIENTS)
    assert run.config_text == (folder / "config.toml").read_text()


def test_a_plan_is_read_with_all_of_its_fields():
    read = set(PlanFile.__struct_fields__) - {"sha256", "run_id"}
    assert read == {field.name for field in fields(Plan)}


def test_a_missing_run_directory_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no run directory .*nowhere"):
        RunResults.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"has no {name}"):
        RunResults.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_not_text_is_named(folder, name):
    (folder / name).write_bytes(b"{}\n\xff\xfe\n")
    with pytest.raises(DataError, match=name):
        RunResults.load(folder)


@pytest.mark.parametrize("name", ["environment.json", "plan.json", "partition.json"])
@pytest.mark.parametrize("content", ["{", "[]", "", "3"])
def test_file_that_is_not_an_object_is_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=name):
        RunResults.load(folder)


def test_partition_without_splits_names_the_client(folder):
    write_record(folder / "partition.json", {"clients": {"client-1": {"train": 3}}})
    with pytest.raises(
        DataError, match=r"partition\.json: clients.*train|partition\.json: clients"
    ):
        RunResults.load(folder)


@pytest.mark.parametrize("name", ["environment.json", "plan.json", "partition.json"])
def test_a_file_that_was_changed_since_it_was_written_is_refused_even_if_valid(folder, name):
    text = (folder / name).read_text()
    digit = next(c for c in text if c in "123456789")
    (folder / name).write_text(text.replace(digit, "4" if digit != "4" else "5", 1))
    with pytest.raises(
        DataError, match=f"{name} was damaged or altered since it was written.*Restore"
    ):
        RunResults.load(folder)
    (folder / name).write_text(json.dumps(json.loads(text), indent=3))  # laid out in another way
    RunResults.load(folder)


@pytest.mark.parametrize(
    "rest", ['{"round": 3, "particip', '{"round', "{", '{"round": 3, "x": "\\ud8']
)
def test_row_being_written_is_left_out(folder, rest):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(rest)
    assert [one.round for one in RunResults.load(folder).rounds] == [0, 1, 2]


@pytest.mark.parametrize(
    "line", ['{"round": 1, "parti', "[1]", '{"loss": 1}', '{"round": "1"}', '{"round": true}']
)
def test_damaged_row_is_named_by_its_line(folder, line):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1] = line
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 2"):
        RunResults.load(folder)


@pytest.mark.parametrize("content", ["", "\n", '{"round": 0'])
def test_a_run_without_a_finished_row_is_refused(folder, content):
    (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="no finished row"):
        RunResults.load(folder)


def test_round_written_again_counts_once(folder):
    rewritten = row(1, CLIENTS, CATEGORIES, seed=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rewritten) + "\n")
    rounds = RunResults.load(folder).rounds
    assert [one.round for one in rounds] == [0, 1, 2]
    assert [rounds[1]] == records([rewritten]) != records([row(1, CLIENTS, CATEGORIES)])


def test_names_lose_what_cannot_be_printed(folder):
    failures = {"a\u0000\ud800b": "x\u001b[31m\ny"}
    rows = [row(0, CLIENTS, CATEGORIES), row(1, CLIENTS, CATEGORIES, failures=failures)]
    write_run(folder, rows)
    with pytest.raises(
        DataError, match="line 2"
    ):  # half a surrogate pair is not written, and not read
        RunResults.load(folder)
    first, second = records([row(r, CLIENTS, CATEGORIES) for r in range(2)])
    second = msgspec.structs.replace(second, failures=failures)
    (folder / "metrics.jsonl").write_bytes(encode_record(first) + encode_record(second))
    assert RunResults.load(folder).rounds[1].failures == {"a\ufffd?b": "x\ufffd[31m\ny"}


def test_a_row_with_a_field_that_cannot_be_is_refused_by_line_and_field(folder):
    good = row(1, CLIENTS, CATEGORIES)
    score = good["evaluation"]["total"]
    for wrong, match in (
        (
            {"evaluation": {"total": {**score, "num_exact": score["num_examples"] + 1}}},
            "line 2: evaluation.total: ",
        ),
        (
            {"evaluation": {"total": {**score, "num_tokens": None}}},
            "line 2: evaluation.total.num_tokens: Expected `int`",
        ),
        ({"evaluation": {"total": {}}}, "line 2: evaluation.total: Object missing required field"),
        ({"train_loss": float("nan")}, "line 2: not valid JSON"),
        ({"uplink_bytes": {"client-0": -1}}, "line 2: uplink_bytes.*>= 0"),
        ({"weights": {"client-0": 2.0}}, "line 2: weights.*<= 1"),
        ({"more": json.loads("[" * 50 + "]" * 50)}, "line 2 is nested deeper"),
    ):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        lines[1] = json.dumps({**good, **wrong})
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(DataError, match=match):
            RunResults.load(folder)
