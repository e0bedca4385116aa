"""A client's exception is its failure, with the place where it arose."""

from fedmomentum.errors import DataError
from fedmomentum.protocol.transport import Failure, InProcessTransport


def failure_of(error):
    def handle(payload):
        raise error

    (result,) = InProcessTransport({"north": handle}).send_and_receive({"north": b""})
    return result


def test_a_failure_names_the_place_that_was_noted():
    error = KeyError("boom")
    error.add_note("mine.py, line 3, in train")
    expected = Failure("KeyError: 'boom' (mine.py, line 3, in train)")
    assert failure_of(error) == ("north", expected)
    assert failure_of(DataError("no rows")) == ("north", Failure("DataError: no rows"))
