"""`SumServer`: the server's role in one attempt at a sum.

It has no secrets and draws no random numbers: the same replies in the same order give the same
messages and the same sum, so a server that was stopped can continue from its stored replies. ::

    server = SumServer(plan, roster)
    while not server.finished:
        for party, message in server.messages().items():
            server.receive(party, send(party, message))
        server.advance()
    server.result
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedmomentum.errors import SecureSumError
from fedmomentum.secure_sum import fixed_point
from fedmomentum.secure_sum.keys import SumKeys, add_mask, check_public_key, pair_sign, public_key
from fedmomentum.secure_sum.messages import (
    STEPS,
    Advertisements,
    Endorsement,
    Endorsements,
    Inbox,
    MaskedValues,
    Opening,
    Outbox,
    PartyKeys,
    SealedShares,
    ShareHashes,
    SumPlan,
    Survivors,
    check_plan,
    decode_message,
    encode_message,
)
from fedmomentum.secure_sum.roster import Roster
from fedmomentum.secure_sum.shamir import join_shares
from fedmomentum.secure_sum.statements import (
    KEYS,
    SURVIVORS,
    keys_digest,
    keys_statement,
    share_hash,
    survivors_statement,
)
from fedmomentum.utils.schema import Schema

MAX_REPLY_BYTES = 2**20
"""The largest reply of a party other than masked values."""

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class SumResult:
    """A sum.

    Attributes:
        values: Block -> the sum of the survivors' elements, `(size,)`.
        survivors: The parties whose values are included, sorted.
    """

    values: dict[str, NDArray[np.float64]]
    survivors: list[str]


class SumServer:
    """The server's role in one attempt at a sum.

    Args:
        plan: The sum.
        roster: The server's public keys of the parties; a party with a different key is dropped
            right away, rather than refused by all others.

    Raises:
        SecureSumError: If the plan is invalid.
    """

    def __init__(self, plan: SumPlan, roster: Roster) -> None:
        check_plan(plan, trusts_server=True)
        self._plan = plan
        self._roster = roster
        self._keys = SumKeys.of(plan)
        self._step = 0
        # The parties that may still answer, and their replies in the current step.
        self._active: list[str] = list(plan.parties)
        self._replies: dict[str, Schema] = {}
        # What is known from the previous steps.
        self._advertised: dict[str, PartyKeys] = {}
        self._all_keys = b""
        self._outboxes: dict[str, dict[str, SealedShares]] = {}
        self._hashes: dict[str, dict[str, ShareHashes]] = {}
        self._masked: list[str] = []
        self._survivors: list[str] = []
        self._endorsements: list[Endorsement] = []
        # Add up masked values as they arrive, so that memory does not grow with the parties.
        self._total = np.zeros(plan.size, dtype=np.uint32)
        self._result: SumResult | None = None

    @property
    def finished(self) -> bool:
        """Whether the sum is known."""
        return self._result is not None

    @property
    def result(self) -> SumResult:
        """The sum.

        Raises:
            SecureSumError: If steps remain.
        """
        if self._result is None:
            raise SecureSumError(f"{self._plan.title}: its {STEPS[self._step]} have not all come")
        return self._result

    def messages(self) -> dict[str, bytes]:
        """Return the current step's message to each party that is still in the sum."""
        if self.finished:
            return {}
        if self._step == 2:
            return {party: encode_message(self._inbox(party)) for party in self._active}
        # In all other steps, everyone gets the same message.
        message: Schema
        if self._step == 0:
            message = self._plan
        elif self._step == 1:
            message = Advertisements(keys=list(self._advertised.values()))
        elif self._step == 3:
            message = Survivors(parties=self._survivors)
        else:
            message = Endorsements(signatures=self._endorsements)
        return dict.fromkeys(self._active, encode_message(message))

    def receive(self, party: str, data: bytes) -> None:
        """Process a party's reply to the current step's message.

        Raises:
            SecureSumError: If the reply is invalid; the party has then dropped out, unless a valid
                one arrives before the step ends.
        """
        name = f"{self._plan.title}: {party}"
        if self.finished or party not in self._active:
            raise SecureSumError(f"{name} is not in this step of the sum")
        if party in self._replies:
            raise SecureSumError(f"{name} has sent its {STEPS[self._step]} already")
        takers = (
            self._take_keys,
            self._take_shares,
            self._take_values,
            self._take_endorsement,
            self._take_opening,
        )
        self._replies[party] = takers[self._step](party, data, name)

    def advance(self) -> None:
        """End the current step; parties that have not replied have dropped out.

        Raises:
            SecureSumError: If fewer parties than the threshold have replied, or a secret does not
                open. Once shares were opened, no further attempt is possible, since parties open a
                sum only once.
        """
        plan = self._plan
        parties = sorted(self._replies)
        if len(parties) < plan.threshold:
            missing = [party for party in self._active if party not in self._replies]
            raise SecureSumError(
                f"{plan.title}: {len(parties)} parties sent their {STEPS[self._step]}, and "
                f"{plan.threshold} are needed; {', '.join(missing)} did not"
            )
        # Keep what the next steps need.
        replies = {party: self._replies[party] for party in parties}
        if self._step == 0:
            self._advertised = replies  # type: ignore[assignment]
            self._all_keys = keys_digest(list(self._advertised.values()))
        elif self._step == 1:
            self._masked = parties
            for party, outbox in replies.items():
                assert isinstance(outbox, Outbox)
                self._outboxes[party] = {sealed.party: sealed for sealed in outbox.shares}
                self._hashes[party] = {hashes.party: hashes for hashes in outbox.hashes}
        elif self._step == 2:
            self._survivors = parties
        elif self._step == 3:
            self._endorsements = list(replies.values())  # type: ignore[arg-type]
        else:
            self._result = self._unmask(replies)  # type: ignore[arg-type]
        self._active = parties
        self._replies = {}
        self._step += 1

    def _inbox(self, recipient: str) -> Inbox:
        """Return what the other parties sealed for a party."""
        shares = []
        hashes = []
        for sender in self._masked:
            if sender != recipient:
                sealed = self._outboxes[sender][recipient]
                shares.append(msgspec.structs.replace(sealed, party=sender))
                own = self._hashes[sender][recipient]
                hashes.append(msgspec.structs.replace(own, party=sender))
        return Inbox(shares=shares, hashes=hashes)

    # ── replies ──

    def _take_keys(self, party: str, data: bytes, name: str) -> PartyKeys:
        keys = decode_message(data, PartyKeys, name, MAX_REPLY_BYTES)
        self._check_names([keys.party], [party], name)
        statement = keys_statement(self._keys.digest, keys)
        self._roster.verify(party, keys.signature, KEYS, *statement)
        for key in (keys.mask_key, keys.channel_key):
            check_public_key(party, key)
        return keys

    def _take_shares(self, party: str, data: bytes, name: str) -> Outbox:
        outbox = decode_message(data, Outbox, name, MAX_REPLY_BYTES)
        others = [other for other in self._advertised if other != party]
        self._check_names([sealed.party for sealed in outbox.shares], others, name)
        holders = [hashes.party for hashes in outbox.hashes]
        self._check_names(holders, list(self._advertised), name)
        return outbox

    def _take_values(self, party: str, data: bytes, name: str) -> Schema:
        """Add a party's masked values to the total."""
        size = self._plan.size
        masked = decode_message(data, MaskedValues, name, 4 * size + MAX_REPLY_BYTES)
        if len(masked.values) != 4 * size:
            raise SecureSumError(
                f"{name} sent {len(masked.values)} bytes of masked values; expected {4 * size}"
            )
        self._total += np.frombuffer(masked.values, dtype="<u4")
        # The values are in the total; only the fact that they arrived is kept.
        return MaskedValues(values=b"")

    def _take_endorsement(self, party: str, data: bytes, name: str) -> Endorsement:
        """Verify a party's signature of the list of survivors."""
        endorsement = decode_message(data, Endorsement, name, MAX_REPLY_BYTES)
        self._check_names([endorsement.party], [party], name)
        statement = survivors_statement(
            self._keys.digest, self._all_keys, self._masked, self._survivors
        )
        self._roster.verify(party, endorsement.signature, SURVIVORS, *statement)
        return endorsement

    def _take_opening(self, party: str, data: bytes, name: str) -> Opening:
        """Check a party's opened shares against the hashes of the shares that it was given."""
        opening = decode_message(data, Opening, name, MAX_REPLY_BYTES)
        self._check_names([share.party for share in opening.shares], self._masked, name)
        # A wrong share would spoil the sum, so drop a party that opens one; the others suffice.
        for opened in opening.shares:
            giver = opened.party
            hashes = self._hashes[giver][party]
            is_survivor = giver in self._survivors
            kind = "seed" if is_survivor else "key"
            wanted = hashes.seed_share if is_survivor else hashes.key_share
            if share_hash(self._keys.digest, giver, party, kind, opened.share) != wanted:
                raise SecureSumError(
                    f"{name} opened another share of the {kind} of {giver} than it was given"
                )
        return opening

    def _check_names(self, got: Sequence[str], wanted: Sequence[str], name: str) -> None:
        if list(got) != list(wanted):
            raise SecureSumError(
                f"{name} sent {STEPS[self._step]} that are not for the parties of this step"
            )

    # ── the sum ──

    def _unmask(self, openings: dict[str, Opening]) -> SumResult:
        """Remove the survivors' own masks, and their pairwise masks with dropped parties."""
        openers = sorted(openings)[: self._plan.threshold]
        points = {party: point for point, party in enumerate(self._advertised, start=1)}
        # Recover all secrets first, so that wrong shares leave the total unchanged.
        secrets = {}
        for index, party in enumerate(self._masked):
            shares = {points[opener]: openings[opener].shares[index].share for opener in openers}
            secrets[party] = self._joined(party, shares)
        for party, secret in secrets.items():
            if party in self._survivors:
                add_mask(self._total, self._keys.self_mask_key(secret, party), -1)
            else:
                self._remove_pair_masks(party, secret)
        plan = self._plan
        values = fixed_point.decode(self._total, plan.blocks, len(plan.parties))
        return SumResult(values, self._survivors)

    def _remove_pair_masks(self, dropped: str, private_key: bytes) -> None:
        """Remove the masks that survivors share with a party that dropped out."""
        for survivor in self._survivors:
            peer = self._advertised[survivor].mask_key
            key = self._keys.mask_key(private_key, dropped, survivor, peer)
            add_mask(self._total, key, -pair_sign(survivor, dropped))

    def _joined(self, party: str, shares: dict[int, bytes]) -> bytes:
        """Recover a survivor's seed or a dropped party's key, and verify it.

        Raises:
            SecureSumError: If it differs: the party must have given out inconsistent shares, since
                all were opened as it gave them.
        """
        # Compare a seed with its commitment, and a private key with its public key.
        keys = self._advertised[party]
        is_survivor = party in self._survivors
        kind = "seed" if is_survivor else "key"
        try:
            secret = join_shares(shares)
        except ValueError:
            secret = b""
        if not secret:
            matches = False
        elif is_survivor:
            matches = self._keys.seed_commitment(secret, party) == keys.seed_commitment
        else:
            matches = public_key(secret) == keys.mask_key
        if not matches:
            raise SecureSumError(
                f"{self._plan.title}: the shares that {party} gave out do not open its {kind}; "
                "leave it out of further sums"
            )
        return secret
