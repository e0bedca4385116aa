"""Epsilons against another library's, bounds that hold at the ends, and the noise that an epsilon takes."""

import math

import pytest

from fedmomentum.errors import ConfigError
from fedmomentum.privacy.accountant import Steps, epsilon_of, fits, noise_for

# (steps, delta, epsilon of Google's dp-accounting 0.6, PLDAccountant with PoissonSampledDpEvent of
# GaussianDpEvent: pessimistic, the larger of adding and removing a unit).
REFERENCES = [
    ([(1.0, 0.05, 100)], 1e-5, 3.5021485),
    ([(1.0, 0.05, 1000)], 1e-5, 10.9866792),
    ([(1.0, 1.0, 10)], 1e-5, 17.8565866),
    ([(5.0, 0.01, 1)], 1e-5, 0.0057292),
    ([(50.0, 0.01, 1)], 1e-6, 0.0004645),
    ([(1.0, 0.05, 100), (2.0, 0.1, 200), (0.7, 0.01, 300)], 1e-6, 6.2379381),
    ([(1.0, 0.02, 20)], 1e-9, 2.2936114),
]


@pytest.mark.parametrize(("history", "delta", "reference"), REFERENCES)
def test_epsilon_is_a_tight_bound_of_another_librarys(history, delta, reference):
    epsilon = epsilon_of([Steps(*steps) for steps in history], delta)
    assert reference - 1e-4 <= epsilon <= reference * 1.01 + 0.002


def test_equal_steps_count_together_in_any_order():
    one = [Steps(1.1, 0.1, 5), Steps(0.9, 0.2, 3), Steps(1.1, 0.1, 6)]
    other = [Steps(0.9, 0.2, 3), Steps(1.1, 0.1, 11)]
    assert epsilon_of(one, 1e-5) == epsilon_of(other, 1e-5)
    assert epsilon_of([], 1e-5) == 0.0


@pytest.mark.parametrize(
    "steps",
    [(1.0, 0.05, 10**7), (1e-3, 0.5, 10), (0.1, 0.1, 50), (1e-6, 1.0, 1), (1.0, 1.0, 10**9)],
)
def test_without_protection_the_bound_is_large_and_quick(steps):
    epsilon = epsilon_of([Steps(*steps)], 1e-5)
    assert epsilon > 100 and not math.isnan(epsilon)
    assert not fits([Steps(*steps)], 50.0, 1e-5)


def test_many_small_steps_need_no_larger_grid_than_fits_into_memory():
    assert 1.9 < epsilon_of([Steps(20.0, 0.01, 10**6)], 1e-5) < 2.3


def test_noise_for_an_epsilon_is_sufficient_and_nearly_minimal():
    epsilon = 3.0
    noise = noise_for(epsilon, 1e-5, 0.05, 60)
    assert epsilon_of([Steps(noise, 0.05, 60)], 1e-5) <= epsilon
    assert not fits([Steps(noise * 0.995, 0.05, 60)], epsilon, 1e-5)


def test_an_epsilon_that_no_noise_reaches_is_refused():
    with pytest.raises(ConfigError, match="no noise up to 10000 times"):
        noise_for(1e-9, 1e-12, 1.0, 10**6)
