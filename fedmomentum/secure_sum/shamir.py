"""Shamir's secret sharing over the field of 2^255 - 19 elements.

Secrets are numbers below the prime, as 32 little-endian bytes. A random secret can be used directly
as an X25519 private key.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

PRIME = 2**255 - 19
SECRET_BYTES = 32


def random_secret() -> bytes:
    """Return a new secret from the operating system's entropy."""
    return secrets.randbelow(PRIME).to_bytes(SECRET_BYTES, "little")


def split_secret(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Split a secret into shares: any `threshold` of them recover it, fewer reveal nothing.

    Args:
        secret: The secret.
        threshold: The number of shares that recover it.
        num_shares: The number of shares, at the points 1, 2, ...

    Raises:
        ValueError: If the threshold is not in 1..num_shares, or the secret is not a field element.
    """
    if not 1 <= threshold <= num_shares:
        raise ValueError(f"threshold must be in 1..{num_shares}; got {threshold}")
    # The secret is the polynomial's constant term; the others are fresh for every secret.
    coefficients = [_element(secret)]
    for _ in range(threshold - 1):
        coefficients.append(_element(random_secret()))
    shares = []
    for point in range(1, num_shares + 1):
        # Horner's rule.
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SECRET_BYTES, "little"))
    return shares


def join_shares(shares: Mapping[int, bytes]) -> bytes:
    """Recover a secret from as many shares as its threshold; wrong shares give a wrong secret.

    Args:
        shares: The point of each share (counted from 1) -> the share.

    Raises:
        ValueError: If a share is not a field element.
    """
    secret = 0
    for share, coefficient in zip(shares.values(), _lagrange(tuple(shares)), strict=True):
        secret += _element(share) * coefficient
    return (secret % PRIME).to_bytes(SECRET_BYTES, "little")


@lru_cache(maxsize=16)
def _lagrange(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return each point's coefficient for interpolation at 0, which many secrets share."""
    coefficients = []
    for point in points:
        numerator = 1
        denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        coefficients.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return tuple(coefficients)


def _element(data: bytes) -> int:
    """Convert bytes to a field element.

    Raises:
        ValueError: If they are not one.
    """
    value = int.from_bytes(data, "little")
    if len(data) != SECRET_BYTES or value >= PRIME:
        raise ValueError("a share or secret is no element of the field")
    return value
