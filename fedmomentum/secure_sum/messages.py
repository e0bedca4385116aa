"""The types of the messages of a secure sum, and their encoding.

All are MessagePack, decoded directly into the types below: what does not match is rejected, with
the field named. In a sum, the length of a message depends only on the public plan and on who takes
part, never on a party's values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from fedmomentum.errors import SecureSumError
from fedmomentum.utils.io import canonical_json
from fedmomentum.utils.schema import Count, Hash, Label, PositiveCount, Schema, validation_message

STEPS = ("keys", "shares", "values", "signatures", "openings")
"""What the parties send in each step of a sum."""
MIN_PARTIES = 3
"""With two, each party could recover the other's values by subtracting its own."""
MAX_PARTIES = 100
MAX_BLOCKS = 500_000
MAX_VALUES = 2**28
"""The largest number of elements in a sum: 1 GiB on the wire."""
MAX_MESSAGE_BYTES = 2**27
"""The largest message other than masked values: a plan with many blocks."""
KEY_BYTES = 32
SIGNATURE_BYTES = 96
SEALED_BYTES = 2 * KEY_BYTES + 16
"""Two shares, and the tag that authenticates their sender."""

Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Signature = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Sealed = Annotated[bytes, Meta(min_length=SEALED_BYTES, max_length=SEALED_BYTES)]
# Bounded so that nothing overflows in float64, whatever the number of parties.
Bound = Annotated[float, Meta(ge=1e-30, le=1e30)]
Party = Label


# ── from the server ───────────────────────────────────────────────────────────────────────────────


class Block(Schema, frozen=True, kw_only=True):
    """A range of consecutive elements of the summed vector.

    Attributes:
        name: What the elements are.
        size: The number of elements.
        bound: The public bound on the magnitude of any party's elements.
    """

    name: Annotated[str, Meta(min_length=1, max_length=600)]
    size: Annotated[int, Meta(ge=1, le=MAX_VALUES)]
    bound: Bound


class SumPlan(Schema, tag_field="step", tag="plan", frozen=True, kw_only=True):
    """What is summed and by whom: the first message to every party.

    Attributes:
        run_id: The run.
        server_round: The round.
        number: Which of the round's sums it is, from 1.
        attempt: Which attempt at this sum it is, from 1.
        parties: The parties, sorted.
        threshold: The number of parties that is necessary and sufficient to open a sum.
        work: A hash of what the parties did to get their values, the same for all. A party refuses
            a sum of other work than its own.
        blocks: What is summed, in order.
    """

    run_id: Label
    server_round: Count
    number: PositiveCount
    attempt: PositiveCount
    parties: Annotated[list[Party], Meta(max_length=MAX_PARTIES)]
    threshold: Count
    work: Hash
    blocks: Annotated[list[Block], Meta(min_length=1, max_length=MAX_BLOCKS)]

    @property
    def size(self) -> int:
        """The total number of elements."""
        return sum(block.size for block in self.blocks)

    @property
    def position(self) -> tuple[int, int, int]:
        """Its place in the run: round, sum and attempt."""
        return self.server_round, self.number, self.attempt

    @property
    def title(self) -> str:
        """How error messages refer to it."""
        return f"sum {self.number} of round {self.server_round}, attempt {self.attempt}"

    def digest(self) -> bytes:
        """Return the SHA-256 of the entire plan, on which every key and signature depends."""
        text = canonical_json(msgspec.to_builtins(self))
        return hashlib.sha256(b"fedmomentum secure sum, plan\0" + text.encode()).digest()


class PartyKeys(Schema, frozen=True, kw_only=True):
    """A party's keys for one sum.

    Attributes:
        party: The party.
        mask_key: The X25519 public key from which pairwise masks are derived.
        channel_key: The X25519 public key with which shares are sealed for it.
        seed_commitment: A hash of the seed of its own mask.
        signature: The signature of its node key over the plan and the three fields above.
    """

    party: Party
    mask_key: Key
    channel_key: Key
    seed_commitment: Key
    signature: Signature


class Advertisements(Schema, tag_field="step", tag="advertisements", frozen=True, kw_only=True):
    """The keys of all parties that answered the plan, sorted by party."""

    keys: Annotated[list[PartyKeys], Meta(max_length=MAX_PARTIES)]


class SealedShares(Schema, frozen=True, kw_only=True):
    """Shares of two secrets, sealed.

    Attributes:
        party: The other party: the one to open them, or the one that sealed them.
        data: The shares of its key and of its seed, encrypted and authenticated.
    """

    party: Party
    data: Sealed


class ShareHashes(Schema, frozen=True, kw_only=True):
    """Hashes of two shares, which reveal nothing but verify that the right share is opened.

    Attributes:
        party: The other party: the holder of the shares, or the one that gave them out.
        key_share: The hash of the share of the key.
        seed_share: The hash of the share of the seed.
    """

    party: Party
    key_share: Key
    seed_share: Key


class Inbox(Schema, tag_field="step", tag="inbox", frozen=True, kw_only=True):
    """The shares that others sealed for one party and their hashes, both sorted by sender."""

    shares: Annotated[list[SealedShares], Meta(max_length=MAX_PARTIES)]
    hashes: Annotated[list[ShareHashes], Meta(max_length=MAX_PARTIES)]


class Survivors(Schema, tag_field="step", tag="survivors", frozen=True, kw_only=True):
    """The parties whose masked values arrived, sorted."""

    parties: Annotated[list[Party], Meta(max_length=MAX_PARTIES)]


class Endorsement(Schema, frozen=True, kw_only=True):
    """A party's signature of a list of survivors."""

    party: Party
    signature: Signature


class Endorsements(Schema, tag_field="step", tag="endorsements", frozen=True, kw_only=True):
    """The signatures of the list of survivors, sorted by party."""

    signatures: Annotated[list[Endorsement], Meta(max_length=MAX_PARTIES)]


ServerMessage = SumPlan | Advertisements | Inbox | Survivors | Endorsements


def min_threshold(num_parties: int, *, trusts_server: bool = False) -> int:
    """Return the lowest threshold that keeps individual values secret.

    Two lists of survivors, each signed by a threshold of parties, would open both secrets of a
    party. With more than two thirds, this requires a third of the parties, in addition to the
    server, to break the rules. If the server follows the rules, more than one half suffices.

    Args:
        num_parties: The number of parties.
        trusts_server: Whether the server is trusted to follow the rules, so that only parties may
            break them.
    """
    if trusts_server:
        return max(num_parties // 2 + 1, MIN_PARTIES)
    return max(2 * num_parties // 3 + 1, MIN_PARTIES)


def check_plan(plan: SumPlan, *, trusts_server: bool) -> None:
    """Check the constraints that the types do not express.

    Args:
        plan: The plan.
        trusts_server: See `min_threshold`.

    Raises:
        SecureSumError: If there are too few or too many parties, they are not sorted, the
            threshold is too low or unreachable, or blocks have duplicate names or too many
            elements.
    """
    num_parties = len(plan.parties)
    if num_parties < MIN_PARTIES:
        raise SecureSumError(
            f"{plan.title}: {num_parties} parties; a secure sum needs at least {MIN_PARTIES}, or "
            "each could compute the values of another"
        )
    if num_parties > MAX_PARTIES:
        raise SecureSumError(
            f"{plan.title}: {num_parties} parties; each masks for every other, up to {MAX_PARTIES}"
        )
    check_parties(plan.parties, "its parties", plan.title)
    least = min_threshold(num_parties, trusts_server=trusts_server)
    if not least <= plan.threshold <= num_parties:
        raise SecureSumError(
            f"{plan.title}: threshold {plan.threshold} of {num_parties} parties; wanted "
            f"{least} to {num_parties}"
        )
    if len({block.name for block in plan.blocks}) < len(plan.blocks):
        raise SecureSumError(f"{plan.title}: two blocks have one name")
    if plan.size > MAX_VALUES:
        raise SecureSumError(
            f"{plan.title}: {plan.size} elements; at most {MAX_VALUES} fit in one sum"
        )


def check_parties(parties: Sequence[str], what: str, name: str) -> None:
    """Reject a list of parties that is unsorted or has duplicates.

    Raises:
        SecureSumError: If it is.
    """
    if any(left >= right for left, right in pairwise(parties)):
        raise SecureSumError(f"{name}: {what} are not sorted, or one is named twice")


# ── from a party ──────────────────────────────────────────────────────────────────────────────────


class Outbox(Schema, frozen=True, kw_only=True):
    """The shares that a party gives out.

    Attributes:
        shares: The sealed shares for each other party, sorted by recipient.
        hashes: The hashes of all shares, including its own, sorted by holder.
    """

    shares: Annotated[list[SealedShares], Meta(max_length=MAX_PARTIES)]
    hashes: Annotated[list[ShareHashes], Meta(max_length=MAX_PARTIES)]


class MaskedValues(Schema, frozen=True, kw_only=True):
    """A party's masked values, as little-endian unsigned 32-bit integers."""

    values: Annotated[bytes, Meta(max_length=4 * MAX_VALUES)]


class OpenedShare(Schema, frozen=True, kw_only=True):
    """A party's share of a survivor's seed, or of the key of a party that dropped out."""

    party: Party
    share: Key


class Opening(Schema, frozen=True, kw_only=True):
    """One share for every party that sealed shares, sorted by party."""

    shares: Annotated[list[OpenedShare], Meta(max_length=MAX_PARTIES)]


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────

M = TypeVar("M")


def encode_message(message: Schema) -> bytes:
    """Encode a message."""
    return msgspec.msgpack.encode(message)


def decode_message(data: bytes, kind: type[M], name: str, max_bytes: int = MAX_MESSAGE_BYTES) -> M:
    """Decode a message into its type.

    Args:
        data: The received bytes.
        kind: The type; in a union of the server's messages, the step selects the type.
        name: The sender, for error messages.
        max_bytes: The maximum size of a valid message.

    Raises:
        SecureSumError: If the bytes are too many or not such a message.
    """
    if len(data) > max_bytes:
        raise SecureSumError(
            f"{name}: a message has {len(data)} bytes; at most {max_bytes} were expected"
        )
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.ValidationError as problem:
        raise SecureSumError(f"{name}: {validation_message(problem)}") from problem
    except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError) as problem:
        raise SecureSumError(f"{name}: not a valid message: {problem}") from problem
