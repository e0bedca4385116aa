"""`fedmomentum benchmark` as a user types it."""

import importlib.util
import json

import pytest

from tests.benchmark.files import write_choices, write_programs, write_sums
from tests.runs import start, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    start(tiny_config(folder, training={"learning_rate": 0.3}), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return write_programs(write_sums(write_choices(folder), num_fewshot=1))


def test_scores_in_tables_in_the_runs_directory_and_on_its_page(run, tasks, call):
    code, out, err = call(
        "benchmark",
        run,
        "--tasks",
        "choices, gsm8k",
        "--data",
        tasks,
        "--rounds",
        "2,last",
        "--limit",
        6,
    )
    assert code == 0 and "Traceback" not in err
    assert "choices, 6 examples" in out and "gsm8k, 6 examples" in out
    for name in ("acc_norm", "exact_match, strict-match", "exact_match, flexible-extract"):
        assert out.count(name) == 2  # rounds 2 and 3
    assert "[95 % interval]" in out and "] │ +" in out.replace("-", "+")
    assert f"-> {run / 'benchmarks.json'}" in out and f"-> {run / 'report.html'}" in out
    table = json.loads((run / "benchmarks.json").read_text())
    assert [task["task"] for task in table["tasks"]] == ["choices", "gsm8k"]
    assert "Standard benchmarks" in (run / "report.html").read_text()
    assert "answers were cut at the longest length" in out


def test_a_task_file_of_the_user(run, tasks, tmp_path, call):
    (run / "benchmarks.json").unlink(missing_ok=True)
    own = tmp_path / "mine.json"
    code, out, _ = call(
        "benchmark", run, "--tasks", "choices", "--data", tasks, "--limit", 3, "--out", own
    )
    assert code == 0 and out.splitlines()[-1] == f"-> {own}"
    assert json.loads(own.read_text())["tasks"][0]["settings"]["limit"] == 3
    assert not (run / "benchmarks.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "humaneval"], "Allow it by --run-code"),
        (["--tasks", "mine"], "no task 'mine' in .* (its tasks are choices, gsm8k, humaneval)"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "choices", "--rounds", "x"], "'x'"),
        (["--tasks", "choices", "--limit", "0"], "--limit must be at least 1"),
        (["--tasks", "gsm8k", "--num-fewshot", "8"], "--num-fewshot"),
        (["--tasks", "choices", "--client", "site0"], "leave out --client site0"),
        (["--tasks", "choices", "--out", "/nowhere/x.json"], "/nowhere is no directory"),
    ],
)
def test_mistakes_end_with_a_message(run, tasks, call, words, message):
    code, out, err = call("benchmark", run, "--data", tasks, *words)
    assert code == 2 and "Traceback" not in err
    assert all(part in err.replace("\n", " ") for part in message.split(".*"))


def test_without_the_extra_it_says_what_to_install(run, tasks, call, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a)
    )
    code, _, err = call("benchmark", run, "--tasks", "choices", "--data", tasks)
    assert code == 2
    assert err.replace("\n", " ").strip() == (
        "fedmomentum: benchmarks need lm-evaluation-harness; install it with: pip install "
        "'fedmomentum[benchmark]'"
    )
    assert call("--help")[0] == 0
