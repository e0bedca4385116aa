"""Labeled texts: what is read, in which order labels come, and how rows become tokens."""

import json

import pytest

from fedmomentum.config.data import DataConfig
from fedmomentum.config.schema import CLASSIFICATION
from fedmomentum.data.client_data import load_clients, partition_table
from fedmomentum.data.examples import Example, TextPair
from fedmomentum.data.labeled_texts import (
    refuse_unknown_labels,
    sort_labels,
    to_labeled_examples,
    tokenize_labeled,
)
from fedmomentum.data.rows import read_rows
from fedmomentum.errors import DataError
from tests.classifiers import classifier_tokenizer, labeled_rows, write_rows


def read(tmp_path, rows):
    return to_labeled_examples(read_rows(write_rows(tmp_path / "d.jsonl", rows)), where="d.jsonl")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["yes", "no", "yes"], ("no", "yes")),
        ([10, 2, -1], ("-1", "2", "10")),
        ([True, False, True], ("False", "True")),
        (["10", "2", "1"], ("1", "2", "10")),
        (["b2", "b10", "a"], ("a", "b10", "b2")),
    ],
)
def test_labels_are_names_in_one_order(tmp_path, labels, names):
    rows = [{"text": f"t{number}", "label": label} for number, label in enumerate(labels)]
    examples = read(tmp_path, rows)
    assert [example.completion for example in examples] == [str(label) for label in labels]
    assert [example.category for example in examples] == [str(label) for label in labels]
    assert sort_labels(example.completion for example in reversed(examples)) == names
    # The same data as CSV has the same labels in the same order.
    file = tmp_path / "d.csv"
    file.write_text("text,label\n" + "".join(f"t{n},{label}\n" for n, label in enumerate(labels)))
    assert to_labeled_examples(read_rows(file)) == examples


def test_spaces_around_labels_are_removed_and_case_is_warned_of(tmp_path, caplog):
    rows = [{"text": "t", "label": label} for label in ("pos", " pos", "pos\t", "neg")]
    assert {example.completion for example in read(tmp_path, rows)} == {"pos", "neg"}
    assert not caplog.records
    examples = read(tmp_path, [*rows, {"text": "t", "label": "Pos"}])
    assert {example.completion for example in examples} == {"pos", "neg", "Pos"}
    assert "column 'label' has 'Pos' and 'pos', which differ only in upper and lower" in caplog.text


def test_labels_that_only_look_the_same_are_warned_of(tmp_path, caplog):
    one, two = "caf\u00e9", "cafe\u0301"
    examples = read(tmp_path, [{"text": "t", "label": label} for label in (one, two, "\u00fcber")])
    assert {example.completion for example in examples} == {one, two, "\u00fcber"}
    assert r"has 'cafe\u0301' and 'caf\xe9', which differ only in the Unicode" in caplog.text


def test_people_who_would_be_protected_as_two_are_warned_of(tmp_path, caplog):
    rows = [{"question": "Q", "answer": "A", "patient": name} for name in ("P-7", "p-7")]
    file = write_rows(tmp_path / "d.jsonl", rows)
    config = DataConfig(client_files={"north": file}, test_fraction=0.0)
    (client,) = load_clients(config, 0, unit_column="patient")
    assert [example.unit for example in client.train] == ["P-7", "p-7"]
    assert "column 'patient' has 'P-7' and 'p-7', which differ only in upper" in caplog.text


def test_class_labels_of_a_parquet_file_are_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a", "b"], "label": [1, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    examples = to_labeled_examples(read_rows(tmp_path / "d.parquet"))
    assert [example.completion for example in examples] == ["yes", "no"]


def test_pairs_are_read_as_pairs(tmp_path):
    (example,) = read(tmp_path, [{"text_a": "a", "text_b": "b", "label": "x", "other": 3}])
    assert example == Example(TextPair("a", "b"), "x", category="x")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "d.jsonl: the data, with the columns prompt, compl"),
        ({"text": "a"}, "Wanted: text, or text_a and text_b; and label"),
        ({"text_a": "a", "label": "x"}, "is no data for sequence classification"),
        ({"text": "a", "text_a": "a", "text_b": "b", "label": 1}, "remove those of one of them"),
        ({"text": "a", "label": 1.5}, "row 1: column 'label' is 1.5; it must be text or a"),
        ({"text": "a", "label": None}, "row 1: column 'label' is None"),
        ({"text": "a", "label": " "}, "row 1: column 'label' is ' '"),
        ({"text": " ", "label": 1}, "row 1: column 'text' is empty"),
        ({"text": 3, "label": 1}, "row 1: column 'text' is 3; it must be text"),
        ({"text_a": "a", "text_b": "", "label": 1}, "row 1: column 'text_b' is empty"),
        ({"text": "a", "label": "x" * 257}, "row 1: column 'label' is a text of 257 characters"),
    ],
)
def test_unusable_rows_are_refused_by_name(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row])


def test_kinds_of_labels_are_not_mixed(tmp_path):
    with pytest.raises(DataError, match="row 2: column 'label' is '1', and rows before it hold"):
        read(tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": "1"}])


def test_unknown_labels_are_refused_by_name():
    examples = [Example("a", "yes", category="yes"), Example("b", "maybe", category="maybe")]
    refuse_unknown_labels(examples, ("maybe", "yes"), "north")
    with pytest.raises(DataError, match="north: the label 'maybe' is none of the .* 2 labels"):
        refuse_unknown_labels(examples, ("no", "yes"), "north")


def test_clients_are_divided_by_label_and_no_text_is_in_both_parts(tmp_path):
    rows = [row for client in range(4) for row in labeled_rows(client, 30)]
    source = write_rows(tmp_path / "all.jsonl", rows)
    config = DataConfig(source=source, partition="dirichlet", num_clients=3, concentration=0.3)
    clients = load_clients(config, 1, task=CLASSIFICATION)
    assert clients == load_clients(config, 1, task=CLASSIFICATION)
    table = partition_table(clients)
    shares = [counts["train"].get("east", 0) for counts in table.values()]
    assert max(shares) > 2 * min(shares)
    for client in clients:
        train = {example.prompt for example in client.train}
        assert not train & {example.prompt for example in client.test}


def test_rows_are_the_tokenizers_own_cut_as_it_cuts_and_end_in_the_label():
    tokenizer = classifier_tokenizer("bert")
    texts = ["ab", "a long text of many words"]
    labels = ("x", "y")
    singles = [Example(text, "y", category="y") for text in texts]
    rows = tokenize_labeled(singles, tokenizer, labels, max_length=8, owner="north")
    wanted = tokenizer(texts, truncation=True, max_length=8)["input_ids"]
    assert [list(ids[:-1]) for ids in rows.input_ids] == wanted
    assert {ids[-1] for ids in rows.input_ids} == {1} and rows.categories == ("y", "y")
    # Nothing of what is learned is lost.
    assert rows.num_truncated == 0 and rows.num_lost == 0 and len(rows.input_ids[1]) == 9

    pairs = [Example(TextPair(text, "end of it"), "x", category="x") for text in texts]
    rows = tokenize_labeled(pairs, tokenizer, labels, max_length=12, owner="north")
    encoded = tokenizer(texts, ["end of it"] * 2, truncation=True, max_length=12)
    assert [list(ids[:-1]) for ids in rows.input_ids] == encoded["input_ids"]
    num_first = [segments.count(0) for segments in encoded["token_type_ids"]]
    assert list(rows.num_prompt_tokens) == num_first


def test_texts_that_are_cut_are_counted(caplog):
    tokenizer = classifier_tokenizer("bert")
    examples = [Example(text, "x", category="x") for text in ("a", "long text", "another one")]
    tokenize_labeled(examples, tokenizer, ("x", "y"), max_length=8, owner="north")
    assert "north: 2 of 3 texts are longer than max-length = 8 tokens" in caplog.text


def test_a_json_file_and_its_lines_are_the_same(tmp_path):
    rows = labeled_rows(0, 5)
    file = tmp_path / "d.json"
    file.write_text(json.dumps(rows))
    assert to_labeled_examples(read_rows(file)) == read(tmp_path, rows)
