import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.secure_sum import shamir
from fedmomentum.secure_sum.keys import public_key
from fedmomentum.secure_sum.shamir import PRIME, join_shares, random_secret, split_secret


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 30), secret=st.integers(0, PRIME - 1))
def test_as_many_shares_as_the_threshold_open_it_and_fewer_do_not(data, n, secret):
    threshold = data.draw(st.integers(1, n))
    secret = secret.to_bytes(32, "little")
    shares = dict(enumerate(split_secret(secret, threshold, n), start=1))
    order = data.draw(st.permutations(sorted(shares)))
    assert join_shares({point: shares[point] for point in order[:threshold]}) == secret
    assert join_shares({point: shares[point] for point in order}) == secret
    if threshold > 1:
        assert join_shares({point: shares[point] for point in order[: threshold - 1]}) != secret


def test_shares_below_the_threshold_fit_every_secret():
    """For two of three shares and any other secret there is a polynomial: they say nothing."""
    secret = random_secret()
    shares = split_secret(secret, 3, 3)
    for other in (bytes(32), (7).to_bytes(32, "little")):
        # the share at point 3 which, with the same first two, gives the other secret
        base = int.from_bytes(join_shares(dict(enumerate([*shares[:2], bytes(32)], 1))), "little")
        unit = int.from_bytes(
            join_shares(dict(enumerate([bytes(32), bytes(32), (1).to_bytes(32, "little")], 1))),
            "little",
        )
        third = (int.from_bytes(other, "little") - base) * pow(unit, -1, PRIME) % PRIME
        altered = [*shares[:2], third.to_bytes(32, "little")]
        assert join_shares(dict(enumerate(altered, 1))) == other


def test_the_same_secret_is_divided_differently_every_time():
    secret = random_secret()
    assert split_secret(secret, 2, 3) != split_secret(secret, 2, 3)
    assert random_secret() != random_secret()


def test_a_secret_is_a_private_key():
    secret = random_secret()
    assert public_key(join_shares(dict(enumerate(split_secret(secret, 2, 4), 1)))) == public_key(
        secret
    )


def test_data_that_is_not_a_field_element_is_refused():
    for data in (PRIME.to_bytes(32, "little"), b"\xff" * 32, bytes(31), b""):
        with pytest.raises(ValueError, match="no element"):
            join_shares({1: data, 2: bytes(32)})
        with pytest.raises(ValueError, match="no element"):
            split_secret(data, 2, 3)
    with pytest.raises(ValueError, match=r"threshold must be in 1..3; got 4"):
        split_secret(bytes(32), 4, 3)


def test_shares_are_the_values_of_the_polynomial(monkeypatch):
    """Secret 5, polynomial 5 + 7 x + 11 x^2."""
    drawn = iter([7, 11])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda _: next(drawn))
    shares = split_secret((5).to_bytes(32, "little"), 3, 4)
    assert [int.from_bytes(share, "little") for share in shares] == [23, 63, 125, 209]
