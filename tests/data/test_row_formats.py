"""Rows as people have them, in each format: what is the prompt, what is learned, what is refused."""

import csv
import json

import pytest

from fedmomentum.config.data import DataConfig
from fedmomentum.data import read_rows, to_examples
from fedmomentum.data.client_data import read_source
from fedmomentum.errors import DataError
from tests.data import format_cases
from tests.data.format_cases import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files_of_every_common_format_are_read(case, tmp_path):
    _, prompt, answer = format_cases.read(case, tmp_path)
    assert (prompt, answer) == (case.prompt, case.answer)


def test_the_table_in_the_documentation_is_of_these_files():
    text = format_cases.PAGE.read_text()
    assert format_cases.MARKS[0] in text
    assert format_cases.page(text) == text, "run: python -m tests.data.format_cases"


def examples(tmp_path, *rows, **columns):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to_examples(read_rows(file), where="d.jsonl", columns=columns)


def chat(*turns):
    """Messages of (role, content) or (role, content, weight)."""
    messages = []
    for role, content, *weight in turns:
        message = {"role": role, "content": content}
        if weight:
            (message["weight"],) = weight
        messages.append(message)
    return {"messages": messages}


@pytest.mark.parametrize(
    ("turns", "kept", "learned"),
    [
        ([("user", "a"), ("assistant", "b")], 2, None),
        ([("user", "a"), ("assistant", "b", 1)], 2, ()),
        ([("user", "a"), ("assistant", "b", 0), ("user", "c"), ("assistant", "d")], 4, ()),
        ([("user", "a"), ("assistant", "b", 1), ("user", "c"), ("assistant", "d")], 4, (1,)),
        # what follows the last message to learn carries no loss
        ([("user", "a"), ("assistant", "b", 1), ("user", "c"), ("assistant", "d", 0)], 2, ()),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c", 0), ("user", "d", 0)], 2, ()),
    ],
)
def test_weights_say_which_turns_are_learned(turns, kept, learned, tmp_path):
    (example,) = examples(tmp_path, chat(*turns))
    assert len(example.prompt) + 1 == kept
    assert example.completion == turns[kept - 1][1]
    assert example.learned_turns == learned
    assert not any("weight" in message for message in example.prompt)


def test_an_instruction_without_input_is_the_instruction_alone(tmp_path):
    rows = [{"instruction": "Q", "input": text, "output": "A"} for text in ("", " ", None)]
    for example in examples(tmp_path, *rows):
        assert example.prompt == ({"role": "user", "content": "Q"},)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "input": "C", "response": "A"},
        {"instruction": "Q", "context": "C", "output": "A"},
        {"question": "Q", "context": "C", "answer": "A"},
        {"instruction": "Q", "context": "C", "input": "", "response": "A", "history": "[]"},
    ],
)
def test_a_context_follows_the_question(row, tmp_path):
    (example,) = examples(tmp_path, row)
    assert example.prompt == ({"role": "user", "content": "Q\n\nC"},)


def test_columns_that_are_mapped_to_nothing_are_not_read(tmp_path):
    row = {"question": "Q", "answer": "A", "context": "C", "history": [["a", "b"]], "system": "S"}
    (example,) = examples(tmp_path, row, context="", history="", system="")
    assert example.prompt == ({"role": "user", "content": "Q"},)
    row = {"prompt": "Q", "completion": "A", "label": True, "input": "C"}
    (example,) = examples(tmp_path, row, label="", input="")
    assert example.prompt == "Q"


def test_an_alpaca_file_read_as_prompt_and_completion_does_not_lose_its_input(tmp_path):
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    with pytest.raises(DataError, match="column 'input' holds '2, 2'"):
        examples(tmp_path, row, prompt="instruction", completion="output")
    (example,) = examples(tmp_path, {**row, "input": ""}, prompt="instruction", completion="output")
    assert (example.prompt, example.completion) == ("Add.", "4")
    # what the message about a question says to do
    row = {"question": "Add.", "input": "2, 2", "answer": "4"}
    (example,) = examples(tmp_path, row, context="input")
    assert example.prompt[0]["content"] == "Add.\n\n2, 2"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "Q"}], "completion": "A"},
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": "A", "rejected": "B"},
        {
            "chosen": chat(("user", "Q"), ("assistant", "A"))["messages"],
            "rejected": chat(("user", "Q"), ("assistant", "B"))["messages"],
        },
    ],
)
def test_a_system_column_starts_a_prompt_of_messages(row, tmp_path):
    (example,) = examples(tmp_path, row | {"system": "Be brief."})
    assert [message["content"] for message in example.prompt] == ["Be brief.", "Q"]
    assert example.completion == "A"


def test_a_system_column_starts_the_chat(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    asked = {"role": "user", "content": "Q"}
    rows = [
        {"question": "Q", "answer": "A", "system": "Be brief."},
        {"question": "Q", "answer": "A", "system": " "},
    ]
    assert [e.prompt for e in examples(tmp_path, *rows)] == [(system, asked), (asked,)]
    turns = [("system", "Be brief."), ("user", "Q"), ("assistant", "A")]
    (example,) = examples(tmp_path, chat(*turns) | {"system": "Be brief."})
    assert example.prompt == (system, asked)
    with pytest.raises(DataError, match="row 1: column 'system' is 'Rhyme.', and the chat begins"):
        examples(tmp_path, chat(*turns) | {"system": "Rhyme."})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            chat(("user", "a"), ("assistant", "b", 0)),
            "column 'messages': all messages of the assistant have weight 0.*drop the row",
        ),
        (chat(("user", "a"), ("assistant", "b", 2)), ".*message 2: weight is 2; it must be 0 or 1"),
        (chat(("user", "a"), ("assistant", "b", True)), ".*message 2: weight is True"),
        (
            chat(("user", "a", 1), ("assistant", "b")),
            ".*message 1: weight is 1 in a message of 'user'",
        ),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": "b", "weight": 0}]},
            "column 'completion': the answer has weight 0",
        ),
        (
            {
                "prompt": [{"role": "assistant", "content": "a", "weight": 0}],
                "chosen": "b",
                "rejected": "c",
            },
            "column 'prompt': a message has a weight",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "column 'history' holds .*write the row as messages",
        ),
        (
            {"question": "a", "answer": "b", "history": "[['c', 'd']]"},
            "column 'history' holds .*history = ",
        ),
        (
            {"instruction": "a", "input": "c", "context": "d", "response": "b"},
            "the columns 'input' and 'context' both hold text",
        ),
        ({"prompt": "a", "completion": "b", "input": "c"}, "column 'input' holds 'c'; .*input = "),
        ({"prompt": "a", "completion": "b", "context": "c"}, "column 'context' holds 'c'; "),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "input": "d"},
            "column 'input' holds 'd'; .*write it into the prompt",
        ),
        (
            {"prompt": "a", "completion": "b", "history": [["c", "d"]]},
            "column 'history' holds .*write the row as messages",
        ),
        (
            {**chat(("user", "a"), ("assistant", "b")), "history": [["c", "d"]]},
            "column 'history' holds .*history = ",
        ),
        (
            {"question": "a", "answer": "b", "input": "c"},
            "column 'input' holds 'c'; .*context = \"input\".*input = ",
        ),
        (
            {"question": "a", "answer": "b", "context": ["c"]},
            "column 'context' is .*must be text, or be left out: .*context = ",
        ),
        (
            {"prompt": "a", "completion": "b", "system": "Rhyme."},
            "column 'system' is 'Rhyme.', and the prompt is plain text.*system = ",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "system": "Rhyme."},
            "column 'system' is 'Rhyme.', and the prompt is plain text",
        ),
        ({"prompt": "a", "completion": "b", "label": False}, "column 'label' is False; .*label = "),
        ({"prompt": "a", "completion": "b", "label": "True"}, "column 'label' is 'True'"),
        ({"text": " "}, "column 'text' is empty"),
        ({"text": 3}, "column 'text' is 3; it must be text"),
        (
            {"messages": "[{'role': 'user'}]"},
            "column 'messages' begins like a list and is not JSON",
        ),
    ],
)
def test_rows_without_anything_to_learn_are_refused_by_row_and_column(row, message, tmp_path):
    with pytest.raises(DataError, match=f"d.jsonl: row 1: {message}"):
        examples(tmp_path, row)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("tools", '[{"name": "add"}]'),
        ("functions", [{"name": "add"}]),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_what_a_chat_template_would_write_is_refused_unless_it_is_empty(column, value, tmp_path):
    row = {"question": "a", "answer": "b"}
    rows = [{**row, column: empty} for empty in ("[]", " ", None, [], {})]
    assert len(examples(tmp_path, *rows)) == 5
    with pytest.raises(DataError, match=f"row 2: column '{column}' holds"):
        examples(tmp_path, row, {**row, column: value})
    with pytest.raises(DataError, match=f"row 1: column '{column}' holds"):
        examples(tmp_path, {**chat(("user", "a"), ("assistant", "b")), column: value})
    # a column that is read, and a text without a prompt
    examples(tmp_path, {**row, column: "c"}, context=column)
    examples(tmp_path, {"text": "a", column: value})


def test_messages_written_as_json_are_read_as_messages(tmp_path):
    turns = chat(("user", "a"), ("assistant", "b"))["messages"]
    (example,) = examples(tmp_path, {"messages": json.dumps(turns)})
    assert (example.prompt, example.completion) == ((turns[0],), "b")


ASKED = {"role": "user", "content": "a"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in "bc")


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "rejected"),
    [
        ({"prompt": [ASKED], "completion": [GOOD]}, (ASKED,), "b", None),
        ({"prompt": [{"from": "human", "value": "a"}], "completion": "b"}, (ASKED,), "b", None),
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, (ASKED,), "b", "c"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, (ASKED,), "b", "c"),
        # lists that are no messages, as answers may be
        ({"prompt": "List two.", "completion": [1, 2]}, "List two.", "[1, 2]", None),
        (
            {"prompt": "[a, b] is", "completion": [{"role": "x"}]},
            "[a, b] is",
            '[{"role": "x"}]',
            None,
        ),
    ],
)
def test_a_table_may_hold_messages_as_json(row, prompt, completion, rejected, tmp_path):
    file = tmp_path / "d.csv"
    cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([list(row), cells])
    (example,) = to_examples(read_rows(file))
    assert (example.prompt, example.completion, example.rejected) == (prompt, completion, rejected)


def test_refusals_name_the_users_own_column_and_line(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text('\n{"Frage": "a", "Antwort": "b"}\n\n\n{"Frage": "c", "Antwort": 3}\n')
    config = DataConfig(columns={"question": "Frage", "answer": "Antwort"})
    with pytest.raises(DataError, match=r"d.jsonl: row 2 \(line 5\): column 'Antwort' is 3"):
        read_source(str(file), config, "train")
