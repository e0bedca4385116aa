import hashlib
import hmac
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB

from fedmomentum.errors import SecureSumError
from fedmomentum.secure_sum import keys as module
from fedmomentum.secure_sum.keys import SumKeys, add_mask, joined, public_key, seal, unseal
from fedmomentum.secure_sum.shamir import random_secret
from tests.secure_sum.sums import make_plan

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
FIRST, SECOND = bytes(range(32)), bytes(range(32, 64))


def mask_of(key, size):
    values = np.zeros(size, dtype=np.uint32)
    add_mask(values, key, 1)
    return values


def test_both_parties_derive_the_same_key():
    keys = SumKeys.of(make_plan())
    a, b = random_secret(), random_secret()
    assert keys.mask_key(a, "x", "y", public_key(b)) == keys.mask_key(b, "y", "x", public_key(a))
    for sender in "xy":
        assert keys.channel_key(a, "x", "y", public_key(b), sender) == keys.channel_key(
            b, "y", "x", public_key(a), sender
        )


def test_every_purpose_and_every_context_has_its_own_key():
    """Run, round, sum, attempt, parties, direction, and all else that the plan says."""
    a, b = random_secret(), random_secret()
    seen = set()
    plans = [
        make_plan(),
        make_plan(run_id="another"),
        make_plan(server_round=4),
        make_plan(number=2),
        make_plan(attempt=2),
        make_plan(threshold=4),
        make_plan(work="1" * 64),
        make_plan(n=5),
        make_plan(blocks=make_plan().blocks[:1]),
    ]
    for plan in plans:
        keys = SumKeys.of(plan)
        peer = public_key(b)
        seen |= {
            keys.mask_key(a, "x", "y", peer),
            keys.mask_key(a, "x", "z", peer),
            keys.channel_key(a, "x", "y", peer, "x"),
            keys.channel_key(a, "x", "y", peer, "y"),
            keys.self_mask_key(a, "x"),
            keys.self_mask_key(a, "y"),
            keys.seed_commitment(a, "x"),
        }
    assert len(seen) == 7 * len(plans)


def test_the_context_affects_keys_beyond_the_plans_hash():
    """Derived by hand: HKDF-SHA256 with the hash as salt and an explicit context."""
    plan = make_plan()
    secret = random_secret()
    info = joined(b"fedmomentum secure sum 2", "own mask", "run", 3, 1, 1, "x")
    extracted = hmac.new(plan.digest(), secret, hashlib.sha256).digest()
    expanded = hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()
    assert SumKeys.of(plan).self_mask_key(secret, "x") == expanded


def test_the_mask_is_the_key_stream_of_aes_in_counter_mode():
    key = bytes(range(32))
    counters = b"".join(i.to_bytes(16, "big") for i in range(3))
    stream = Cipher(AES256(key), ECB()).encryptor().update(counters)  # noqa: S305
    assert mask_of(key, 11).tolist() == np.frombuffer(stream, "<u4")[:11].tolist()


@pytest.mark.parametrize("size", [1, 4, 7, 8, 9, 23])
def test_the_mask_does_not_depend_on_the_chunk_size(monkeypatch, size):
    mask = mask_of(b"k" * 32, size)
    monkeypatch.setattr(module, "CHUNK_VALUES", 4)
    assert (mask_of(b"k" * 32, size) == mask).all()
    add_mask(mask, b"k" * 32, -1)
    assert not mask.any()


def test_keys_of_low_order_are_refused():
    keys = SumKeys.of(make_plan())
    with pytest.raises(SecureSumError, match="key of mallory is of low order"):
        keys.mask_key(random_secret(), "x", "mallory", bytes(32))


def test_sealed_shares_open_for_their_context_only():
    data = seal(b"k" * 32, [b"a" * 32, b"b" * 32], b"context")
    assert len(data) == 80
    assert unseal(b"k" * 32, data, b"context", "x") == [b"a" * 32, b"b" * 32]
    altered = data[:-1] + bytes([data[-1] ^ 1])
    for attempt in (
        (b"k" * 32, data, b"another"),
        (b"l" * 32, data, b"context"),
        (b"k" * 32, altered, b"context"),
    ):
        with pytest.raises(SecureSumError, match="what x sealed for this party was altered"):
            unseal(*attempt, "x")


def test_different_parts_are_joined_to_different_bytes():
    assert len({joined("ab", "c"), joined("a", "bc"), joined("abc"), joined("ab", "c", "")}) == 4


def vectors():
    """Everything that is derived from fixed secrets; written to vectors.json once."""
    plan = make_plan()
    keys = SumKeys.of(plan)
    mask = keys.mask_key(FIRST, "north", "south", public_key(SECOND))
    channel = keys.channel_key(FIRST, "north", "south", public_key(SECOND), "north")
    own = keys.self_mask_key(FIRST, "north")
    return {
        "plan": msgspec.to_builtins(plan),
        "plan_digest": plan.digest().hex(),
        "public_keys": [public_key(FIRST).hex(), public_key(SECOND).hex()],
        "mask_key": mask.hex(),
        "mask": mask_of(mask, 6).tolist(),
        "channel_key": channel.hex(),
        "own_mask_key": own.hex(),
        "own_mask": mask_of(own, 6).tolist(),
        "commitment": keys.seed_commitment(FIRST, "north").hex(),
        "sealed": seal(channel, [FIRST, SECOND], b"context").hex(),
    }


def test_fixed_keys_give_the_recorded_masks():
    """Fixed keys give fixed masks, in every release of this protocol and of its libraries."""
    assert vectors() == VECTORS


def test_public_keys_are_those_of_the_standard():
    """RFC 7748, section 6.1."""
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    other = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert (
        public_key(private).hex()
        == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    )
    assert module._agree(other, "alice", public_key(private)).hex() == (
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    )
