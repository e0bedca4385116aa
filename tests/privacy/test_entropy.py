"""Noise and samples have the right distribution, and no seed repeats them."""

import math

import numpy as np
import torch

from fedmomentum.privacy.entropy import normals, poisson_sample, random_seed


def test_normals_are_normal_in_float64():
    values = normals((301, 333))
    assert values.dtype == torch.float64 and values.shape == (301, 333)
    count = values.numel()
    for moment, wanted, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        spread = math.sqrt(variance / count)
        assert abs(values.pow(moment).mean().item() - wanted) < 6 * spread
    # As many beyond two as there should be.
    assert abs((values.abs() > 2).double().mean().item() - 0.0455) < 6 * math.sqrt(0.0455 / count)
    assert normals((0,)).shape == (0,) and normals((3,)).shape == (3,) and normals(()).ndim == 0


def test_no_seed_repeats_them():
    for draw in (lambda: normals((8,)).tolist(), lambda: poisson_sample(64, 0.5), random_seed):
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            np.random.seed(0)
            results.append(draw())
        assert results[0] != results[1]


def test_poisson_sample_takes_each_with_its_probability():
    sizes = [len(poisson_sample(50, 0.3)) for _ in range(2000)]
    assert abs(np.mean(sizes) - 15) < 6 * math.sqrt(10.5 / 2000)
    assert abs(np.var(sizes) - 10.5) < 2.0  # the size of a batch is random too
    assert poisson_sample(5, 1.0) == [0, 1, 2, 3, 4] and poisson_sample(0, 0.5) == []
