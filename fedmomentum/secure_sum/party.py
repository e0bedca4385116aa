"""`SumParty`: one party's role in one attempt at a sum.

It answers five messages, in this order. All secrets are fresh and only kept in memory: a party that
restarts has dropped out of the sum. ::

    plan             its public keys, signed
    advertisements   shares of its two secrets, sealed for each other party
    inbox            its values under its masks
    survivors        a signature under the list
    endorsements     for each survivor a share of the seed, for each other one a share of the key
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from fedmomentum.errors import ConfigError, SecureSumError
from fedmomentum.secure_sum import fixed_point
from fedmomentum.secure_sum.journal import PartyJournal
from fedmomentum.secure_sum.keys import (
    SumKeys,
    add_mask,
    check_public_key,
    pair_sign,
    public_key,
    seal,
    unseal,
)
from fedmomentum.secure_sum.messages import (
    Advertisements,
    Endorsement,
    Endorsements,
    Inbox,
    MaskedValues,
    OpenedShare,
    Opening,
    Outbox,
    PartyKeys,
    SealedShares,
    ServerMessage,
    ShareHashes,
    SumPlan,
    Survivors,
    check_parties,
    check_plan,
    decode_message,
    encode_message,
)
from fedmomentum.secure_sum.roster import Roster, sign
from fedmomentum.secure_sum.shamir import random_secret, split_secret
from fedmomentum.secure_sum.statements import (
    KEYS,
    SURVIVORS,
    keys_digest,
    keys_statement,
    sealing_context,
    share_hash,
    survivors_statement,
)
from fedmomentum.utils.schema import Schema
from fedmomentum.utils.text import printable


@dataclass(frozen=True)
class Identity:
    """A party's identity, and whom it accepts as other parties.

    Attributes:
        name: Its name.
        key: Its node's private key, on the curve P-384.
        roster: All parties' public keys, including its own, as exchanged among the parties.
        trusts_server: Whether it trusts the server to follow the rules; see `min_threshold`.
        least_threshold: An additional lower limit on the threshold, however few parties the server
            names: differences of sums over varying small sets would reveal individual values.

    Raises:
        ConfigError: If the roster has a different key for it, or none.
    """

    name: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    roster: Roster = field(repr=False)
    trusts_server: bool = False
    least_threshold: int = 0

    def __post_init__(self) -> None:
        """Check the roster against the private key."""
        if self.roster.keys.get(self.name) != self.key.public_key():
            raise ConfigError(
                f"the roster does not have {self.name} with this party's own key; the other "
                "parties would refuse it"
            )


@dataclass
class _Secrets:
    """The secrets that a party draws for one attempt only.

    Attributes:
        mask_key: The private key of its pairwise masks; shares of it are given out.
        seed: The seed of its own mask; shares of it are given out.
        channel_key: The private key for the shares sealed for it.
        shares: Party (including itself) -> its shares of that party's key and seed.
    """

    mask_key: bytes = field(default_factory=random_secret, repr=False)
    seed: bytes = field(default_factory=random_secret, repr=False)
    channel_key: bytes = field(default_factory=random_secret, repr=False)
    shares: dict[str, list[bytes]] = field(default_factory=dict, repr=False)


class SumParty:
    """One party's role in one attempt at a sum.

    Args:
        identity: The party's identity.
        journal: Where it records what it opens.
        values: Block -> the party's elements, `(size,)`.
    """

    def __init__(
        self,
        identity: Identity,
        journal: PartyJournal,
        values: Mapping[str, NDArray[np.float64]],
    ) -> None:
        self._identity = identity
        self._journal = journal
        self._values = values
        self._secrets = _Secrets()
        self._keys: SumKeys
        self._encoded: NDArray[np.uint32]
        self._advertised: dict[str, PartyKeys] = {}
        self._all_keys = b""
        self._survivors: list[str] = []
        # The last message and its reply, since a repeated message gets the same reply.
        self._answered = b""
        self._reply = b""
        self._steps: list[tuple[type[Schema], Callable[[Any], Schema]]] = [
            (SumPlan, self._advertise),
            (Advertisements, self._share),
            (Inbox, self._mask),
            (Survivors, self._endorse),
            (Endorsements, self._open),
        ]
        self._next = 0

    def answer(self, data: bytes) -> bytes:
        """Answer the server's next message; a repeated message gets the same reply.

        Raises:
            SecureSumError: If the message breaks a rule or is out of order; the party then still
                waits for the right one.
            DataError: If this party's own values cannot be summed.
        """
        message = self._decoded(data)
        digest = hashlib.sha256(data).digest()
        if digest == self._answered:
            return self._reply
        if self._next == len(self._steps):
            raise SecureSumError(f"{self._title}: this party has opened its shares, and is done")
        wanted, step = self._steps[self._next]
        if not isinstance(message, wanted):
            raise SecureSumError(
                f"{self._title}: the server sent {_tag(type(message))}; expected {_tag(wanted)}"
            )
        reply = encode_message(step(message))
        self._answered = digest
        self._reply = reply
        self._next += 1
        return reply

    @staticmethod
    def _decoded(data: bytes) -> ServerMessage:
        return decode_message(data, ServerMessage, "the server")  # type: ignore[arg-type]

    @property
    def _title(self) -> str:
        return self._keys.plan.title if self._next else "a secure sum"

    # ── 1: keys ──

    def _advertise(self, plan: SumPlan) -> PartyKeys:
        """Check the plan and the party's own values, and advertise fresh keys."""
        identity = self._identity
        # There must be enough parties, all of them known, including this one.
        check_plan(plan, trusts_server=identity.trusts_server)
        if plan.threshold < identity.least_threshold:
            raise SecureSumError(
                f"{plan.title}: its threshold is {plan.threshold} of {len(plan.parties)} parties; "
                f"this party takes part in sums that {identity.least_threshold} open. If so many "
                "are no longer there, set privacy.threshold here and on the server"
            )
        if identity.name not in plan.parties:
            raise SecureSumError(f"{plan.title}: this party, {identity.name}, is not in it")
        for party in plan.parties:
            if party not in identity.roster.keys:
                raise SecureSumError(
                    f"{plan.title}: {printable(party, 80)} is not in this party's roster"
                )
        # Problems with the values must show before anything is sent.
        encoded = fixed_point.encode(self._values, plan.blocks, len(plan.parties))
        self._journal.begin(plan)
        self._encoded = encoded
        self._values = {}
        self._keys = SumKeys.of(plan)

        # Sign the public keys together with the plan's hash.
        secrets = self._secrets
        unsigned = PartyKeys(
            party=identity.name,
            mask_key=public_key(secrets.mask_key),
            channel_key=public_key(secrets.channel_key),
            seed_commitment=self._keys.seed_commitment(secrets.seed, identity.name),
            signature=b"",
        )
        signature = sign(identity.key, KEYS, *keys_statement(self._keys.digest, unsigned))
        return msgspec.structs.replace(unsigned, signature=signature)

    # ── 2: shares ──

    def _share(self, message: Advertisements) -> Outbox:
        """Verify the other parties, and seal a share of both secrets for each."""
        identity = self._identity
        plan = self._keys.plan
        # Keys are only valid if signed by the party's node; the server cannot vouch for them.
        parties = [keys.party for keys in message.keys]
        self._check_subset(parties, plan.parties, "the parties with keys")
        seen: set[bytes] = set()
        for keys in message.keys:
            statement = keys_statement(self._keys.digest, keys)
            identity.roster.verify(keys.party, keys.signature, KEYS, *statement)
            for key in (keys.mask_key, keys.channel_key):
                check_public_key(keys.party, key)
                seen.add(key)
        if len(seen) < 2 * len(message.keys):
            raise SecureSumError(f"{plan.title}: one key was advertised twice")

        # The share of the k-th party in the list is the polynomial's value at k.
        secrets = self._secrets
        key_shares = split_secret(secrets.mask_key, plan.threshold, len(parties))
        seed_shares = split_secret(secrets.seed, plan.threshold, len(parties))
        self._advertised = {keys.party: keys for keys in message.keys}
        self._all_keys = keys_digest(message.keys)
        sealed = []
        hashes = []
        for party, *shares in zip(parties, key_shares, seed_shares, strict=True):
            hashes.append(self._hashes(party, shares, giver=identity.name, holder=party))
            if party == identity.name:
                secrets.shares[party] = shares
                continue
            data = seal(
                self._channel_key(party, sender=identity.name),
                shares,
                sealing_context(self._keys.digest, self._all_keys, identity.name, party),
            )
            sealed.append(SealedShares(party=party, data=data))
        return Outbox(shares=sealed, hashes=hashes)

    def _hashes(self, party: str, shares: Sequence[bytes], giver: str, holder: str) -> ShareHashes:
        """Return the hashes of the shares from `giver` to `holder`, labeled with `party`."""
        hashes = [
            share_hash(self._keys.digest, giver, holder, kind, share)
            for kind, share in zip(("key", "seed"), shares, strict=True)
        ]
        return ShareHashes(party=party, key_share=hashes[0], seed_share=hashes[1])

    def _channel_key(self, other: str, *, sender: str) -> bytes:
        """Return the key with which `sender` seals shares for this party or the other."""
        peer = self._advertised[other].channel_key
        secret = self._secrets.channel_key
        return self._keys.channel_key(secret, self._identity.name, other, peer, sender)

    # ── 3: masked values ──

    def _mask(self, message: Inbox) -> MaskedValues:
        """Unseal the shares for this party, and mask its values."""
        name = self._identity.name
        senders = [sealed.party for sealed in message.shares]
        masked = sorted([*senders, name])
        self._check_subset(masked, list(self._advertised), "the parties with shares")
        # Unseal all shares before touching the values, so that an error changes nothing.
        opened = {}
        for sealed, hashes in zip_longest(message.shares, message.hashes):
            if sealed is None or hashes is None:
                raise SecureSumError(f"{self._title}: not as many hashes as shares")
            context = sealing_context(self._keys.digest, self._all_keys, sealed.party, name)
            key = self._channel_key(sealed.party, sender=sealed.party)
            shares = unseal(key, sealed.data, context, sealed.party)
            if self._hashes(sealed.party, shares, giver=sealed.party, holder=name) != hashes:
                raise SecureSumError(
                    f"{self._title}: the shares that {sealed.party} sealed for this party are not "
                    "those that it gave the hashes of"
                )
            opened[sealed.party] = shares
        self._secrets.shares |= opened

        # Add its own mask, then one for each other party, which cancel in pairs in the sum.
        values = self._encoded
        add_mask(values, self._keys.self_mask_key(self._secrets.seed, name), 1)
        for other in senders:
            peer = self._advertised[other].mask_key
            key = self._keys.mask_key(self._secrets.mask_key, name, other, peer)
            add_mask(values, key, pair_sign(name, other))
        del self._encoded
        return MaskedValues(values=values.astype("<u4", copy=False).tobytes())

    # ── 4 and 5: one list of survivors, then shares ──

    def _endorse(self, message: Survivors) -> Endorsement:
        """Sign the list of survivors, and no other list in this attempt."""
        self._check_subset(message.parties, sorted(self._secrets.shares), "the survivors")
        self._survivors = message.parties
        signature = sign(self._identity.key, SURVIVORS, *self._statement())
        return Endorsement(party=self._identity.name, signature=signature)

    def _statement(self) -> tuple[bytes, ...]:
        masked = sorted(self._secrets.shares)
        return survivors_statement(self._keys.digest, self._all_keys, masked, self._survivors)

    def _open(self, message: Endorsements) -> Opening:
        """Open one share for each party, once enough parties have signed the same list."""
        plan = self._keys.plan
        # The signatures must be of this exact list, by parties on it.
        signers = [endorsement.party for endorsement in message.signatures]
        check_parties(signers, "the signers", plan.title)
        statement = self._statement()
        for endorsement in message.signatures:
            if endorsement.party not in self._survivors:
                raise SecureSumError(
                    f"{plan.title}: {printable(endorsement.party, 80)} signed the list of "
                    "survivors, and is not on it"
                )
            roster = self._identity.roster
            roster.verify(endorsement.party, endorsement.signature, SURVIVORS, *statement)
        if len(signers) < plan.threshold:
            raise SecureSumError(
                f"{plan.title}: {len(signers)} parties signed the list of survivors; shares are "
                f"opened for {plan.threshold} or more"
            )

        # Record this on disk before a share is sent. Open each party's key or seed, never both.
        self._journal.open(plan)
        shares = []
        for party, (key_share, seed_share) in sorted(self._secrets.shares.items()):
            share = seed_share if party in self._survivors else key_share
            shares.append(OpenedShare(party=party, share=share))
        del self._secrets
        return Opening(shares=shares)

    def _check_subset(self, parties: Sequence[str], allowed: Sequence[str], what: str) -> None:
        """Check a step's list of parties: sorted, known, enough, and including this party.

        Raises:
            SecureSumError: If the list is invalid.
        """
        plan = self._keys.plan
        check_parties(parties, what, plan.title)
        unknown = set(parties) - set(allowed)
        if unknown:
            raise SecureSumError(
                f"{plan.title}: {what} hold {printable(sorted(unknown)[0], 80)}, who was not in "
                "the step before"
            )
        if self._identity.name not in parties:
            raise SecureSumError(f"{plan.title}: {what} do not hold this party")
        if len(parties) < plan.threshold:
            raise SecureSumError(
                f"{plan.title}: {what} are {len(parties)}; wanted {plan.threshold} or more"
            )


def _tag(kind: type[Schema]) -> str:
    return str(kind.__struct_config__.tag)
