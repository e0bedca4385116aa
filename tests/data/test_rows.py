"""Files as users have them: what is not used can hold anything, what is used is right or refused by name."""

import decimal
import itertools
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum.data import read_rows, to_examples
from fedmomentum.data.examples import MAX_CATEGORIES, MAX_LABEL, Example
from fedmomentum.data.label_columns import column_texts
from fedmomentum.data.rows import Rows
from fedmomentum.errors import DataError
from fedmomentum.protocol import messages
from fedmomentum.utils import schema
from tests.data.dicts import as_dicts
from tests.data.test_client_data import load_clients

PLAIN = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
WANTED = [Example(({"role": "user", "content": row["question"]},), row["answer"]) for row in PLAIN]


def examples_of(path, **more):
    return to_examples(read_rows(path), where=path.name, **more)


def with_column(*texts):
    """The plain rows as JSON lines, each with a column `odd` whose value is given as JSON text."""
    lines = [
        json.dumps(row)[:-1] + f', "odd": {text}}}' for row, text in zip(PLAIN, texts, strict=True)
    ]
    return "\n".join(lines) + "\n"


# ── columns that nobody uses ──


@pytest.mark.parametrize(
    "values",
    [
        ("1", '"a"', "null"),
        ("[1, [2]]", '{"a": {"b": [null, {}]}}', "true"),
        ('[{"a": 1}, "x", [3]]', "{}", "[]"),
        ("NaN", "Infinity", "-Infinity"),
        ("9" * 5000, "1e999", "-1"),
        ("123456789012345678901234567890", "0.1", "2"),
        ('"\\ud800"', '{"\\udfff": 1}', '"\\u0000"'),
        ('{"a": 1, "a": 2}', "[{}]", "null"),
        ("null", "null", "null"),
    ],
)
def test_json_rows_are_read(values, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text(with_column(*values))
    assert examples_of(file) == WANTED
    listed = tmp_path / "d.json"
    listed.write_text("[" + ",\n".join(file.read_text().splitlines()) + "]")
    assert examples_of(listed) == WANTED
    assert load_clients(client_files={"north": file}, test_fraction=0)[0].train == tuple(WANTED)


def odd_columns():
    rows = len(PLAIN)
    return {
        "dictionary": pa.array(["x", None, "x"]).dictionary_encode(),
        "duration": pa.array([1, 2, None], pa.duration("ns")),
        "time": pa.array([1, 2, 3], pa.time64("ns")),
        "far timestamp": pa.array([2**62, 0, -(2**62)], pa.timestamp("ms")),
        "decimal": pa.array([decimal.Decimal("1.5")] * rows, pa.decimal256(50, 3)),
        "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        "half": pa.array(np.zeros(rows, np.float16)),
        "null": pa.nulls(rows),
        "bytes": pa.array([b"\xff\xfe", b"", None]),
        "not UTF-8": pa.array([b"\xff", b"a", b"b"]).view(pa.string()),
        "fixed": pa.array([[1, 2]] * rows, pa.list_(pa.int8(), 2)),
        "nested": pa.array([{"a": [{"b": None}]}] * rows),
        "a.b": pa.array(["x"] * rows),
        "answer.long": pa.array([{"deep": 1}] * rows),
    }


def test_parquet_rows_are_read(tmp_path):
    table = pa.Table.from_pylist(PLAIN)
    for name, column in odd_columns().items():
        table = table.append_column(name, column)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert examples_of(tmp_path / "d.parquet") == WANTED
    assert [e.category for e in examples_of(tmp_path / "d.parquet", category_column="a.b")] == [
        "x"
    ] * 3
    with pytest.raises(
        DataError, match=r"d\.parquet, row 1: column 'not UTF-8' cannot be read: .*utf-8"
    ):
        examples_of(tmp_path / "d.parquet", category_column="not UTF-8")


def test_rows_of_a_saved_data_set_are_read(tmp_path):
    """A column of pictures, which are none, is not decoded."""
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "picture": datasets.Image(),
        }
    )
    rows = {
        **{name: [row[name] for row in PLAIN] for name in ("question", "answer")},
        "picture": [{"bytes": b"none", "path": None}] * 3,
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    assert examples_of(tmp_path / "saved") == WANTED


def test_columns_of_another_format_are_not_read_either(tmp_path):
    """`messages` decide; a `prompt` beside them counts for nothing, whatever it is."""
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    lines = [{"messages": chat, "prompt": value} for value in (1, [2], "\ud800")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [e.completion for e in examples_of(tmp_path / "d.jsonl")] == ["yes"] * 3


# ── columns that are used ──


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("answer", pa.array([row["answer"] for row in PLAIN]).dictionary_encode()),
        ("answer", pa.array([row["answer"] for row in PLAIN], pa.large_string())),
        ("answer", pa.array([row["answer"] for row in PLAIN], pa.string_view())),
        (
            "question",
            pa.chunked_array([pa.array([row["question"]]).dictionary_encode() for row in PLAIN]),
        ),
    ],
)
def test_text_of_any_arrow_type_is_text(column, values, tmp_path):
    table = pa.Table.from_pylist(PLAIN)
    table = table.set_column(table.schema.get_field_index(column), column, values)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert examples_of(tmp_path / "d.parquet") == WANTED


def test_labels_of_a_parquet_file_are_their_names(tmp_path):
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    rows = {"question": ["a", "b"], "answer": ["c", "d"], "kind": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    assert [e.category for e in examples_of(tmp_path / "d.parquet", category_column="kind")] == [
        "yes",
        "no",
    ]


PAIR = '{"question": "a", "answer": "b"}'
MESSAGES = (
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]}\n'
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"question": "a", "answer": "x\\ud83d"}',
            r"d\.jsonl: row 1: column 'answer' holds '\\ud83d', half of a",
        ),
        (
            MESSAGES + MESSAGES.replace("hi", "\\udc00"),
            r"d\.jsonl: row 2: column 'messages' holds '\\udc00', half",
        ),
        (
            '{"question": "a", "answer": "1", "answer": "2"}',
            r"row 1: column 'answer': the key 'answer' comes twice",
        ),
        (
            MESSAGES + MESSAGES.replace('"content": "a"', '"content": "a", "content": "b"'),
            r"d\.jsonl, row 2: column 'messages': the key 'content' comes twice in one object, .*; keep one",
        ),
        (
            '{"question": "a", "answer": NaN}',
            r"d\.jsonl: row 1: column 'answer' is nan; it must be text",
        ),
        (
            '{"question": "a", "answer": ' + "7" * 5000 + "}",
            "row 1: column 'answer' is inf; it must be text",
        ),
        ('{"question": "a", "answer": true}', "row 1: column 'answer' is True; it must be text"),
        (
            '{"question": "a", "answer": ["b"]}',
            r"row 1: column 'answer' is \['b'\]; it must be text",
        ),
        (PAIR + '\n{"question": "a"}', "row 2: column 'answer' is None; it must be text"),
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}',
            "row 2: column 'prompt' must be a",
        ),
        (
            MESSAGES + '{"messages": [null]}',
            "row 2: column 'messages', message 1: must have exactly role and content",
        ),
        (
            MESSAGES + MESSAGES.replace('"hi"', '[{"type": "image_url", "image_url": "x"}]'),
            "row 2: column 'messages', message 1: part 1 of its content is .*only parts of text",
        ),
        (
            MESSAGES + MESSAGES.replace('"hi"', "7"),
            "row 2: message 1 of the prompt: role and content must be text",
        ),
        (
            PAIR + '\n{"question": "a", "answer": "b",}',
            r"d\.jsonl, line 2: not valid JSON: .*a comma stands before the closing bracket",
        ),
        (
            "{'question': 'a', 'answer': 'b'}",
            r"line 1: not valid JSON: .*names and texts stand in double quotes",
        ),
        (PAIR + "\n" + "[" * 10**5, r"d\.jsonl, line 2: not usable JSON: it is nested too deep"),
        ('{"question": "a\0", "answer": "b"}', r"d\.jsonl, line 1: holds a NUL character"),
        (f"{PAIR}\n\ufeff{PAIR}", r"d\.jsonl, line 2: not valid JSON"),
    ],
)
def test_what_cannot_be_used_is_refused_by_file_row_and_column(text, message, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as raised:
        examples_of(file)
    assert len(str(raised.value)) < 1000


def test_prompts_that_are_text_in_one_row_and_a_chat_in_another_are_both_read(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "c"},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [e.prompt for e in examples_of(tmp_path / "d.jsonl")] == [
        "a",
        ({"role": "user", "content": "hi"},),
    ]


ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]
NAMES = ["d.jsonl", "d.json", "d.csv"]


@pytest.mark.parametrize(
    ("name", "encoding"),
    # what Windows saves as CSV is recognized: test_decoding.py
    [pair for pair in itertools.product(NAMES, ENCODINGS) if pair != ("d.csv", "latin-1")],
)
def test_other_encodings_are_refused_by_name(name, encoding, tmp_path):
    text = 'question,answer\nä?,"b"\n' if name == "d.csv" else '{"question": "ä?", "answer": "b"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(
        DataError, match=rf"{name}.*(not UTF-8 text|NUL character).*save it as UTF-8"
    ):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_are_no_part_of_the_data(end, mark, tmp_path):
    lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in PLAIN)]
    (tmp_path / "d.csv").write_bytes((mark + end.join(lines) + end * 2).encode())
    (tmp_path / "d.jsonl").write_bytes((mark + end.join(map(json.dumps, PLAIN)) + end).encode())
    (tmp_path / "d.json").write_bytes(
        (mark + json.dumps(PLAIN, indent=1).replace("\n", end)).encode()
    )
    for name in ("d.csv", "d.jsonl", "d.json"):
        assert examples_of(tmp_path / name) == WANTED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "question,answer,\na,b,\n",
            r"d\.csv: the header must name each column once; .*comma at the end",
        ),
        ("question,answer\na,b,\n", r"d\.csv, line 2: 3 values for 2 columns"),
        ("question,answer\na\0,b\n", r"d\.csv, line 2: holds a NUL character"),
        ('question,answer\n"a,b\n', r"d\.csv, line 2: not valid CSV"),
    ],
)
def test_broken_csv_is_refused_by_line(text, message, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "d.csv")


def test_long_texts_and_line_ends_within_a_value_are_kept_to_the_letter(tmp_path):
    long = "word " * 100_000
    (tmp_path / "d.csv").write_bytes(
        f'question,answer\r\n"{long}","two\r\nlines, ""quoted"""\r\n'.encode()
    )
    assert as_dicts(read_rows(tmp_path / "d.csv")) == [
        {"question": long, "answer": 'two\r\nlines, "quoted"'}
    ]


def test_a_duplicate_column_in_parquet_is_refused(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["answer", "answer"])
    pyarrow.parquet.write_table(twice, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="the column 'answer' comes twice"):
        read_rows(tmp_path / "d.parquet")


# ── empty prompts ──


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [("user", ""), ("assistant", "a")],
            "row 1: message 1 of the prompt, the user's, is empty",
        ),
        (
            [("system", "s"), ("user", " \n"), ("assistant", "a")],
            "message 2 of the prompt, the user's, is empty",
        ),
        (
            [("user", "q"), ("assistant", ""), ("user", "q"), ("assistant", "a")],
            "message 2 .* the assistant's, is empty",
        ),
        ([("system", " "), ("assistant", "a")], "row 1: the prompt is empty"),
        ([("user", "q"), ("assistant", " ")], "row 1: the completion is empty"),
    ],
)
def test_an_empty_message_is_refused(messages, message, tmp_path):
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        examples_of(tmp_path / "d.jsonl")


def test_an_empty_system_message_means_no_instruction(tmp_path):
    chat = [("system", ""), ("user", "q"), ("assistant", "a")]
    row = {"messages": [{"role": role, "content": content} for role, content in chat]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    assert examples_of(tmp_path / "d.jsonl")[0].prompt[0] == {"role": "system", "content": ""}


# ── categories ──


@pytest.mark.parametrize(
    ("value", "category"),
    [
        ("math", "math"),
        (7, "7"),
        (-1, "-1"),
        (True, "True"),
        (10**30, str(10**30)),
        ("x" * MAX_LABEL, "x" * MAX_LABEL),
        ("größe 📏", "größe 📏"),
    ],
)
def test_categories_are_short_names(value, category, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({**PLAIN[0], "kind": value}))
    assert [e.category for e in examples_of(tmp_path / "d.jsonl", category_column="kind")] == [
        category
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a\nb"], r"row 1: column 'kind' holds '\\n', a character that cannot be shown"),
        (["a", "\x1b[31mred"], r"row 2: column 'kind' holds '\\x1b'"),
        (["a\x00"], r"holds '\\x00'"),
        (["a\u202eb"], r"holds '\\u202e'"),
        (["a\ud800"], r"column 'kind' holds '\\ud800', half of a character"),
        (["x" * 257], "is a text of 257 characters; it must be a short name of at most 256"),
        (["x" * 10**6], "is a text of 1000000 characters"),
        ([1.0], "row 1: column 'kind' is 1.0; it must be text or an integer. Missing values turn"),
        (["a", None], "row 2: column 'kind' is None"),
        ([["a"]], r"row 1: column 'kind' is \['a'\]"),
        ([{"a": 1}], "row 1: column 'kind' is {'a': 1}"),
        (["1", 1], "row 2: column 'kind' is 1, and rows before it hold another kind of value"),
        ([1, True], "row 2: column 'kind' is True, and rows before it hold another kind"),
    ],
)
def test_categories_that_are_no_short_names_are_refused(values, message, tmp_path):
    rows = [{**PLAIN[0], "kind": value} for value in values]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=rf"d\.jsonl: .*{message}") as raised:
        examples_of(tmp_path / "d.jsonl", category_column="kind")
    assert len(str(raised.value)) < 500 and str(raised.value).isprintable()


def test_a_column_of_names_of_rows_is_no_category(tmp_path):
    rows = [{**PLAIN[0], "kind": f"row {i}"} for i in range(MAX_CATEGORIES + 1)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        DataError, match=r"d\.jsonl: column 'kind' has 10001 different values, more than 10000"
    ):
        examples_of(tmp_path / "d.jsonl", category_column="kind")
    assert len(examples_of(tmp_path / "d.jsonl")) == MAX_CATEGORIES + 1


def test_names_in_data_and_in_messages_have_the_same_limits():
    """The limits of a data set are those of the messages in which its categories travel."""
    assert MAX_CATEGORIES == messages.MAX_CATEGORIES
    assert msgspec.convert("x" * MAX_LABEL, schema.Label) and msgspec.convert(
        "größe 📏 \u2029"[:-2], schema.Label
    )
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert("x" * (MAX_LABEL + 1), schema.Label)


@pytest.mark.parametrize("category", ["a\nb", "\x1b]0;title\x07", "x" * 257])
def test_a_configured_category_must_follow_the_same_rule(category):
    with pytest.raises(DataError, match="the category (holds|is a text)"):
        Example("a", "b", category)


@pytest.mark.parametrize(
    ("label", "message"), [(-1, "is -1, which is none of its 2 labels"), (5, "is 5, which is none")]
)
def test_a_label_without_a_name_is_refused(label, message):
    rows = Rows({"kind": lambda: [0, label]}, 2, {"kind": ["no", "yes"]})
    with pytest.raises(DataError, match=f"f: row 2: column 'kind' {message}"):
        column_texts(rows, "kind", where="f")


def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path):
    (tmp_path / "d.jsonl").write_text(with_column("1", "2", "3"))
    with pytest.raises(
        DataError, match=r"d\.jsonl: no column 'topic'; found: question, answer, odd"
    ):
        examples_of(tmp_path / "d.jsonl", category_column="topic")


# ── any rows ──

TEXT = st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]) | VALUES,
        "content": st.text(max_size=8) | VALUES,
    }
)
CHAT = st.lists(MESSAGE | VALUES, max_size=3)
COLUMNS = {
    "messages": CHAT | VALUES,
    "prompt": TEXT | CHAT | VALUES,
    "completion": TEXT | VALUES,
    "question": TEXT | VALUES,
    "answer": TEXT | VALUES,
}
ROW = st.sampled_from([("messages",), ("prompt", "completion"), ("question", "answer")]).flatmap(
    lambda names: st.fixed_dictionaries(
        {name: COLUMNS[name] for name in names}, optional={"kind": VALUES}
    )
)


@given(st.lists(ROW, min_size=1, max_size=4), st.sampled_from([None, "kind"]))
def test_any_rows_are_read_or_refused_by_name(rows, category_column):
    with TemporaryDirectory() as folder:
        file = Path(folder) / "d.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        try:
            examples = examples_of(file, category_column=category_column)
        except DataError as error:
            assert re.search(
                r"d\.jsonl(, line|, row|: row) \d+|d\.jsonl: (the columns|no column)", str(error)
            )
            assert len(str(error)) < 1000 and str(error).isprintable()
            return
    assert len(examples) == len(rows)
    for row, example in zip(rows, examples, strict=True):
        if "question" in row:
            assert (
                example.prompt == ({"role": "user", "content": row["question"]},)
                and example.completion == row["answer"]
            )
        if isinstance(row.get("prompt"), str):
            assert example.prompt == row["prompt"]
        if "messages" in row:
            contents = [message["content"] for message in row["messages"]]
            assert [m["content"] for m in example.prompt] + [example.completion] == contents
        assert example.category == (str(row["kind"]) if category_column else "")
