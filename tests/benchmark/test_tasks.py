"""Our tasks ask what lm-evaluation-harness' own loader asks."""

import pytest
import yaml
from lm_eval.api.task import ConfigurableTask

from fedmomentum.benchmark.task_files import read_task
from fedmomentum.benchmark.tasks import FEWSHOT_SEED, make_task
from fedmomentum.errors import DataError
from tests.benchmark.files import QUESTIONS, write_choices, write_rows, write_sums


def stock_task(folder, name, num_fewshot):
    """The task as lm-eval builds it from the same file, with its own templates and data."""
    config = yaml.safe_load((folder / f"{name}.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {k: str(folder / file) for k, file in files.items()}
    config["dataset_kwargs"]["cache_dir"] = str(folder / "cache")
    task = ConfigurableTask(config=config | {"num_fewshot": num_fewshot})
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("name", ["gsm8k", "choices"])
def test_prompts_answers_and_worked_examples_are_lm_evals_own(tmp_path, name, shots):
    write_choices(write_sums(tmp_path))
    ours, stock = make_task(read_task(tmp_path, name), shots), stock_task(tmp_path, name, shots)
    asked = []
    for task in (ours, stock):
        task.build_all_requests()
        asked.append([(request.doc_id, request.idx, request.args) for request in task.instances])
    assert asked[0] == asked[1] and len(asked[0]) in (8, 30)
    assert (shots == 0) == (asked[0][0][2][0].count("Question:") == 1)
    rows = list(ours.eval_docs)
    assert [ours.doc_to_target(row) for row in rows] == [stock.doc_to_target(row) for row in rows]
    # another task asks the same again
    second_task = make_task(read_task(tmp_path, name), shots)
    second_task.build_all_requests()
    assert [request.args for request in second_task.instances] == [args for *_, args in asked[0]]


@pytest.mark.parametrize(
    ("target", "right"), [("answer", 1), ("{{answer}}", 2), ("number", 3), ("{{number}}", 3)]
)
def test_digits_are_an_index_in_a_template_and_a_text_in_a_column(tmp_path, target, right):
    """With numbers as choices, the right one and the worked examples are lm-eval's."""
    row = {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": "2", "number": 3}
    file = write_choices(tmp_path, rows=[row] * 3) / "choices.yaml"
    text = file.read_text().replace("doc_to_target: answer", f'doc_to_target: "{target}"')
    file.write_text(text)
    ours, stock = make_task(read_task(tmp_path, "choices"), 2), stock_task(tmp_path, "choices", 2)
    results = [(-1.0 if index == right else -9.0, index == right) for index in range(4)]
    prompts = []
    for task in (ours, stock):
        task.build_all_requests()
        prompts.append([request.args for request in task.instances])
        assert task.process_results(row, results)["acc"] == 1.0
    assert prompts[0] == prompts[1]
    assert f"Answer: {row['choices'][right]}\n\n" in prompts[0][0][0]


@pytest.mark.parametrize("digits", ["²", "1²", "٣", "9" * 5000])
def test_digits_that_are_no_index_are_a_text(tmp_path, digits):
    """Of these, str.isdigit() is true."""
    row = {"question": "1+1?", "choices": ["1", digits], "answer": digits}
    file = write_choices(tmp_path, rows=[row] * 3) / "choices.yaml"
    text = file.read_text().replace("doc_to_target: answer", 'doc_to_target: "{{answer}}"')
    file.write_text(text)
    task = make_task(read_task(tmp_path, "choices"), 0)
    task.build_all_requests()
    assert task.process_results(row, [(-9.0, False), (-1.0, True)])["acc"] == 1.0
    file.write_text(text.replace("doc_to_choice: choices", 'doc_to_choice: ["1", "2"]'))
    with pytest.raises(DataError, match="is none of its 2 choices"):
        make_task(read_task(tmp_path, "choices"), 0)


def test_a_column_that_only_the_test_split_has_is_named(tmp_path):
    write_choices(tmp_path)
    rows = [{"question": one["question"], "options": one["choices"]} for one in QUESTIONS]
    write_rows(tmp_path / "choices_train.jsonl", rows)
    with pytest.raises(DataError, match="is a column of test, and not of all splits; another one"):
        make_task(read_task(tmp_path, "choices"), 2)


@pytest.mark.parametrize("choices", ["{[]: 1}", "{{}}", "['a', 'b'", "9" * 5000])
def test_a_text_that_is_no_list_of_choices_is_refused(tmp_path, choices):
    write_choices(tmp_path, rows=[{"question": "a", "choices": choices, "answer": "a"}] * 3)
    with pytest.raises(DataError, match="gives no list of two choices or more"):
        make_task(read_task(tmp_path, "choices"), 0)
