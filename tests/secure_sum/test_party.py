"""What a party refuses, whatever the server and other parties send."""

import msgspec
import numpy as np
import pytest

from fedmomentum.errors import ConfigError, DataError, SecureSumError
from fedmomentum.secure_sum.journal import PartyJournal
from fedmomentum.secure_sum.messages import (
    Advertisements,
    Endorsement,
    Endorsements,
    Inbox,
    Opening,
    SealedShares,
    ServerMessage,
    SumPlan,
    Survivors,
    decode_message,
    encode_message,
)
from fedmomentum.secure_sum.party import Identity, SumParty
from fedmomentum.secure_sum.roster import Roster, sign
from fedmomentum.secure_sum.server import SumServer
from fedmomentum.secure_sum.statements import KEYS, SURVIVORS, keys_statement, survivors_statement
from tests.secure_sum.sums import (
    identity,
    make_parties,
    make_plan,
    make_values,
    names,
    node_key,
    roster,
    run_sum,
    until,
)

ME = "party 01"


def message_at(step, tmp_path, plan=None):
    """A party that waits for a step's message, and that message as an honest server sends it."""
    server, parties = until(step, plan or make_plan(4), tmp_path)
    kind = (SumPlan, Advertisements, Inbox, Survivors, Endorsements)[step]
    return parties[ME], decode_message(server.messages()[ME], kind, "x"), server, parties


def refuses(party, message, pattern):
    with pytest.raises(SecureSumError, match=pattern):
        party.answer(encode_message(message))


def changed(message, **changes):
    return msgspec.structs.replace(message, **changes)


# ── the plan ──


def test_a_party_takes_no_part_in_sums_below_its_minimum(tmp_path):
    """A server that names other three of ten each time would learn single values by differences."""
    all_names = names(10)
    me = identity(all_names[0], all_names, least_threshold=7)
    values = {"B": np.zeros(5), "A": np.zeros(3)}

    def plan(number, n, threshold):
        return encode_message(make_plan(n, number=number, threshold=threshold))

    def party():
        return SumParty(me, PartyJournal(tmp_path / "journal.json"), values)

    with pytest.raises(SecureSumError, match="threshold is 5 of 7 parties; .* sums that 7 open"):
        party().answer(plan(1, 7, 5))
    assert party().answer(plan(1, 7, 7)) and party().answer(plan(2, 10, 7))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"parties": names(2)}, "2 parties; a secure sum needs at least 3"),
        ({"parties": [ME]}, "1 parties; a secure sum needs"),
        ({"parties": [*names(4), "zoe"], "threshold": 4}, "zoe is not in this party's roster"),
        ({"parties": ["party 00", "party 02", "party 03"], "threshold": 3}, "party 01, is not in"),
        ({"parties": names(4)[::-1]}, "not sorted"),
        ({"parties": [*names(4), "party 03"]}, "named twice"),
        ({"threshold": 2}, "threshold 2 of 4 parties; wanted 3 to 4"),
        ({"threshold": 0}, "threshold 0"),
        ({"threshold": 9}, "threshold 9"),
    ],
)
def test_a_plan_that_would_show_single_values_is_refused(tmp_path, changes, pattern):
    party, plan, *_ = message_at(0, tmp_path)
    refuses(party, changed(plan, **changes), pattern)
    # nothing was started: the honest plan is still accepted
    party.answer(encode_message(plan))


def test_the_threshold_is_two_thirds_or_half_if_the_server_is_trusted(tmp_path):
    plan = make_plan(9, threshold=5)
    values = make_values(plan)[ME]
    journal = PartyJournal(tmp_path / "a.json")
    strict = SumParty(identity(ME, plan.parties), journal, values)
    refuses(strict, plan, "threshold 5 of 9 parties; wanted 7 to 9")
    trusting = SumParty(identity(ME, plan.parties, trusts_server=True), journal, values)
    refuses(trusting, changed(plan, threshold=4), "wanted 5 to 9")
    trusting.answer(encode_message(plan))


def test_own_values_are_checked_before_anything_is_sent(tmp_path):
    plan = make_plan(4)
    values = make_values(plan)[ME]
    values["B"][0] = np.nan
    party = SumParty(identity(ME, plan.parties), PartyJournal(tmp_path / "a.json"), values)
    with pytest.raises(DataError, match="block 'B' of this party's update holds NaN"):
        party.answer(encode_message(plan))
    assert not (tmp_path / "a.json").exists()


def test_a_roster_without_this_partys_own_key_is_refused():
    with pytest.raises(ConfigError, match="does not have party 01 with this party's own key"):
        Identity(ME, node_key("another"), roster(names(4)))
    with pytest.raises(ConfigError, match="does not have zoe"):
        Identity("zoe", node_key("zoe"), roster(names(4)))
    assert "key" not in repr(identity(ME, names(4)))


# ── others' keys ──


def test_keys_that_the_roster_does_not_vouch_for_are_refused(tmp_path):
    party, message, *_ = message_at(1, tmp_path)
    keys = message.keys
    server_made = changed(keys[2], mask_key=b"s" * 32)
    digest = make_plan(4).digest()
    # the server's own key, signed by a key of its own
    forged = changed(
        server_made, signature=sign(node_key("server"), KEYS, *keys_statement(digest, server_made))
    )
    # signed by the right key, for another sum
    other = make_plan(4, attempt=2).digest()
    stale = changed(
        keys[2], signature=sign(node_key("party 02"), KEYS, *keys_statement(other, keys[2]))
    )
    for wrong in (server_made, forged, stale, changed(keys[2], channel_key=b"c" * 32)):
        refuses(
            party,
            Advertisements(keys=[*keys[:2], wrong, keys[3]]),
            "the keys of party 02 was not signed by the key that the roster has",
        )
    # signed for another purpose
    wrong = changed(
        keys[2], signature=sign(node_key("party 02"), SURVIVORS, *keys_statement(digest, keys[2]))
    )
    refuses(party, Advertisements(keys=[*keys[:2], wrong, keys[3]]), "not signed")
    # one party under another's name
    refuses(party, Advertisements(keys=[*keys[:2], changed(keys[2], party="party 03")]), "not sign")
    party.answer(encode_message(message))


@pytest.mark.parametrize(
    ("choose", "pattern"),
    [
        (lambda k: k[:2], "the parties with keys are 2; wanted 3"),
        (lambda k: [], "do not hold this party"),
        (lambda k: [k[0], k[2], k[3]], "do not hold this party"),
        (lambda k: k[::-1], "not sorted, or one is named twice"),
        (lambda k: [k[0], k[0], k[1], k[2]], "not sorted, or one is named twice"),
        (lambda k: [*k, changed(k[0], party="zoe")], "hold zoe, who was not in the step before"),
    ],
)
def test_lists_of_keys_that_are_too_short_or_strange_are_refused(tmp_path, choose, pattern):
    party, message, *_ = message_at(1, tmp_path)
    refuses(party, Advertisements(keys=choose(message.keys)), pattern)


def test_one_key_for_two_parties_is_refused(tmp_path):
    """Even if its owner signs it: a party could otherwise turn another's key on itself."""
    party, message, *_ = message_at(1, tmp_path)
    copied = changed(message.keys[3], mask_key=message.keys[2].mask_key)
    statement = keys_statement(make_plan(4).digest(), copied)
    copied = changed(copied, signature=sign(node_key("party 03"), KEYS, *statement))
    refuses(party, Advertisements(keys=[*message.keys[:3], copied]), "one key was advertised twice")


# ── shares ──


def test_shares_that_were_altered_or_are_for_others_are_refused(tmp_path):
    party, message, server, _ = message_at(2, tmp_path)
    shares = message.shares
    flipped = shares[0].data[:-1] + bytes([shares[0].data[-1] ^ 1])
    other_shares = decode_message(server.messages()["party 02"], Inbox, "x").shares
    for data, pattern in (
        (flipped, "what party 00 sealed for this party was altered"),
        (other_shares[0].data, "what party 00 sealed"),  # of party 00, for party 02
        (shares[1].data, "what party 00 sealed"),  # of party 02
    ):
        wrong = SealedShares(party="party 00", data=data)
        refuses(party, changed(message, shares=[wrong, *shares[1:]]), pattern)
    refuses(party, changed(message, shares=shares[:1]), "the parties with shares are 2; wanted 3")
    stranger = SealedShares(party="zoe", data=bytes(80))
    refuses(party, changed(message, shares=[*shares, stranger]), "hold zoe")
    # shares other than those that their giver vouches for, for whom this party would be blamed
    hashes = message.hashes
    for wrong in (
        [changed(hashes[0], key_share=b"h" * 32), *hashes[1:]],
        [changed(hashes[0], seed_share=b"h" * 32), *hashes[1:]],
        [changed(hashes[1], party="party 00"), *hashes[1:]],
        hashes[::-1],
    ):
        refuses(party, changed(message, hashes=wrong), "are not those that it gave the hashes of")
    for wrong in (hashes[:-1], [*hashes, hashes[0]], []):
        refuses(party, changed(message, hashes=wrong), "not as many hashes as shares")
    party.answer(encode_message(message))


# ── survivors and openings ──


@pytest.mark.parametrize(
    ("parties", "pattern"),
    [
        (names(4)[:2], "the survivors are 2; wanted 3"),
        (["party 00", "party 02", "party 03"], "do not hold this party"),
        ([*names(4), "zoe"], "hold zoe"),
        (names(4)[::-1], "not sorted"),
    ],
)
def test_lists_of_survivors_that_break_a_rule_are_not_signed(tmp_path, parties, pattern):
    party, _, _, _ = message_at(3, tmp_path)
    refuses(party, Survivors(parties=parties), pattern)


def test_a_second_list_of_survivors_is_not_signed(tmp_path):
    """The server shows two lists, to have both secrets of the party that is on one of them."""
    party, message, *_ = message_at(3, tmp_path)
    party.answer(encode_message(message))
    refuses(party, Survivors(parties=names(4)[:3]), "the server sent survivors; expected endorse")


def sign_list(party, survivors, folder_plan, keys_digest):
    statement = survivors_statement(folder_plan.digest(), keys_digest, names(4), survivors)
    return Endorsement(party=party, signature=sign(node_key(party), SURVIVORS, *statement))


def test_shares_are_opened_for_enough_signatures_under_one_list_only(tmp_path):
    party, message, *_ = message_at(4, tmp_path)
    signatures = message.signatures
    all_keys = party._all_keys
    plan = make_plan(4)
    refuses(party, Endorsements(signatures=signatures[:2]), "2 parties signed .* opened for 3")
    refuses(party, Endorsements(signatures=[]), "0 parties signed")
    refuses(party, Endorsements(signatures=[signatures[0]] * 4), "named twice")
    # of another list, which those parties might have been shown
    others = [sign_list(p, names(4)[:3], plan, all_keys) for p in names(4)[:3]]
    refuses(party, Endorsements(signatures=others), "the list of survivors of party 00 was not")
    # of other keys, and of another sum
    others = [sign_list(p, names(4), plan, b"k" * 32) for p in names(4)]
    refuses(party, Endorsements(signatures=others), "the list of survivors of party 00 was not")
    others = [sign_list(p, names(4), make_plan(4, number=2), all_keys) for p in names(4)]
    refuses(party, Endorsements(signatures=others), "the list of survivors of party 00 was not")
    # the server's own signatures under parties' names
    copied = [changed(s, signature=signatures[0].signature) for s in signatures]
    refuses(party, Endorsements(signatures=copied), "the list of survivors of party 01 was not")
    zoe = Endorsement(party="zoe", signature=bytes(96))
    refuses(party, Endorsements(signatures=[*signatures, zoe]), "zoe signed .* is not on it")
    # nothing was opened by all this, and the honest list still is
    assert len(decode_message(party.answer(encode_message(message)), Opening, "x").shares) == 4
    refuses(party, Endorsements(signatures=signatures[:3]), "has opened its shares, and is done")


def test_of_each_party_the_seed_or_the_key_is_opened_and_never_both(tmp_path):
    plan = make_plan(5)
    parties = make_parties(plan, make_values(plan), tmp_path)
    secrets = {p: party._secrets for p, party in parties.items()}
    seen = []
    run_sum(SumServer(plan, roster(plan.parties)), parties, {"party 03": 2}, seen=seen)
    openings = {p: data for step, p, to, data in seen if (step, to) == (4, "from")}
    assert len(openings) == 4
    for opener, data in openings.items():
        for opened in decode_message(data, Opening, "x").shares:
            key_share, seed_share = secrets[opener].shares[opened.party]
            assert opened.share == (key_share if opened.party == "party 03" else seed_share)
        assert not hasattr(parties[opener], "_secrets")


# ── every sum and every attempt ──


def test_every_attempt_has_new_secrets(tmp_path):
    plan = make_plan(4)
    values = make_values(plan)
    seen = set()
    for number, attempt in ((1, 1), (1, 2), (2, 1)):
        repeated_plan = changed(plan, number=number, attempt=attempt)
        for party in make_parties(repeated_plan, values, tmp_path).values():
            keys = party.answer(encode_message(repeated_plan))
            secrets = party._secrets
            seen |= {secrets.mask_key, secrets.seed, secrets.channel_key, keys}
    assert len(seen) == 4 * 3 * 4


def test_a_restarted_party_opens_no_second_time(tmp_path):
    """The same sum of fewer parties would show what the others' values are."""
    plan = make_plan(4)
    values = make_values(plan)
    run_sum(SumServer(plan, roster(plan.parties)), make_parties(plan, values, tmp_path))
    second_plan = changed(plan, attempt=2, parties=names(3), threshold=3)
    restarted = make_parties(second_plan, {p: values[p] for p in names(3)}, tmp_path)
    for party in restarted.values():
        refuses(party, second_plan, "has opened sum 1 of round 3 already, and opens no sum twice")


def test_an_abandoned_attempt_is_opened_by_no_party(tmp_path):
    """The server has all signatures of a first attempt, begins a second, and returns to the first."""
    plan = make_plan(4)
    first, message, *_ = message_at(4, tmp_path, plan)
    second_plan = changed(plan, attempt=2)
    second = make_parties(second_plan, make_values(plan), tmp_path)
    for party in second.values():
        party.answer(encode_message(second_plan))
    refuses(first, message, "this party has begun a later attempt since; it opens nothing")
    # and the second continues
    server = SumServer(second_plan, roster(plan.parties))
    assert len(run_sum(server, second).survivors) == 4


def test_an_attempt_is_not_begun_twice(tmp_path):
    plan = make_plan(4)
    for _ in range(2):
        party = make_parties(plan, make_values(plan), tmp_path)[ME]
        if _:
            refuses(
                party,
                plan,
                "has begun attempt 1 at sum 1 of round 3, and does not go back; wanted a later",
            )
        else:
            party.answer(encode_message(plan))


# ── order and bytes ──


@pytest.mark.parametrize("step", range(5))
def test_messages_out_of_order_are_refused(tmp_path, step):
    party, message, *_ = message_at(step, tmp_path)
    others = [
        make_plan(4),
        Advertisements(keys=[]),
        Inbox(shares=[], hashes=[]),
        Survivors(parties=[]),
        Endorsements(signatures=[]),
    ]
    for index, other in enumerate(others):
        if index != step:
            if index == 0 and step:
                other = changed(other, attempt=7)
            refuses(party, other, "the server sent .*; expected")
    party.answer(encode_message(message))


@pytest.mark.parametrize("step", range(5))
def test_bytes_that_are_not_a_message_are_refused(tmp_path, step):
    party, message, *_ = message_at(step, tmp_path)
    encoded = encode_message(message)
    table = msgspec.msgpack.decode(encoded)
    invalid = [b"", b"\xc1", b"\x91" * 9999, encoded[:-1], encoded + b"\0", b'{"step": "plan"}']
    invalid += [
        msgspec.msgpack.encode(table | {"more": 1}),
        msgspec.msgpack.encode(table | {"step": "x"}),
    ]
    for field in table:
        invalid.append(msgspec.msgpack.encode({k: v for k, v in table.items() if k != field}))
        invalid.append(msgspec.msgpack.encode(table | {field: {"a": None}}))
    for data in invalid:
        with pytest.raises(SecureSumError, match="the server: "):
            party.answer(data)
    with pytest.raises(SecureSumError, match="at most 134217728 were expected"):
        party.answer(bytes(2**27 + 1))
    party.answer(encoded)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), 1e31])
def test_invalid_bounds_are_refused(tmp_path, bound):
    party, plan, *_ = message_at(0, tmp_path)
    block = changed(plan.blocks[0], bound=bound)
    refuses(party, changed(plan, blocks=[block, plan.blocks[1]]), r"blocks\[0\].bound")


def test_every_message_of_the_server_decodes_as_a_server_message(tmp_path):
    for step in range(5):
        folder = tmp_path / str(step)
        folder.mkdir()
        _, message, server, _ = message_at(step, folder)
        assert decode_message(server.messages()[ME], ServerMessage, "x") == message


def test_parties_detect_that_their_rosters_differ(tmp_path):
    """One of them was given another key for party 02 by the server."""
    plan = make_plan(4)
    own = {p: node_key(p).public_key() for p in plan.parties}
    wrong_roster = Roster({**own, "party 02": node_key("server").public_key()})
    journal = PartyJournal(tmp_path / "fooled.json")
    parties = make_parties(plan, make_values(plan), tmp_path)
    values = make_values(plan)[ME]
    parties[ME] = SumParty(Identity(ME, node_key(ME), wrong_roster), journal, values)
    with pytest.raises(SecureSumError, match="the keys of party 02 was not signed"):
        run_sum(SumServer(plan, roster(plan.parties)), parties)
