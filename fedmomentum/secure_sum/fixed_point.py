"""Numbers as 32-bit integers that add up exactly, modulo 2^32.

A block of numbers has a public bound: no element of any party is larger. For n parties, the largest
integer that a party uses is `(2^31 - 1) // n`, so that no sum overflows. A party's element is
rounded to a multiple of `bound / largest`, so the sum of m parties is off by at most
`m / 2 * bound / largest`, which is `m n bound / 2^32`, and their mean by `n bound / 2^32`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmomentum.errors import DataError, SecureSumError
from fedmomentum.secure_sum.messages import Block

MAX_SUM = 2**31 - 1
"""The largest sum of all parties' integers."""


def largest_integer(num_parties: int) -> int:
    """Return the largest integer that one of so many parties may use."""
    return MAX_SUM // num_parties


def count_block(name: str, size: int, num_parties: int) -> Block:
    """Return a block whose elements are whole numbers up to `largest_integer`, summed exactly."""
    return Block(name=name, size=size, bound=float(largest_integer(num_parties)))


def sum_error(block: Block, num_parties: int, num_survivors: int) -> float:
    """Return how far an element of the decoded sum can be from the exact sum.

    Args:
        block: The block of the element.
        num_parties: The number of parties that the sum was planned for.
        num_survivors: The number of parties whose values are in it.
    """
    return 0.5 * num_survivors * block.bound / largest_integer(num_parties)


def rounding_variance(block: Block, num_parties: int, num_survivors: int) -> float:
    """Return the variance of an element of the decoded sum about the exact sum.

    Each of m parties rounds its element to a multiple of the step `bound / largest`. What that
    takes is uniform within half a step, either way: `m step^2 / 12`.

    Args:
        block: The block of the element.
        num_parties: The number of parties that the sum was planned for.
        num_survivors: The number of parties whose values are in it.
    """
    step = block.bound / largest_integer(num_parties)
    return num_survivors * step**2 / 12


def encode(
    values: Mapping[str, NDArray[np.float64]], blocks: Sequence[Block], num_parties: int
) -> NDArray[np.uint32]:
    """Encode a party's values as integers modulo 2^32, block after block.

    Nobody else can check them, since nobody else ever sees them. What is wrong with them concerns
    the party alone: the error is a `DataError`, whose text stays with the party.

    Args:
        values: The name of each block to its elements, `(size,)`.
        blocks: The blocks, in order.
        num_parties: The number of parties that the sum is planned for.

    Raises:
        SecureSumError: If the blocks are not those that the party has, or of another size.
        DataError: If an element is NaN, infinite or beyond its block's bound.
    """
    # The server names the blocks; they must be those that this party has.
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
        # A rounded element is at most `largest`, because the unrounded one is.
        integers = np.rint(elements * (largest_integer(num_parties) / block.bound))
        encoded[start : start + block.size] = integers.astype(np.int64).astype(np.uint32)
        start += block.size
    return encoded


def _check_values(block: Block, elements: NDArray[np.float64]) -> None:
    """Refuse what is not finite, and what is beyond the bound.

    Raises:
        DataError: If there is such an element.
    """
    # A maximum propagates NaN.
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
    """Decode the sum of encoded values: the name of each block to its elements."""
    # The sum of all integers is less than 2^31 in size, so the highest bit is its sign.
    signed = total.view(np.int32)
    values = {}
    start = 0
    for block in blocks:
        integers = signed[start : start + block.size].astype(np.float64)
        values[block.name] = integers * (block.bound / largest_integer(num_parties))
        start += block.size
    return values
