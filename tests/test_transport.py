"""Bytes from the wire: they decode to what was encoded, and nothing else is accepted."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.errors import PayloadError
from fedmomentum.protocol.codec import decode_reply, decode_task, encode_reply, encode_task
from fedmomentum.protocol.messages import Reply, TrainResult
from fedmomentum.protocol.transport import Failure, InProcessTransport
from fedmomentum.utils.tensors import safetensors_bytes
from tests.runs import train_task

texts = st.text(max_size=20)
TASK = train_task("site é", server_round=3, objects={"ab" * 32: b"\x00\x01bytes"})
RESULT = TrainResult(
    loss=1.0, first_loss=2.0, last_loss=0.5, num_steps=3, num_tokens=40, rounding=0.0
)
REPLY = Reply(
    "run",
    "site é",
    3,
    "cd" * 32,
    ["ab" * 32],
    5,
    "ef" * 32,
    RESULT,
    {"t": torch.arange(6.0).reshape(2, 3)},
)


def test_round_trips_and_canonical_bytes():
    assert decode_task(encode_task(TASK)) == TASK
    decoded = decode_reply(encode_reply(REPLY), TASK, 10**6)
    assert decoded.answer == REPLY.answer and torch.equal(decoded.tensors["t"], REPLY.tensors["t"])
    assert (
        len({encode_task(TASK) for _ in range(20)})
        == len({encode_reply(REPLY) for _ in range(20)})
        == 1
    )


@given(
    objects=st.dictionaries(
        st.text("0123456789abcdef", min_size=64, max_size=64), st.binary(max_size=200), max_size=4
    ),
    arguments=st.dictionaries(
        texts, st.one_of(texts, st.integers(), st.booleans(), st.none()), max_size=4
    ),
)
def test_any_task_round_trips(objects, arguments):
    task = train_task(objects=objects, arguments=arguments)
    assert decode_task(encode_task(task)) == task


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused_and_not_executed(data):
    for decode in (decode_task, lambda d: decode_reply(d, TASK, 10**6)):
        with pytest.raises(PayloadError):
            decode(data)


@settings(max_examples=300)
@given(st.data())
def test_damaged_replies_are_refused_or_differ_only_in_numbers(data):
    """No flipped or missing byte makes anything but a PayloadError, or other numbers of the same form."""
    good = bytearray(encode_reply(REPLY))
    position = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        good = good[:position]
    else:
        good[position] ^= data.draw(st.integers(1, 255))
    try:
        reply = decode_reply(bytes(good), TASK, 10**6)
    except PayloadError:
        return
    assert (
        isinstance(reply.answer, TrainResult)
        and reply.num_examples > 0
        and reply.client_id == TASK.client_id
    )


@pytest.mark.parametrize("claimed", [2**63 - 1, 2**43, 2**31, 1000])
def test_a_header_that_claims_more_than_was_sent_is_refused_at_once(claimed):
    with pytest.raises(PayloadError, match="header claims"):
        decode_task(claimed.to_bytes(8, "little") + b"{}")


def test_a_tensor_that_claims_terabytes_is_refused():
    header = json.dumps(
        {"t": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    with pytest.raises(PayloadError, match="not safetensors"):
        decode_task(len(header).to_bytes(8, "little") + header)


def test_deep_or_odd_heads_are_refused():
    for text in ("[" * 100_000, "null", "3", '{"protocol": 3}', '{"protocol": 3, "evil": 1}', "{}"):
        with pytest.raises(PayloadError):
            decode_task(safetensors_bytes({}, ("task", text)))


def test_an_exception_of_a_client_is_its_failure_and_ctrl_c_is_not():
    def broken(_):
        return {}["lost"]

    def interrupted(_):
        raise KeyboardInterrupt

    transport = InProcessTransport({"b": broken, "a": lambda payload: payload[::-1]})
    assert transport.clients() == ["a", "b"]
    answers = dict(transport.send_and_receive({"a": b"12", "b": b"", "c": b""}))
    assert answers["a"] == b"21" and answers["b"] == Failure("KeyError: 'lost'")
    assert "no such client" in answers["c"].reason
    with pytest.raises(KeyboardInterrupt):
        dict(InProcessTransport({"a": interrupted}).send_and_receive({"a": b""}))
