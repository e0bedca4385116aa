"""Which columns count: one format, or a refusal that says what would make it one."""

import pytest

from fedmomentum.config.toml import from_dict
from fedmomentum.data.columns import find_format
from fedmomentum.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("columns", "mapping", "kind", "names"),
    [
        (["instruction", "input", "output", "text"], {}, "instruction+output", None),
        (["instruction", "context", "response", "category"], {}, "instruction+response", None),
        (["text", "url"], {}, "text", {"text": "text"}),
        (["Frage", "Antwort"], {"question": "Frage", "answer": "Antwort"}, "question+answer", None),
        # a column that stands for another of ours does not count under its own name
        (
            ["instruction", "response"],
            {"prompt": "instruction", "completion": "response"},
            "prompt+completion",
            {"prompt": "instruction", "completion": "response"},
        ),
        # names that the user gave decide
        (["messages", "q", "a"], {"question": "q", "answer": "a"}, "question+answer", None),
        (["text", "label"], {"text": "text"}, "text", None),
        (["messages", "question", "answer"], {"messages": ""}, "question+answer", None),
        (
            ["instruction", "output", "input"],
            {"input": ""},
            "instruction+output",
            {"instruction": "instruction", "output": "output"},
        ),
    ],
)
def test_one_format_is_found(columns, mapping, kind, names):
    form = find_format(columns, mapping, "f")
    assert form.kind == kind
    assert names is None or form.names == names


@pytest.mark.parametrize(
    ("columns", "mapping", "message"),
    [
        (["a", "b"], {}, r"f: the columns a, b fit no known format; .*\[data.columns\]"),
        (["messages", "conversations"], {}, 'several formats .*such as conversations = ""'),
        (["instruction", "output", "response"], {}, "fit several formats"),
        (["text", "label"], {}, "fit no known format.*train a classifier"),
        (["q"], {"question": "Frage"}, "no column 'Frage', which .* gives for question.*found: q"),
    ],
)
def test_ambiguous_columns_are_refused(columns, mapping, message):
    with pytest.raises(DataError, match=message):
        find_format(columns, mapping, "f")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"columns": {"frage": "question"}}, "data.columns.frage must be left out: the columns"),
        ({"columns": {"question": "a", "answer": "a"}}, "question and answer share it"),
        ({"encoding": "latin-17"}, "data.encoding must be auto or a text encoding"),
        ({"encoding": "rot13"}, "data.encoding must be auto or a text encoding"),
    ],
)
def test_settings_of_reading_are_checked(data, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({"data": data})
