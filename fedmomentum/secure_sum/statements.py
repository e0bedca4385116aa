"""What parties sign and hash in a sum: the exact bytes, computed by both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedmomentum.secure_sum.keys import PROTOCOL, joined
from fedmomentum.secure_sum.messages import PartyKeys

KEYS = "keys"
"""The purpose of a party's signature of its own keys."""
SURVIVORS = "list of survivors"
"""The purpose of a signature of the list of parties whose masked values arrived."""


def keys_statement(plan_digest: bytes, keys: PartyKeys) -> tuple[bytes | str, ...]:
    """Return what a party signs to advertise its keys."""
    return plan_digest, keys.party, keys.mask_key, keys.channel_key, keys.seed_commitment


def keys_digest(keys: Sequence[PartyKeys]) -> bytes:
    """Return a hash of all parties' keys."""
    parts: list[bytes | str] = []
    for entry in keys:
        parts += [entry.party, entry.mask_key, entry.channel_key, entry.seed_commitment]
    return hashlib.sha256(joined(*parts)).digest()


def survivors_statement(
    plan_digest: bytes, all_keys: bytes, masked: Sequence[str], survivors: Sequence[str]
) -> tuple[bytes, ...]:
    """Return what a party signs before anything is opened.

    Args:
        plan_digest: The plan's hash.
        all_keys: The hash of all parties' keys.
        masked: The parties whose masks were used.
        survivors: Those whose values are in the sum.
    """
    return plan_digest, all_keys, joined(*masked), joined(*survivors)


def share_hash(plan_digest: bytes, giver: str, holder: str, kind: str, share: bytes) -> bytes:
    """Return the hash of a share, which does not reveal it, since shares are random.

    Args:
        plan_digest: The plan's hash.
        giver: The party whose secret it is a share of.
        holder: The party that holds it.
        kind: `key` or `seed`.
        share: The share.
    """
    return hashlib.sha256(joined(PROTOCOL, plan_digest, giver, holder, kind, share)).digest()


def sealing_context(plan_digest: bytes, all_keys: bytes, sender: str, recipient: str) -> bytes:
    """Return the context to which sealed shares are bound."""
    return joined(plan_digest, all_keys, sender, recipient)
