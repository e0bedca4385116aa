import dataclasses

import pytest

from fedmomentum.data import ClientData, Example
from fedmomentum.errors import DataError


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("hello", "", "completion is empty"),
        ("hello", " \n", "completion is empty"),
        ("hello", None, "completion is NoneType"),
        ("", "x", "prompt is empty"),
        ((), "x", "holds no message"),
        ([{"role": "user", "content": "a"}], "x", "prompt is list"),
        (({"role": "user"},), "x", "message 1 .* exactly role and content"),
        (
            ({"role": "user", "content": "a"}, {"role": "user", "content": 3}),
            "x",
            "message 2 .* must be text",
        ),
    ],
)
def test_unusable_example_is_refused(prompt, completion, message):
    with pytest.raises(DataError, match=message):
        Example(prompt, completion)


def test_example_and_client_are_frozen():
    example = Example("hello", "x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.prompt = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        ClientData("a", (example,), ()).train = ()


def test_client_without_name_or_training_examples_is_refused():
    with pytest.raises(DataError, match="no name"):
        ClientData("", (Example("hello", "x"),), ())
    with pytest.raises(DataError, match="client ward-3: no training examples"):
        ClientData("ward-3", (), (Example("hello", "x"),))
