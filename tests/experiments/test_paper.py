"""The published setting runs end to end on a tiny model; what is missing is reported."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_llama

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SMALL = (
    "data.num-clients=2",
    "data.min-examples=4",
    "training.local-steps=1",
    "training.batch-size=4",
    "lora.rank=2",
    "lora.lora-alpha=6",
    "federation.num-rounds=2",
    "evaluation.every=1",
    "evaluation.num-examples=2",
    "evaluation.final-num-examples=4",
    "run.threads=1",
    "model.dtype=float32",
)


@pytest.fixture
def paper(monkeypatch, tmp_path):
    """The script as a module, working in a separate directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS / "paper"), str(EXPERIMENTS), *sys.path])
    return importlib.import_module("paper")


@pytest.fixture
def data(tmp_path):
    """Local copies of three sets, and of none for code."""
    folder = tmp_path / "data"
    for split, count in (("train", 40), ("test", 12)):
        write(
            folder / "gsm8k" / f"{split}.jsonl",
            [
                {
                    "question": f"{split}: {i} and {i}?",
                    "answer": f"{'<<1+1=2>>' * (i % 8)} #### {2 * i}",
                }
                for i in range(count)
            ],
        )
        for name in ("arc_easy", "boolq"):
            ends = "answer1/answer2" if name == "arc_easy" else "true/false"
            rows = [
                {
                    "instruction": f"{split} of {name} {i}?\n\nAnswer format: {ends}",
                    "input": "",
                    "output": f"the correct answer is {ends.split('/')[i % 2]}",
                    "answer": ends.split("/")[i % 2],
                }
                for i in range(count)
            ]
            file = folder / name / f"{split}.json"
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text(json.dumps(rows))
    return folder


def write(file, rows):
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_all_methods_of_a_task_run_and_the_second_call_repeats_nothing(
    paper, data, tmp_path, capsys, monkeypatch
):
    model = tiny_llama(tmp_path / "base")
    words = ["--data", str(data), "--model", str(model), "--out", str(tmp_path / "out")]
    words += ["--only", "maths", *SMALL]
    assert paper.main(words) == 0
    output = capsys.readouterr().out
    assert "one of 5 runs" in output and "memory" in output and "hours in all" in output
    assert output.index("hours in all") < output.index("seed 0: exact match")  # planned before
    table = (tmp_path / "out" / "maths" / "comparison.csv").read_text().splitlines()[1:]
    assert [row.partition(":")[0] for row in table] == [
        "fedmomentum",
        "fedit",
        "flora",
        "ffalora",
        "frlora",
    ]
    assert (tmp_path / "out" / "maths" / "comparison.html").is_file()

    executed = []
    monkeypatch.setattr(paper.tuned_comparison.compare, "execute_run", executed.append)
    assert paper.main(words) == 0
    assert not executed


def test_a_plan_names_what_is_missing_and_runs_nothing(paper, data, tmp_path, capsys):
    model = tiny_llama(tmp_path / "base")
    out = tmp_path / "out"
    words = ["--data", str(data), "--model", str(model), "--out", str(out), "--plan", *SMALL]
    assert paper.main(words) == 0
    output = capsys.readouterr().out
    assert "code: code missing in" in output and "used: none" in output
    assert "commonsense: piqa, siqa, hellaswag, winogrande, arc_challenge, openbookqa" in output
    assert "10 runs, about" in output
    assert not any(out.rglob("metrics.jsonl"))

    assert paper.main(["--data", str(tmp_path / "none"), "--model", str(model), "--plan"]) == 2


def test_the_hours_are_those_of_the_runs(paper, data, tmp_path):
    """Twice the steps: twice the training; the tokens are those of the batches."""
    model = str(tiny_llama(tmp_path / "base"))
    assert paper.make_files("maths", data, tmp_path / "out")
    jobs = [
        paper.plan_job("maths", model, tmp_path / "out", [*SMALL, f"training.local-steps={count}"])
        for count in (1, 2)
    ]
    assert [job.num_steps for job in jobs] == [2 * 2 * 1, 2 * 2 * 2]
    assert jobs[1].num_tokens == pytest.approx(2 * jobs[0].num_tokens)
    assert jobs[1].num_evaluated == jobs[0].num_evaluated > 0
    passes = 2 * jobs[0].num_tokens + jobs[0].num_evaluated
    wanted = 2 * jobs[0].plan.num_parameters * passes / 50e12 / 3600
    assert jobs[0].hours(50) == pytest.approx(wanted)


def test_rows_are_read_in_the_layouts_of_the_sets(paper, data):
    task_files = paper.task_files
    maths = task_files.read_task("maths", data, "train")
    assert maths[3].prompt == "Question: train: 3 and 3?\nAnswer:\n"
    assert {row.category for row in maths} == {f"{k} calculations" for k in range(1, 7)}
    choices = task_files.read_task("commonsense", data, "test")
    assert {row.category for row in choices} == {"arc_easy", "boolq"}
    for row in choices:
        assert row.completion in task_files.choices(row)
    assert task_files.choices(choices[0]) == [
        "the correct answer is true",
        "the correct answer is false",
    ]
    assert task_files.choices(maths[0]) == []
    some = task_files.sample(choices, 6, seed=0)
    assert len(set(some)) == 6 and sum(row.category == "boolq" for row in some) == 3


def test_a_row_of_another_kind_is_refused_with_its_file(paper, data):
    write(data / "gsm8k" / "test.jsonl", [{"question": 1, "answer": "2"}])
    with pytest.raises(SystemExit, match=r"gsm8k/test\.jsonl: Expected `str`, got `int`"):
        paper.task_files.read_task("maths", data, "test")
    with pytest.raises(SystemExit, match="no data for code"):
        paper.task_files.read_task("code", data, "train")
