"""Numbers as text."""

import pytest

from fedmomentum.results.formatting import target_percent


@pytest.mark.parametrize(
    ("target", "text"),
    [(0.0, "0"), (0.004, "0.4"), (0.1, "10"), (0.725, "72.5"), (0.995, "99.5"), (1.0, "100")],
)
def test_a_target_is_not_rounded(target, text):
    assert target_percent(target) == f"{text}\u00a0%"
