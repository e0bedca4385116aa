"""Moments under a sum: the means of what clients have, over many orders of magnitude, within public limits."""

import dataclasses

import pytest
import torch

from fedmomentum.aggregation.moment_sums import ClientMoments, MomentLimits, MomentSums
from fedmomentum.errors import DataError
from fedmomentum.secure_sum import fixed_point

SHAPES = {"q.A": (2, 7), "q.B": (5, 2)}
LIMITS = MomentLimits(second_total=1.02, learning_rate_sum=0.6)
EXAMPLES = (3, 40, 97)


def client(number):
    """A client's changes and moments; second moments of 1e-12 to 1e-3."""
    draw = torch.Generator().manual_seed(number)
    changes = {}
    means = {}
    for key, shape in SHAPES.items():
        changes[key] = 0.01 * torch.randn(shape, generator=draw, dtype=torch.float64)
        for part, size in (("rows", shape[0]), ("columns", shape[1])):
            exponents = 9 * torch.rand(size, generator=draw, dtype=torch.float64) - 12
            means[f"{key}.{part}"] = (10**exponents).bfloat16()
    return changes, ClientMoments(means, 9, 0.09)


def summed(layout, clients):
    """The sum of the clients' values, as integers of 32 bits give it."""
    blocks = layout.blocks()
    total = 0
    for num_examples, (_, moments) in zip(EXAMPLES, clients, strict=True):
        values = layout.values(num_examples, moments)
        arrays = {name: tensor.numpy() for name, tensor in values.items()}
        total = total + fixed_point.encode(arrays, blocks, layout.num_parties)
    decoded = fixed_point.decode(total, blocks, layout.num_parties)
    return {name: torch.from_numpy(value) for name, value in decoded.items()}


@pytest.mark.parametrize("num_parties", [3, 100])
@pytest.mark.parametrize("has_second", [True, False])
def test_means_are_the_weighted_means_over_many_orders_of_magnitude(num_parties, has_second):
    layout = MomentSums(SHAPES, has_second, 9, num_parties, 100, LIMITS)
    clients = [client(number) for number in range(3)]
    N = sum(EXAMPLES)
    mean_changes = {
        key: sum(n * changes[key] for n, (changes, _) in zip(EXAMPLES, clients, strict=True)) / N
        for key in SHAPES
    }
    means = layout.means(summed(layout, clients), N, mean_changes)
    for key, movement in means.items():
        wanted = 0
        for num_examples, (changes, moments) in zip(EXAMPLES, clients, strict=True):
            wanted = wanted + num_examples / N * changes[key] / moments.learning_rate_sum
        assert torch.allclose(movement.displacement, wanted, rtol=1e-10, atol=1e-12)
        assert movement.num_steps == 9
        if not has_second:
            assert movement.rows is None and movement.columns is None
            continue
        for part in ("rows", "columns"):
            exact = 0
            for num_examples, (_, moments) in zip(EXAMPLES, clients, strict=True):
                exact = exact + num_examples / N * moments.means[f"{key}.{part}"].double()
            error = (getattr(movement, part) - exact).abs() / exact
            # The smallest is a trillionth of the limit.
            assert float(error.max()) < 1e-3
            assert float(error.median()) < 1e-7


def test_values_beyond_a_public_limit_and_trainings_without_steps_are_refused():
    layout = MomentSums(SHAPES, True, 9, 3, 100, LIMITS)
    _, moments = client(0)
    with pytest.raises(
        DataError, match="made 8 steps with learning rates of 0.09 in all; wanted 9"
    ):
        layout.values(5, dataclasses.replace(moments, num_steps=8))
    with pytest.raises(DataError, match="learning rates of this client's optimizer are beyond 0.6"):
        layout.values(5, dataclasses.replace(moments, learning_rate_sum=0.7))
    means = {**moments.means, "q.A.rows": torch.tensor([0.2, 0.0])}
    # Of a row of seven, more than all that clipped gradients leave.
    with pytest.raises(DataError, match=r"rows q.A of this client's optimizer are beyond 0.145"):
        layout.values(5, dataclasses.replace(moments, means=means))


def test_the_layout_reveals_nothing_about_a_client():
    layout = MomentSums(SHAPES, True, 9, 3, 100, LIMITS)
    names = [block.name for block in layout.blocks()]
    assert len(set(names)) == len(names)
    for number in range(3):
        values = layout.values(EXAMPLES[number], client(number)[1])
        assert sorted(values) == sorted(names)
