"""Messages of other formats are converted, or refused by position."""

import pytest

from fedmomentum.data.chats import SHAREGPT_ROLES, parse_chat
from fedmomentum.errors import DataError


def test_sharegpt_messages_are_converted():
    for sender, role in SHAREGPT_ROLES.items():
        chat = parse_chat([{"from": sender, "value": "a", "text": None}], "conversations")
        assert chat.messages == [{"role": role, "content": "a"}]
    weighted = parse_chat([{"from": "gpt", "value": "a", "weight": 0}], "conversations")
    assert (weighted.weights, weighted.learned_turns()) == ([0], ())


def test_names_are_kept_for_the_template():
    message = {"role": "user", "content": "a", "name": "Ann"}
    assert parse_chat([message], "messages").messages == [message]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"from": "alien", "value": "a"}, "message 1: from is 'alien'; known: human, user, gpt"),
        (
            {"from": "function_call", "value": "{}"},
            "message 1: from is 'function_call'.*tool_calls",
        ),
        ({"from": "gpt"}, "message 1: must have from and value"),
        ({"from": "gpt", "value": "a", "role": "x"}, "message 1: must have from and value"),
        ({"from": ["gpt"], "value": "a"}, "message 1: from is"),
        ({"from": "gpt", "value": "a", "mood": "glad"}, "must have exactly role and content"),
        ({"role": "user", "content": []}, "message 1"),
        ({"role": "user", "content": ["a"]}, "part 1 of its content is 'a'; only parts of text"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "part 1 of its content"),
        ({"role": "assistant", "content": "a", "weight": "1"}, "weight is '1'; it must be 0 or 1"),
    ],
)
def test_messages_of_unknown_form_are_refused_by_position(message, text):
    if message.get("content") == []:
        assert parse_chat([message], "messages").messages[0]["content"] == ""
        return
    with pytest.raises(DataError, match=text):
        parse_chat([message], "messages")
