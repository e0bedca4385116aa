"""The script that writes task files from public data sets; each is read back by the benchmark."""

import gzip
import json

import pytest

from fedmomentum.benchmark.task_files import read_task
from fedmomentum.benchmark.tasks import make_task
from tests.benchmark.files import PROGRAM
from tools.benchmark_tasks import TASKS, choice_row, make_tasks

CHOICE = {
    "instruction": "Please choose the correct answer to the question: What: is it?\n\nAnswer1: a b "
    "Answer2: c: d Answer3: e\n\nAnswer format: answer1/answer2/answer3",
    "answer": "answer2",
}
ENDING = {
    "instruction": "Please choose the correct ending to the question: It is\n\nAnswer1: x "
    "Answer2: y\n\nAnswer format: answer1/answer2",
    "answer": "answer1",
}
YES = {
    "instruction": "Please answer the following question with true or false, question: is it?\n\n"
    "Answer format: true/false",
    "answer": "false",
}


def test_questions_are_taken_apart():
    assert choice_row(CHOICE, "x") == {
        "question": "What: is it?",
        "choices": ["a b", "c: d", "e"],
        "answer": 1,
    }
    assert choice_row(ENDING, "x") == {"question": "It is", "choices": ["x", "y"], "answer": 0}
    assert choice_row(YES, "x") == {"question": "is it?", "choices": ["true", "false"], "answer": 1}
    with pytest.raises(SystemExit, match="row 3: not the layout of LLM-Adapters: 'Hello'"):
        choice_row({"instruction": "Hello", "answer": "a"}, "row 3")
    with pytest.raises(SystemExit, match="row 3: 3 choices .* and the answer 'answer9'"):
        choice_row({**CHOICE, "answer": "answer9"}, "row 3")
    short = CHOICE["instruction"].replace("Answer3: e", "")
    with pytest.raises(SystemExit, match="row 3: 2 choices for answer1/answer2/answer3"):
        choice_row({**CHOICE, "instruction": short}, "row 3")


def test_every_task_file_is_written_read_and_evaluated(tmp_path):
    data = tmp_path / "data"
    for name in TASKS:
        (data / name).mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"{n}?", "answer": f"So\u2028.\n#### {n}"} for n in range(6)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (data / "gsm8k" / f"{split}.jsonl").write_text(lines)
        for name in ("arc_easy", "arc_challenge", "openbookqa", "boolq"):
            row = YES if name == "boolq" else CHOICE
            (data / name / f"{split}.json").write_text(json.dumps([row] * 3))
    with gzip.open(data / "humaneval" / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({**PROGRAM, "task_id": "a/0", "canonical_solution": ""}) + "\n")
    summary = make_tasks(data, tmp_path / "out")
    assert [line.partition(":")[0] for line in summary] == list(TASKS)
    assert summary[0] == "gsm8k: 6 train, 6 test"
    for name in TASKS:
        task = make_task(read_task(tmp_path / "out", name))
        task.build_all_requests()
        assert task.instances
    # what is not there is left out
    (data / "boolq" / "test.json").unlink()
    assert len(make_tasks(data, tmp_path / "less")) == len(TASKS) - 1
    assert make_tasks(tmp_path, tmp_path / "none") == []
