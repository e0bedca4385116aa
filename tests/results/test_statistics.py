"""Small-sample statistics against published and hand-made values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum.results.statistics import MeanEstimate, estimate_mean, incomplete_beta, t_quantile

# Any table of Student's t (e.g. NIST/SEMATECH e-Handbook, 1.3.6.7.2).
TABLE = [
    (0.975, 1, 12.7062),
    (0.975, 2, 4.3027),
    (0.975, 3, 3.1824),
    (0.975, 4, 2.7764),
    (0.975, 9, 2.2622),
    (0.975, 30, 2.0423),
    (0.975, 100, 1.9840),
    (0.95, 5, 2.0150),
    (0.995, 2, 9.9248),
    (0.9, 10, 1.3722),
]


@pytest.mark.parametrize(("share", "freedom", "value"), TABLE)
def test_t_quantile_published(share, freedom, value):
    assert t_quantile(share, freedom) == pytest.approx(value, abs=6e-5)
    assert t_quantile(1 - share, freedom) == pytest.approx(-value, abs=6e-5)


def test_t_quantile_in_closed_form():
    for share in (0.6, 0.9, 0.975, 0.999):
        assert t_quantile(share, 1) == pytest.approx(math.tan(math.pi * (share - 0.5)), rel=1e-9)
        p = 2 * share - 1
        assert t_quantile(share, 2) == pytest.approx(p * math.sqrt(2 / (1 - p * p)), rel=1e-9)
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-9)
    assert t_quantile(0.975, 10**6) == pytest.approx(1.959966, abs=2e-6)


@given(x=st.floats(0, 1), a=st.integers(1, 12), b=st.integers(1, 12))
def test_incomplete_beta_of_whole_numbers_is_a_binomial_tail(x, a, b):
    n = a + b - 1
    wanted = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
    assert incomplete_beta(x, a, b) == pytest.approx(wanted, abs=1e-12)


def test_estimate_mean_by_hand():
    got = estimate_mean([1.0, 2.0, 6.0])
    spread = math.sqrt(7)  # (4 + 1 + 9) / 2
    half = 4.302652729911275 * spread / math.sqrt(3)
    assert (got.mean, got.count) == (3.0, 3)
    assert got.spread == pytest.approx(spread)
    assert (got.low, got.high) == pytest.approx((3 - half, 3 + half))
    assert estimate_mean([5.0]) == MeanEstimate(5.0, None, None, None, 1)
    assert estimate_mean([]) is None
