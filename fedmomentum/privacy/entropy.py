"""Unpredictable and unrepeatable randomness: noise and samples from the operating system.

A seeded generator would suffice for statistics but not for privacy: anyone who knows its seed can
subtract the noise. So all numbers here come from `os.urandom`, and none can be drawn again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A float64 holds 53 bits, so only the upper bits of a random 64-bit number are used.
_UNUSED_BITS = np.uint64(11)
_RESOLUTION = 2.0**-53


def uniforms(count: int) -> NDArray[np.float64]:
    """Return numbers uniformly distributed in the open interval (0, 1)."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return ((bits >> _UNUSED_BITS).astype(np.float64) + 0.5) * _RESOLUTION


def normals(shape: Sequence[int]) -> Tensor:
    """Return standard normal numbers in float64, on the CPU, by the Box-Muller method."""
    count = math.prod(shape)
    # Two uniform numbers give two normal ones.
    num_pairs = (count + 1) // 2
    radius, angle = uniforms(2 * num_pairs).reshape(2, num_pairs)
    radius = np.sqrt(-2.0 * np.log(radius))
    angle = 2.0 * np.pi * angle
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy(values[:count]).reshape(tuple(shape))


def poisson_sample(count: int, rate: float) -> list[int]:
    """Draw a random subset of `range(count)`, including each number with probability `rate`."""
    chosen = np.flatnonzero(uniforms(count) < rate)
    return [int(index) for index in chosen]


def random_seed() -> int:
    """Return a 63-bit seed for randomness other than noise, such as dropout."""
    return int.from_bytes(os.urandom(8)) >> 1
