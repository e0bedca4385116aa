"""Weights in a sum: fractions of a total, capped, whether given or computed by a method."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmomentum.aggregation import HetLoRA
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.weights import capped_weights
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter


@given(
    counts=st.lists(st.integers(1, 10**9), min_size=1, max_size=20),
    cap=st.floats(0.01, 1.0, allow_subnormal=False),
)
def test_weights_are_shares_and_capped(counts, cap):
    weights = capped_weights({f"c{i:02d}": n for i, n in enumerate(counts)}, cap)
    values = list(weights.values())
    assert sum(values) == pytest.approx(1) and all(w > 0 for w in values)
    assert max(values) <= max(cap, 1 / len(counts)) * (1 + 1e-9)
    if max(counts) / sum(counts) <= cap:
        assert values == pytest.approx([n / sum(counts) for n in counts])
    order = sorted(range(len(counts)), key=lambda i: counts[i])
    assert all(values[a] <= values[b] * (1 + 1e-9) for a, b in zip(order, order[1:], strict=False))


@pytest.mark.parametrize("cap, wanted", [(1.0, [0.05, 0.05, 0.9]), (0.4, [0.3, 0.3, 0.4])])
def test_weights_that_a_method_computes_are_capped_too(cap, wanted):
    """A client with a large update gets no more of HetLoRA's sum than the cap."""
    adapters = []
    for size in (1.0, 1.0, 18.0):
        factors = LowRank(size * torch.ones(3, 1), torch.ones(1, 4))
        adapters.append(Adapter(modules={"q": factors}, scalings={"q": 2.0}))
    context = RoundContext(ranks={"q": 1}, scalings={"q": 2.0}, max_weight=cap)
    result = aggregate_updates(adapters, [1.0, 1.0, 1.0], HetLoRA(), context)
    torch.testing.assert_close(result.weights, torch.tensor(wanted, dtype=torch.float64))
    (mean,) = {float(x) for x in result.adapter.modules["q"].B.flatten()}
    assert mean == pytest.approx(wanted[0] + wanted[1] + 18 * wanted[2])
