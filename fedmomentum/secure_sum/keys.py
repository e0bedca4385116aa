"""The keys of one sum: agreed between pairs of parties, bound to their context, used once.

Each key is derived with HKDF-SHA256 for one purpose in one attempt at one sum. It is therefore used
for only one message or mask, and needs no nonce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedmomentum.errors import SecureSumError
from fedmomentum.secure_sum.messages import KEY_BYTES, SumPlan

PROTOCOL = b"fedmomentum secure sum 2"
# Values to mask at a time: 4 MB, which fit in a processor's cache.
CHUNK_VALUES = 2**20


def joined(*parts: bytes | str | int) -> bytes:
    """Join length-prefixed parts, so that different parts give different bytes."""
    result = b""
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        result += len(data).to_bytes(4, "big") + data
    return result


def public_key(private_key: bytes) -> bytes:
    """Return the public key of an X25519 private key."""
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


@dataclass(frozen=True)
class SumKeys:
    """Derives the keys of one attempt at one sum.

    Attributes:
        plan: The sum.
        digest: The plan's hash.
    """

    plan: SumPlan
    digest: bytes

    @classmethod
    def of(cls, plan: SumPlan) -> SumKeys:
        """Return the keys of a plan."""
        return cls(plan, plan.digest())

    def mask_key(self, private_key: bytes, own: str, other: str, other_key: bytes) -> bytes:
        """Return the key of the mask shared by two parties; both derive the same one.

        Args:
            private_key: One party's private key.
            own: The name of that party.
            other: The name of the other party.
            other_key: The other party's public key.

        Raises:
            SecureSumError: If the other's key has low order, since the result would be public.
        """
        keys = {own: public_key(private_key), other: other_key}
        pair = sorted(keys)
        secret = _agree(private_key, other, other_key)
        return self._derive(secret, "mask", *pair, *(keys[party] for party in pair))

    def channel_key(
        self, private_key: bytes, own: str, other: str, other_key: bytes, sender: str
    ) -> bytes:
        """Return the key under which `sender`, one of the two parties, seals shares for the other.

        Raises:
            SecureSumError: If the other's key has low order.
        """
        keys = {own: public_key(private_key), other: other_key}
        pair = sorted(keys)
        secret = _agree(private_key, other, other_key)
        return self._derive(secret, "channel", sender, *pair, *(keys[party] for party in pair))

    def self_mask_key(self, seed: bytes, party: str) -> bytes:
        """Return the key of a party's own mask."""
        return self._derive(seed, "own mask", party)

    def seed_commitment(self, seed: bytes, party: str) -> bytes:
        """Return a hash of a party's seed, which reveals nothing about the seed or its mask."""
        return self._derive(seed, "commitment", party)

    def _derive(self, secret: bytes, purpose: str, *context: bytes | str) -> bytes:
        """Derive a key for one purpose and context from a secret, by HKDF."""
        # The digest covers the whole plan; what distinguishes sums is also included explicitly.
        plan = self.plan
        info = joined(
            PROTOCOL,
            purpose,
            plan.run_id,
            plan.server_round,
            plan.number,
            plan.attempt,
            *context,
        )
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=self.digest, info=info).derive(secret)


def check_public_key(party: str, key: bytes) -> None:
    """Reject a public key for which every key agreement gives the same secret.

    Raises:
        SecureSumError: If it has low order.
    """
    _agree(PROTOCOL.ljust(KEY_BYTES), party, key)


def _agree(private_key: bytes, other: str, other_key: bytes) -> bytes:
    """Return the X25519 shared secret of a private key and another party's public key."""
    try:
        peer = X25519PublicKey.from_public_bytes(other_key)
        return X25519PrivateKey.from_private_bytes(private_key).exchange(peer)
    except ValueError as problem:
        raise SecureSumError(
            f"the key of {other} is of low order, so it keeps nothing secret"
        ) from problem


# ── masks ─────────────────────────────────────────────────────────────────────────────────────────


def add_mask(values: NDArray[np.uint32], key: bytes, sign: int) -> None:
    """Add a key's mask to values in place or subtract it, modulo 2^32.

    The mask is the key stream of AES-256 in counter mode, starting from 0, as little-endian 32-bit
    integers.

    Args:
        values: The values, `(size,)`.
        key: A key of 32 bytes, used only for this mask.
        sign: 1 or -1.
    """
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    zeros = bytes(4 * CHUNK_VALUES)
    operation = np.add if sign > 0 else np.subtract
    for start in range(0, len(values), CHUNK_VALUES):
        chunk = values[start : start + CHUNK_VALUES]
        # if the number of elements is not a multiple of 4, the last cipher block is partly used
        mask = np.frombuffer(stream.update(zeros[: 4 * len(chunk)]), dtype="<u4")
        operation(chunk, mask, out=chunk)


def pair_sign(own: str, other: str) -> int:
    """Return the sign with which a party adds the mask that it shares with another party."""
    return 1 if own < other else -1


# ── sealed shares ─────────────────────────────────────────────────────────────────────────────────


def seal(key: bytes, parts: Sequence[bytes], context: bytes) -> bytes:
    """Encrypt and authenticate parts of 32 bytes; each key seals only one message."""
    return AESGCM(key).encrypt(bytes(12), b"".join(parts), context)


def unseal(key: bytes, data: bytes, context: bytes, sender: str) -> list[bytes]:
    """Return the parts of a sealed message.

    Raises:
        SecureSumError: If it was sealed with a different key or context, or altered.
    """
    try:
        opened = AESGCM(key).decrypt(bytes(12), data, context)
    except InvalidTag as problem:
        raise SecureSumError(
            f"what {sender} sealed for this party was altered, or is for another sum"
        ) from problem
    return [opened[i : i + KEY_BYTES] for i in range(0, len(opened), KEY_BYTES)]
