"""What comes from outside is checked against a declared type, and refused by field."""

from __future__ import annotations

import msgspec
import pytest

from fedmomentum.errors import AdapterError, PayloadError
from fedmomentum.utils.schema import (
    Count,
    Hash,
    Label,
    Schema,
    Size,
    check_free_form,
    parse_json,
    validation_message,
)
from fedmomentum.utils.text import printable


class Row(Schema):
    loss: Size
    counts: dict[Label, Count] = {}
    name: Hash | None = None


def test_a_fitting_text_is_decoded():
    row = parse_json('{"loss": 1, "counts": {"a": 2}, "name": "%s"}' % ("ab" * 32), Row, "site")
    assert row == Row(loss=1.0, counts={"a": 2}, name="ab" * 32)
    assert isinstance(row.loss, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"loss": true}', "loss: Expected `float`, got `bool`"),
        ('{"loss": -1}', "loss: Expected `float` >= 0.0; got -1$"),
        ('{"loss": NaN}', "not valid JSON"),
        ('{"loss": Infinity}', "not valid JSON"),
        ('{"loss": 1e999}', "loss: Number out of range"),
        ('{"loss": 1%s}' % ("0" * 400), "loss: Number out of range"),
        ('{"loss": 1, "counts": {"a": 1.5}}', "counts.*Expected `int`, got `float`"),
        ('{"loss": 1, "counts": {"a": 9007199254740992}}', "counts.*<="),
        ('{"loss": 1, "counts": {"\\u001b[2J": 1}}', "counts"),
        ('{"loss": 1, "counts": {"%s": 1}}' % ("a" * 257), "counts.*length"),
        ('{"loss": 1, "name": "AB"}', "name"),
        ('{"loss": 1, "name": "%s\\n"}' % ("ab" * 32), "name"),
        ('{"loss": 1, "more": 1}', "unknown field `more`"),
        ("{}", "missing required field `loss`"),
        ("[" * 100_000, "site"),
        ('{"loss": ' + "[" * 100_000, "site"),
        ('{"loss": "\\ud800"}', "site"),
        ("", "site"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_field(text, message):
    with pytest.raises(PayloadError, match=message) as caught:
        parse_json(text, Row, "site")
    assert str(caught.value).startswith("site: ")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"loss": -1.5}, "loss: Expected `float` >= 0.0; got -1.5"),
        ({"loss": 1, "counts": {"a": -2}}, "counts[...]: Expected `int` >= 0"),
        ({"loss": "1"}, "loss: Expected `float`, got `str`"),
        ({}, "Object missing required field `loss`"),
    ],
)
def test_a_converted_value_is_refused_with_the_number_that_is_out_of_range(value, message):
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, Row)
    assert validation_message(caught.value, value) == message


def test_the_error_is_the_callers():
    with pytest.raises(AdapterError):
        parse_json("1", Row, "adapter", AdapterError)


def test_free_form_json_has_a_depth_and_a_size():
    check_free_form({"a": [{"b": [1, 2]}]}, "settings")
    deep: object = 1
    for _ in range(500):
        deep = {"a": deep}
    with pytest.raises(PayloadError, match="settings is nested deeper than"):
        check_free_form(deep, "settings")
    with pytest.raises(PayloadError, match="settings holds more than"):
        check_free_form([0] * 300_000, "settings")
    with pytest.raises(PayloadError, match="not text"):
        check_free_form({1: 2}, "settings")


def test_text_is_shown_on_one_line_without_control_characters():
    shown = printable("a\x1b]0;title\x07\nb\x00\u202e\ud800" + "c" * 10_000, 100)
    assert len(shown) == 100
    assert shown.startswith("a\ufffd]0;title\ufffd\ufffdb\ufffd\ufffd\ufffdc") and shown.endswith(
        "c…"
    )
