import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.errors import DataError, SecureSumError, public_text
from fedmomentum.secure_sum.fixed_point import (
    count_block,
    decode,
    encode,
    largest_integer,
)
from fedmomentum.secure_sum.messages import Block
from tests.secure_sum.sums import sum_error

BLOCKS = [Block(name="B", size=4, bound=0.25), Block(name="A", size=2, bound=3e4)]


def good():
    return {"B": np.array([0.25, -0.25, 0.1, 0.0]), "A": np.array([1.5, -3e4])}


@settings(max_examples=60, deadline=None)
@given(n=st.integers(3, 100), survivors=st.integers(3, 100), seed=st.integers(0, 999))
def test_the_sum_is_within_the_stated_error(n, survivors, seed):
    survivors = min(n, survivors)
    draw = np.random.default_rng(seed)
    total = np.zeros(6, dtype=np.uint32)
    exact = {block.name: np.zeros(block.size) for block in BLOCKS}
    for _ in range(survivors):
        values = {b.name: draw.uniform(-b.bound, b.bound, b.size) for b in BLOCKS}
        total += encode(values, BLOCKS, n)
        for name, elements in values.items():
            exact[name] += elements
    for block in BLOCKS:
        error = np.abs(decode(total, BLOCKS, n)[block.name] - exact[block.name]).max()
        assert error <= sum_error(block, n, survivors) * (1 + 1e-6)
        # of the mean, for any number of parties
        assert error / survivors <= 1e-7 * block.bound
        if n <= 20:
            assert error <= 1e-7 * block.bound


def test_the_bound_on_the_error_is_sharp():
    """Half a unit is lost where an element lies between two integers."""
    block = Block(name="x", size=1, bound=1.0)
    half = 0.5 / largest_integer(10)
    total = sum(encode({"x": np.array([half * 0.999])}, [block], 10) for _ in range(10))
    error = abs(decode(total, [block], 10)["x"][0] - 10 * half * 0.999)
    assert 0.99 * sum_error(block, 10, 10) < error <= sum_error(block, 10, 10)


@pytest.mark.parametrize("n", [3, 7, 64, 100])
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_overflows_where_all_are_at_the_bound(n, sign):
    total = np.zeros(6, dtype=np.uint32)
    for _ in range(n):
        total += encode({b.name: np.full(b.size, sign * b.bound) for b in BLOCKS}, BLOCKS, n)
    for block in BLOCKS:
        np.testing.assert_allclose(decode(total, BLOCKS, n)[block.name], sign * n * block.bound)


@pytest.mark.parametrize("invalid", [np.nan, np.inf, -np.inf, 0.2500001, -1e300])
def test_values_that_cannot_be_summed_are_refused_and_not_sent(invalid):
    values = good()
    values["B"][2] = invalid
    with pytest.raises(DataError, match=r"block 'B' of this party's update .* takes no part") as e:
        encode(values, BLOCKS, 5)
    assert public_text(e.value) == "DataError (its own log says more)"


def test_other_blocks_are_refused_by_name():
    with pytest.raises(SecureSumError, match="blocks are not those of this party's update: C"):
        encode(good() | {"C": np.zeros(1)}, BLOCKS, 5)
    with pytest.raises(SecureSumError, match="blocks are not .*: A"):
        encode({"B": good()["B"]}, BLOCKS, 5)
    with pytest.raises(SecureSumError, match=r"'A' has 2 elements in the sum, .* has \(3,\)"):
        encode(good() | {"A": np.zeros(3)}, BLOCKS, 5)


@pytest.mark.parametrize("n", [3, 10, 100])
def test_counts_are_summed_exactly(n):
    block = count_block("examples", 3, n)
    counts = [np.array([i, 7 * i + 1, largest_integer(n) - i], dtype=np.float64) for i in range(n)]
    total = sum(encode({"examples": c}, [block], n) for c in counts)
    assert (decode(total, [block], n)["examples"] == sum(counts)).all()
