import json
import os
from pathlib import Path

import datasets
import pytest

from fedmomentum.data import read_rows, to_examples
from fedmomentum.data.label_columns import column_texts
from fedmomentum.errors import DataError
from tests.data.dicts import as_dicts

ROWS = [
    {"question": "1 + 1?", "answer": "2", "topic": "sum"},
    {"question": "2 * 3?", "answer": "6", "topic": "product"},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(*rows):
    return datasets.Dataset.from_list(list(rows))


def write_as(kind, folder):
    table = datasets.Dataset.from_list(ROWS)
    if kind == "jsonl":
        return jsonl(folder / "d.jsonl", ROWS)
    if kind == "json":
        (folder / "d.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind == "json lines in .json":
        return jsonl(folder / "d.json", ROWS).rename(folder / "lines.json")
    elif kind == "csv":
        (folder / "d.csv").write_text(
            "\ufeffquestion,answer,topic\r\n1 + 1?,2,sum\r\n2 * 3?,6,product\r\n", encoding="utf-8"
        )
    elif kind == "parquet":
        table.to_parquet(folder / "d.parquet")
    elif kind == "folder":
        table.save_to_disk(folder / "d.folder")
    else:
        datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(folder / "d.splits")
    return next(folder.glob("d.*"))


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "json lines in .json", "csv", "parquet", "folder", "splits"]
)
def test_each_kind_of_source_gives_the_same_rows(kind, tmp_path):
    assert as_dicts(read_rows(write_as(kind, tmp_path))) == ROWS


def test_split_of_a_saved_folder(tmp_path):
    folder = write_as("splits", tmp_path)
    assert read_rows(folder, split="test").num_rows == 1
    with pytest.raises(DataError, match="no split 'dev'; found: train, test"):
        read_rows(folder, split="dev")


def test_lines_end_only_at_newlines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "a\u2028b\x85c", "answer": "d"}\n', encoding="utf-8")
    assert read_rows(path)["question"] == ["a\u2028b\x85c"]
    path = tmp_path / "d.csv"
    path.write_text('question,answer\na\u2028b,"two\nlines, one value"\n', encoding="utf-8")
    assert as_dicts(read_rows(path))[0] == {
        "question": "a\u2028b",
        "answer": "two\nlines, one value",
    }


def test_csv_values_stay_text(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("question,answer\nnone?,NA\nzeros?,007\n", encoding="utf-8")
    assert read_rows(path)["answer"] == ["NA", "007"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"a": "1"}\n{"a": \n', r"d\.jsonl, line 2: not valid JSON"),
        ("d.jsonl", b'{"a": "1"}\n\n{"a": 2\n', r"d\.jsonl, line 3: not valid JSON"),
        ("d.jsonl", b'{"a": "1"}\n["b"]\n', r"d\.jsonl, line 2: must be an object"),
        ("d.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("d.jsonl", b" \n", "empty file"),
        ("d.json", b"[]", "no rows"),
        ("d.json", b'[{"a": 1}, 2]', "row 2: must be an object"),
        ("d.json", b'[{"a": 1},\n {"a" 2}]', "line 2: not valid JSON"),
        ("d.csv", b"a,b\n", "no rows"),
        ("d.csv", b"a,a\n1,2\n", "name each column once"),
        ("d.csv", b"a,b\n1,2\n3\n", r"d\.csv, line 3: 1 values for 2 columns"),
        ("d.csv", b'a,b\n1,"2\n', r"d\.csv, line 2: not valid CSV"),
        ("d.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("d.txt", b"hello", r"cannot read \.txt; known: \.jsonl"),
        ("d.pkl", b"\x80\x04N.", r"cannot read \.pkl"),
    ],
)
def test_broken_files_are_refused_by_name(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_missing_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for source in (tmp_path / "gone", "data/gone.jsonl", "./gone"):
        with pytest.raises(DataError, match="no such file"):
            read_rows(source)
    with pytest.raises(DataError, match="without a saved data set"):
        read_rows(tmp_path)


def test_unreachable_hub_says_what_to_do(monkeypatch):
    def unreachable(name, split):
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError,
        match=r"owner/set: .*\(split 'train'\): Couldn't reach.*download it and name the file",
    ):
        read_rows("owner/set")


def test_hub_data_set_is_read_with_the_split(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: rows_of({"name": name, "split": split})
    )
    assert as_dicts(read_rows("owner/set", split="dev")) == [{"name": "owner/set", "split": "dev"}]


USER, SYSTEM = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
ANSWER = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, (SYSTEM, USER), "hello"),
        ({"messages": [USER, ANSWER, USER, ANSWER], "prompt": "hi"}, (USER, ANSWER, USER), "hello"),
        ({"prompt": "hi", "completion": " hello"}, "hi", " hello"),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, (SYSTEM, USER), "hello"),
        ({"instruction": "hi", "output": "hello"}, (USER,), "hello"),
        ({"instruction": "hi", "input": "", "output": "hello", "answer": "no"}, (USER,), "hello"),
        ({"instruction": "hi", "input": None, "answer": "hello"}, (USER,), "hello"),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            ({"role": "user", "content": "Add.\n\n1 2"},),
            "3",
        ),
        ({"question": "hi", "answer": "hello", "id": 3}, (USER,), "hello"),
    ],
)
def test_each_row_format_gives_its_prompt_and_completion(row, prompt, completion):
    (example,) = to_examples(rows_of(row))
    assert (example.prompt, example.completion, example.category) == (prompt, completion, "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "label": 1},
            "f.csv: the columns text, label fit no known format.*Known: messages; prompt",
        ),
        (
            {"messages": [USER, ANSWER], "question": "a", "answer": "b"},
            "fit several formats .messages, question",
        ),
        (
            {"messages": [USER, USER]},
            "f.csv: row 1: the last message must be the assistant's.*'user'",
        ),
        ({"messages": [ANSWER]}, "row 1: nothing stands before the answer"),
        ({"messages": []}, "row 1: column 'messages' must be a list"),
        ({"messages": "hi"}, "row 1: column 'messages' must be a list"),
        (
            {"messages": [{"speaker": "human", "text": "a"}]},
            "message 1: must have exactly role and content",
        ),
        ({"messages": [USER | {"tool_calls": "x"}, ANSWER]}, "message 1: must have exactly"),
        (
            {"prompt": "hi", "completion": [ANSWER, ANSWER]},
            "row 1: column 'completion' must hold one message",
        ),
        ({"prompt": "hi", "completion": ""}, "row 1: the completion is empty"),
        ({"prompt": 3, "completion": "x"}, "row 1: column 'prompt' must be a list of messages"),
        ({"question": "hi", "answer": 3}, "row 1: column 'answer' is 3; it must be text"),
        ({"question": " ", "answer": "3"}, "row 1: column 'question' is empty"),
        ({"instruction": "hi", "output": "x", "input": 3}, "row 1: column 'input' is 3"),
    ],
)
def test_unusable_rows_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        to_examples(rows_of(row), where="f.csv")


def test_the_row_at_fault_is_named(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [*ROWS, {"question": "3?"}])
    with pytest.raises(DataError, match="d.jsonl: row 3: column 'answer' is None"):
        to_examples(read_rows(path), where="d.jsonl")


def test_a_key_that_only_another_rows_messages_have_does_no_harm():
    rows = rows_of({"messages": [USER, ANSWER]}, {"messages": [USER | {"mood": "glad"}, ANSWER]})
    assert to_examples(rows.select([0]))[0].prompt == (USER,)
    with pytest.raises(DataError, match="row 2: column 'messages', message 1: must have exactly"):
        to_examples(rows)


def test_categories_are_text():
    rows = rows_of(*ROWS)
    assert [example.category for example in to_examples(rows, category_column="topic")] == [
        "sum",
        "product",
    ]
    assert column_texts(rows_of({"a": 3}, {"a": 14}), "a") == ["3", "14"]
    labels = datasets.Features({"a": datasets.ClassLabel(names=["no", "yes"])})
    assert column_texts(datasets.Dataset.from_dict({"a": [1, 0]}, features=labels), "a") == [
        "yes",
        "no",
    ]


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        (ROWS, "label", "f: no column 'label'; found: question, answer, topic"),
        ([{"a": "x"}, {"a": None}], "a", "f: row 2: column 'a' is None"),
        ([{"a": "x"}, {"a": " "}], "a", "f: row 2: column 'a' is ' '"),
        ([{"a": 0.5}], "a", "f: row 1: column 'a' is 0.5"),
    ],
)
def test_unusable_labels_are_refused(rows, column, message):
    with pytest.raises(DataError, match=message):
        column_texts(rows_of(*rows), column, where="f")


@pytest.mark.skipif(
    "FEDMOMENTUM_SHARED_DATA" not in os.environ, reason="FEDMOMENTUM_SHARED_DATA is not set"
)
@pytest.mark.parametrize(
    ("name", "count"),
    [("arc_easy/train.json", 2251), ("boolq/test.json", 3270), ("gsm8k/test.jsonl", 1319)],
)
def test_real_files(name, count):
    path = Path(os.environ["FEDMOMENTUM_SHARED_DATA"]) / name
    examples = to_examples(read_rows(path), where=name)
    assert len(examples) == count
    assert all(example.prompt[0]["role"] == "user" for example in examples)


PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": "no"}


def test_pairs_are_read_as_text_or_messages():
    texts = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    (example,) = to_examples(rows_of(texts))
    assert (example.prompt, example.completion, example.rejected) == ("hi", "yes", "no")
    (example,) = to_examples(rows_of(PAIR))
    assert (example.prompt, example.rejected) == ((USER,), "no")
    assert example.completion == ANSWER["content"]


@pytest.mark.parametrize("prompt", [None, "column", "messages", "text"])
def test_full_chats_are_read_as_pairs(prompt):
    """UltraFeedback's form, and that of conversations without a prompt."""
    system = {"role": "system", "content": "be brief"}
    context = [system, USER]
    row = {
        "chosen": [*context, ANSWER],
        "rejected": [*context, {"role": "assistant", "content": "no"}],
    }
    if prompt is not None:
        row["prompt"] = {"column": None, "messages": context, "text": USER["content"]}[prompt]
    (example,) = to_examples(rows_of(row))
    assert example.prompt == (system, USER)
    assert (example.completion, example.rejected) == (ANSWER["content"], "no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "another"}, "row 1: column 'prompt' is 'another', which the chats"),
        ({"prompt": [ANSWER]}, "row 1: column 'prompt' is .* which the chats"),
        (
            {"rejected": [{"role": "user", "content": "other"}, ANSWER]},
            "row 1: the chats in 'chosen' and 'rejected' differ before their last message",
        ),
        ({"rejected": [USER, USER]}, "row 1: the last message must be the assistant's"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "row 1: .* are the same"),
        ({"chosen": "yes", "rejected": "no"}, "row 1: there is no prompt"),
        ({"chosen": [ANSWER], "rejected": "no"}, "row 1: there is no prompt"),
    ],
)
def test_unusable_chats_are_refused_as_pairs(change, message):
    row = {"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "no"}]}
    with pytest.raises(DataError, match=message):
        to_examples(rows_of(row | change), where="f.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": ANSWER["content"]}, "row 1: the chosen and the rejected answer are the same"),
        ({"rejected": " "}, "row 1: the rejected answer is empty"),
        ({"rejected": 3}, "row 1: column 'rejected' must be a list of messages"),
        (
            {"chosen": [USER, ANSWER]},
            "row 1: column 'chosen' must hold one message.* holds 2: move",
        ),
        ({"rejected": [USER]}, "row 1: the last message must be the assistant's"),
        ({"completion": "x"}, "fit several formats"),
    ],
)
def test_unusable_pairs_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        to_examples(rows_of(PAIR | change), where="f.csv")
