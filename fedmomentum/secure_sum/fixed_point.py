"""Encodes numbers as 32-bit integers that add up exactly, modulo 2^32.

Each block of numbers has a public bound on the magnitude of any party's elements. For n parties,
the largest integer that a party uses is `(2^31 - 1) // n`, so that no sum overflows. Each element
is rounded to a multiple of `bound / largest`, so the error of a sum of m parties is at most
`m / 2 * bound / largest`, which is `m n bound / 2^32`, and that of their mean `n bound / 2^32`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmomentum.errors import DataError, SecureSumError
from fedmomentum.secure_sum.messages import Block

MAX_SUM = 2**31 - 1
"""The largest possible sum of all parties' integers."""


def largest_integer(num_parties: int) -> int:
    """Return the largest integer that each of `num_parties` parties may use."""
    return MAX_SUM // num_parties


def count_block(name: str, size: int, num_parties: int) -> Block:
    """Return a block for integers up to `largest_integer`, which are summed exactly."""
    return Block(name=name, size=size, bound=float(largest_integer(num_parties)))


def rounding_variance(block: Block, num_parties: int, num_survivors: int) -> float:
    """Return the variance of the rounding error of an element of the decoded sum.

    Each of m parties rounds its element to a multiple of the step `bound / largest`. Each error is
    uniform within half a step in either direction, for a total of `m step^2 / 12`.

    Args:
        block: The block that contains the element.
        num_parties: The number of parties that the sum was planned for.
        num_survivors: The number of parties whose values are included.
    """
    step = block.bound / largest_integer(num_parties)
    return num_survivors * step**2 / 12


def encode(
    values: Mapping[str, NDArray[np.float64]], blocks: Sequence[Block], num_parties: int
) -> NDArray[np.uint32]:
    """Encode a party's values as integers modulo 2^32, block by block.

    Nobody else can check the values, since nobody else ever sees them. Problems with them are
    private to the party: the error is a `DataError`, whose text stays with the party.

    Args:
        values: Name of each block -> its elements, `(size,)`.
        blocks: The blocks, in order.
        num_parties: The number of parties that the sum is planned for.

    Raises:
        SecureSumError: If the blocks differ from those of the party, or in size.
        DataError: If an element is NaN, infinite or beyond its block's bound.
    """
    # The blocks are given by the server and must match those of this party.
    names = [block.name for block in blocks]
    if sorted(names) != sorted(values):
        unknown = sorted(set(names) ^ set(values))[:3]
        raise SecureSumError(
            f"the sum's blocks are not those of this party's update: {', '.join(unknown)}"
        )
    encoded = np.empty(sum(block.size for block in blocks), dtype=np.uint32)
    start = 0
    for block in blocks:
        elements = np.asarray(values[block.name], dtype=np.float64)
        if elements.shape != (block.size,):
            raise SecureSumError(
                f"block {block.name!r} has {block.size} elements in the sum, and this party has "
                f"{elements.shape}"
            )
        _check_values(block, elements)
        # Rounded elements are at most `largest`, because unrounded ones are.
        integers = np.rint(elements * (largest_integer(num_parties) / block.bound))
        encoded[start : start + block.size] = integers.astype(np.int64).astype(np.uint32)
        start += block.size
    return encoded


def _check_values(block: Block, elements: NDArray[np.float64]) -> None:
    """Reject elements that are not finite or are beyond the bound.

    Raises:
        DataError: If there is such an element.
    """
    # max propagates NaN.
    largest = float(np.abs(elements).max(initial=0.0))
    if not np.isfinite(largest):
        raise DataError(
            f"block {block.name!r} of this party's update holds NaN or Inf; it takes no part in "
            "the sum"
        )
    if largest > block.bound:
        raise DataError(
            f"block {block.name!r} of this party's update has an element of size {largest:.6g}, "
            f"and the sum's bound is {block.bound:.6g}; it takes no part in the sum. Have the "
            "bound raised, or train with a smaller learning rate"
        )


def decode(
    total: NDArray[np.uint32], blocks: Sequence[Block], num_parties: int
) -> dict[str, NDArray[np.float64]]:
    """Decode the sum of encoded values into the elements of each block, by name."""
    # The sum's magnitude is less than 2^31, so the highest bit is its sign.
    signed = total.view(np.int32)
    values = {}
    start = 0
    for block in blocks:
        integers = signed[start : start + block.size].astype(np.float64)
        values[block.name] = integers * (block.bound / largest_integer(num_parties))
        start += block.size
    return values
