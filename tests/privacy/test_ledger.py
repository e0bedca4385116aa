"""A ledger counts every training before it starts, and never forgets one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedmomentum.errors import PrivacyError
from fedmomentum.privacy.accountant import epsilon_of
from fedmomentum.privacy.ledger import RETAINED_REPLIES, Budget, Ledger, read_ledger, round_down
from fedmomentum.privacy.mechanism import Mechanism, group_units

TASKS = [character * 64 for character in "0123456789abcdef"]
DATA = "d" * 64
MECHANISM = Mechanism(1.0, 0.1, 10, 1.0, 8.0)


def ledger_of(directory: Path, epsilon=None, *, party="north", unit="example") -> Ledger:
    ledger = Ledger(directory / f"{party}.json", party, unit, Budget(epsilon, 1e-5))
    ledger.begin(80)
    return ledger


def train(ledger, task=TASKS[0], reply=b"reply", mechanism=MECHANISM, server_round=1):
    with ledger.training(task, "run", server_round, mechanism, DATA) as training:
        training.finish(reply)


def spent(ledger):
    return epsilon_of(ledger.read().history, 1e-5)


def test_training_counts_before_it_starts_and_its_reply_comes_again(tmp_path):
    ledger = ledger_of(tmp_path)
    assert ledger.stored_reply(TASKS[0]) is None
    with ledger.training(TASKS[0], "run", 1, MECHANISM, DATA) as training:
        (written,) = read_ledger(ledger.file).trainings
        assert (written.state, written.num_steps, written.reply) == ("started", 10, None)
        training.finish(b"the reply")
    assert ledger.stored_reply(TASKS[0]) == b"the reply"
    (written,) = ledger_of(tmp_path).read().trainings
    assert written.state == "replied" and written.expected_batch == 8.0
    assert os.stat(ledger.file).st_mode & 0o77 == 0


def test_budget_is_refused_with_the_figures_before_anything_is_written(tmp_path):
    three = epsilon_of([MECHANISM_STEPS(30)], 1e-5)
    ledger = ledger_of(tmp_path, three + 0.01)
    for task in TASKS[:3]:
        train(ledger, task)
    with pytest.raises(
        PrivacyError, match=rf"from {three:.3f} to \d.*at delta 1e-05.* is {three + 0.01:g}"
    ):
        train(ledger, TASKS[3])
    assert len(ledger.read().trainings) == 3
    # Less work may still fit, and another run counts as well.
    with pytest.raises(PrivacyError, match="Nothing was trained"):
        with ledger.training(TASKS[4], "another run", 1, MECHANISM, DATA):
            raise AssertionError("it has begun")


def MECHANISM_STEPS(count):
    from fedmomentum.privacy.accountant import Steps

    return Steps(1.0, 0.1, count)


def test_failed_training_counts_and_repeating_it_counts_again(tmp_path):
    ledger = ledger_of(tmp_path)
    with pytest.raises(ZeroDivisionError), ledger.training(TASKS[0], "run", 1, MECHANISM, DATA):
        raise ZeroDivisionError
    train(ledger)
    assert [one.state for one in ledger.read().trainings] == ["failed", "replied"]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.privacy.test_ledger import *
from fedmomentum.privacy import ledger as module
where = sys.argv[2]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
ledger = ledger_of(Path(sys.argv[1]))
with ledger.training(TASKS[0], "run", 1, MECHANISM, DATA) as training:
    if where == "training":
        kill()
    if where == "record":  # the reply is on disk, the record of it is not
        Ledger._write = kill
    training.finish(b"first")
    kill()
"""


@pytest.mark.parametrize(
    ("where", "state", "reply"),
    [
        ("training", "started", b"second"),
        ("record", "started", b"second"),
        ("end", "replied", b"first"),
    ],
)
def test_killed_at_any_moment_exactly_what_was_revealed_is_spent(tmp_path, where, state, reply):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED, str(tmp_path), where]
    done = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    ledger = ledger_of(tmp_path)
    assert [one.state for one in ledger.read().trainings] == [state]
    # The task comes again: what has left is not trained again, and what has not is counted once.
    if ledger.stored_reply(TASKS[0]) is None:
        train(ledger, reply=b"second")
    assert ledger.stored_reply(TASKS[0]) == reply
    assert len(ledger.read().trainings) == 1
    # Another task after a killed one is another training.
    train(ledger, TASKS[1])
    assert len(ledger.read().trainings) == 2


def test_killed_training_that_is_repeated_differently_counts_separately(tmp_path):
    ledger = ledger_of(tmp_path)
    ledger._enter(_started(ledger))
    more = Mechanism(1.0, 0.1, 11, 1.0, 8.0)
    train(ledger, mechanism=more)
    assert [one.num_steps for one in ledger.read().trainings] == [10, 11]


def _started(ledger):
    with ledger.training(TASKS[0], "run", 1, MECHANISM, DATA) as training:
        training.finish(b"x")
    record = ledger.read()
    started = record.trainings[0]
    import msgspec

    started = msgspec.structs.replace(started, state="started", reply=None)
    ledger._write(msgspec.structs.replace(record, trainings=[]))
    return started


def test_only_one_process_trains_on_a_ledger(tmp_path):
    ledger = ledger_of(tmp_path)
    with ledger.training(TASKS[0], "run", 1, MECHANISM, DATA):
        with pytest.raises(PrivacyError, match="another process is training"):
            train(ledger_of(tmp_path), TASKS[1])


def test_ledger_of_another_client_or_unit_or_a_damaged_one_is_refused(tmp_path):
    ledger = ledger_of(tmp_path)
    train(ledger)
    other = Ledger(ledger.file, "south", "example", ledger.budget)
    with pytest.raises(PrivacyError, match="the ledger of north; this client is south"):
        other.begin(1)
    patients = Ledger(ledger.file, "north", "patient", ledger.budget)
    with pytest.raises(PrivacyError, match="counts what is revealed of one example"):
        patients.begin(1)
    table = json.loads(ledger.file.read_text())
    table["trainings"][0]["num_steps"] = 1
    ledger.file.write_text(json.dumps(table))
    with pytest.raises(PrivacyError, match="damaged or altered"):
        ledger.begin(1)
    ledger.file.write_text("{}")
    with pytest.raises(PrivacyError):
        train(ledger)


def test_removed_ledger_does_not_reset_what_was_spent(tmp_path):
    ledger = ledger_of(tmp_path)
    train(ledger)
    ledger.file.unlink()
    with pytest.raises(PrivacyError, match="is missing, and .* shows that there was a ledger"):
        ledger.begin(1)
    assert not ledger.file.exists()


def test_a_kill_while_a_ledger_is_created_leaves_no_trace_of_one(tmp_path):
    ledger = ledger_of(tmp_path)
    ledger.begin(1)
    ledger.file.unlink()  # as if killed before it was written
    ledger.begin(1)
    train(ledger)
    assert len(ledger.read().trainings) == 1


def test_replies_of_the_newest_trainings_are_kept(tmp_path):
    ledger = ledger_of(tmp_path)
    for number, task in enumerate(TASKS[: RETAINED_REPLIES + 2]):
        train(ledger, task, reply=b"%d" % number)
    kept = [ledger.stored_reply(task) for task in TASKS[: RETAINED_REPLIES + 2]]
    assert kept == [None, None, b"2", b"3", b"4", b"5"]
    # A damaged reply is none.
    for file in (tmp_path / "north.replies").iterdir():
        file.write_bytes(b"?")
    assert ledger.stored_reply(TASKS[3]) is None


def test_units_are_grouped_and_rounded():
    assert group_units(("b", "", "a", "b", "")) == ((0, 3), (1,), (2,), (4,))
    assert [round_down(n) for n in (1, 9, 12, 99, 100, 1289, 12999)] == [
        1,
        9,
        12,
        99,
        100,
        1200,
        12000,
    ]
