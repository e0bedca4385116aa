"""Mutated messages of a secure sum: refused by name, or the message as it was; nothing is opened for others."""

import random

import msgspec
import pytest

from fedmomentum.errors import DataError, SecureSumError
from fedmomentum.secure_sum.messages import ServerMessage, decode_message
from tests.fuzz.mutate import NUM_TRIALS, mutate_bytes
from tests.secure_sum.sums import make_plan, until

ME = "party 01"


class Trials:
    """The state before a step, rebuilt only after something was accepted."""

    def __init__(self, step, tmp_path):
        self.step = step
        self.folder = tmp_path
        self.made = 0
        self.renew()

    def renew(self):
        folder = self.folder / str(self.made)
        folder.mkdir()
        self.made += 1
        self.server, self.parties = until(self.step, make_plan(4), folder)


@pytest.mark.parametrize("step", range(5))
def test_mutated_messages_to_a_party(tmp_path, step):
    trials = Trials(step, tmp_path)
    num_refused = 0
    for seed in range(NUM_TRIALS // 10):
        party = trials.parties[ME]
        message = trials.server.messages()[ME]
        change, mutated = mutate_bytes(message, random.Random(seed))
        try:
            party.answer(mutated)
        except SecureSumError as error:
            assert str(error) and len(str(error)) < 2000, change
            num_refused += 1
            continue
        except DataError as error:
            # Another valid plan may have a bound that the party's own values exceed.
            assert not step and "the sum's bound is" in str(error), change
            num_refused += 1
            continue
        # Bytes of no meaning may differ, and a plan may be another valid one; nothing else may.
        accepted = decode_message(mutated, ServerMessage, "x")
        if step:
            assert accepted == decode_message(message, ServerMessage, "x"), change
        trials.renew()
    assert num_refused > NUM_TRIALS // 20


@pytest.mark.parametrize("step", range(5))
def test_mutated_replies_to_the_server(tmp_path, step):
    trials = Trials(step, tmp_path)
    reply = trials.parties[ME].answer(trials.server.messages()[ME])
    num_refused = 0
    for seed in range(NUM_TRIALS // 10):
        change, mutated = mutate_bytes(reply, random.Random(seed))
        try:
            trials.server.receive(ME, mutated)
        except SecureSumError as error:
            assert ME in str(error) and len(str(error)) < 2000, change
            num_refused += 1
            continue
        # Nobody can check the content of masks and shares here; its form is unchanged.
        assert set(msgspec.msgpack.decode(mutated)) == set(msgspec.msgpack.decode(reply)), change
        trials.renew()
        reply = trials.parties[ME].answer(trials.server.messages()[ME])
    assert num_refused > NUM_TRIALS // 50
