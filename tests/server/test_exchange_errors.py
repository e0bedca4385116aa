"""Why clients gave no usable reply, in one line."""

from fedmomentum.errors import PayloadError
from fedmomentum.server.exchange import contain_errors
from fedmomentum.utils.text import joined_reasons


def test_clients_with_the_same_reason_are_listed_together():
    assert joined_reasons({}) == ""
    assert joined_reasons({"b": "gone", "c": "late", "a": "gone"}) == "a, b: gone; c: late"
    many = dict.fromkeys((f"site{number}" for number in range(7)), "gone")
    assert joined_reasons(many) == "site0, site1, site2, site3, site4 and 2 more: gone"


def test_a_reason_does_not_repeat_the_name_that_it_is_kept_under():
    failures: dict[str, str] = {}
    with contain_errors("north", failures):
        raise PayloadError("client north: tensor x is missing")
    with contain_errors("south", failures):
        raise PayloadError("client north: tensor x is missing")
    with contain_errors("west", failures):
        raise KeyError("x")
    assert failures == {
        "north": "tensor x is missing",
        "south": "client north: tensor x is missing",
        "west": "its answer could not be handled (KeyError)",
    }
