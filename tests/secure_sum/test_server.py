"""The whole protocol: any drop-outs leave the plain sum of the others, and nothing else shows."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmomentum.errors import SecureSumError
from fedmomentum.secure_sum import party as party_module
from fedmomentum.secure_sum import shamir
from fedmomentum.secure_sum.messages import (
    Advertisements,
    Block,
    Endorsement,
    MaskedValues,
    OpenedShare,
    Opening,
    Outbox,
    PartyKeys,
    ServerMessage,
    decode_message,
    encode_message,
)
from fedmomentum.secure_sum.roster import sign
from fedmomentum.secure_sum.server import SumServer
from fedmomentum.secure_sum.statements import KEYS, keys_statement
from tests.secure_sum.sums import (
    make_parties,
    make_plan,
    make_values,
    names,
    node_key,
    plain_sum,
    roster,
    run_sum,
    sum_error,
    until,
)

REPLIES = [PartyKeys, Outbox, MaskedValues, Endorsement, Opening]


def assert_is_sum(result, plan, values):
    wanted = plain_sum(values, result.survivors)
    for block in plan.blocks:
        error = np.abs(result.values[block.name] - wanted[block.name]).max()
        assert error <= sum_error(block, len(plan.parties), len(result.survivors)) * (1 + 1e-6)
        assert error <= 1e-7 * block.bound


@settings(max_examples=15, deadline=None)
@given(data=st.data(), n=st.integers(3, 6))
def test_drop_outs_at_any_step_leave_the_sum_of_the_values_received(tmp_path_factory, data, n):
    threshold = data.draw(st.integers(2 * n // 3 + 1, n))
    plan = make_plan(n, threshold=threshold)
    dropped = data.draw(st.lists(st.sampled_from(names(n)), unique=True, max_size=n - threshold))
    leaves = {party: data.draw(st.integers(0, 4)) for party in dropped}
    values = make_values(plan, n)
    parties = make_parties(plan, values, tmp_path_factory.mktemp("sum"))
    result = run_sum(SumServer(plan, roster(plan.parties)), parties, leaves)
    # Values under masks are the third reply.
    assert result.survivors == [p for p in plan.parties if leaves.get(p, 99) > 2]
    assert_is_sum(result, plan, values)


@pytest.mark.parametrize("step", range(5))
def test_one_drop_out_more_than_allowed_ends_the_sum_by_name(tmp_path, step):
    plan = make_plan(7)
    parties = make_parties(plan, make_values(plan), tmp_path)
    server = SumServer(plan, roster(plan.parties))
    leaves = dict.fromkeys(names(7)[:3], step)
    message = "4 parties sent their .*, and 5 are needed; party 00, party 01, party 02 did not"
    with pytest.raises(SecureSumError, match=message):
        run_sum(server, parties, leaves)
    assert not server.finished
    with pytest.raises(SecureSumError, match="have not all come"):
        _ = server.result


def test_many_parties(tmp_path):
    blocks = [Block(name="x", size=3001, bound=2.0)]
    plan = make_plan(12, blocks=blocks)
    values = make_values(plan)
    parties = make_parties(plan, values, tmp_path)
    result = run_sum(SumServer(plan, roster(plan.parties)), parties, {"party 03": 2, "party 11": 3})
    assert len(result.survivors) == 11
    error = np.abs(result.values["x"] - plain_sum(values, result.survivors)["x"]).max()
    assert error <= sum_error(blocks[0], 12, 11) and error <= 1e-7 * 2


# ── what the server sees ──


def fields(value):
    """Names and lengths of all that a message holds; not its bytes."""
    if isinstance(value, dict):
        return {name: fields(part) for name, part in value.items()}
    if isinstance(value, list):
        return [fields(part) for part in value]
    return len(value) if isinstance(value, bytes) else value


def seen(folder, plan, values, monkeypatch):
    """All that the server sees, with the same keys in every call and signatures that are so too."""
    folder.mkdir()
    # far apart: the lowest three bits of a private key do not count
    drawn = iter(range(1, 10**9, 8))
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda _: next(drawn))
    signatures = iter(range(10**6))
    monkeypatch.setattr(party_module, "sign", lambda *_: next(signatures).to_bytes(96))
    parties = make_parties(plan, values, folder)
    server_roster = roster(plan.parties)
    monkeypatch.setattr(type(server_roster), "verify", lambda *_: None)
    transcript = []
    leaves = {"party 05": 2, "party 01": 3}
    result = run_sum(SumServer(plan, server_roster), parties, leaves, seen=transcript)
    return transcript, result


def test_two_updates_of_one_sum_differ_in_masked_values_only(tmp_path, monkeypatch):
    """One party's update differs, another's compensates for it: no other byte shows it."""
    plan = make_plan(7, blocks=[Block(name="x", size=400, bound=1.0)])
    values = make_values(plan)
    other = {party: dict(own) for party, own in values.items()}
    moved = np.round(values["party 02"]["x"] * 2**20) / 2**20
    other["party 02"] = {"x": np.zeros(400)}
    other["party 03"] = {"x": values["party 03"]["x"] * 0}
    values["party 02"] = {"x": moved}
    values["party 03"] = {"x": -moved}
    first, sum_1 = seen(tmp_path / "1", plan, values, monkeypatch)
    second, sum_2 = seen(tmp_path / "2", plan, other, monkeypatch)
    assert (sum_1.values["x"] == sum_2.values["x"]).all()

    assert len(first) == len(second)
    differing = []
    for (step, party, direction, a), (*same, b) in zip(first, second, strict=True):
        assert [step, party, direction] == same and len(a) == len(b)
        if a != b:
            differing.append((step, party, direction))
    # The values differ under their masks, and the masks are the same here only because the keys are.
    assert differing == [(2, "party 02", "from"), (2, "party 03", "from")]


def test_no_length_and_no_field_depends_on_a_partys_values(tmp_path):
    """With real keys and signatures: zeros, large values and others look alike."""
    plan = make_plan(4)
    shapes = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        values = make_values(plan, seed)
        if seed:
            values["party 01"] = {
                b.name: np.full(b.size, (seed - 1) * b.bound) for b in plan.blocks
            }
        transcript = []
        parties = make_parties(plan, values, folder)
        run_sum(SumServer(plan, roster(plan.parties)), parties, {}, seen=transcript)
        decoded = []
        for step, party, direction, data in transcript:
            kind = ServerMessage if direction == "to" else REPLIES[step]
            message = decode_message(data, kind, "x")
            shape = fields(msgspec.to_builtins(message, builtin_types=(bytes,)))
            decoded.append((step, party, direction, len(data), shape))
        shapes.append(decoded)
    assert shapes[0] == shapes[1] == shapes[2]


def test_masked_values_are_uniform_whatever_they_hide(tmp_path):
    """Zeros under masks: every bit is set half of the time."""
    plan = make_plan(3, blocks=[Block(name="x", size=4096, bound=1.0)])
    parties = make_parties(plan, {p: {"x": np.zeros(4096)} for p in names(3)}, tmp_path)
    transcript = []
    result = run_sum(SumServer(plan, roster(names(3))), parties, seen=transcript)
    assert not result.values["x"].any()
    for step, _, direction, data in transcript:
        if (step, direction) == (2, "from"):
            masked = np.frombuffer(decode_message(data, MaskedValues, "x").values, np.uint8)
            # six standard deviations
            assert abs(np.unpackbits(masked).mean() - 0.5) < 6 * 0.5 / np.sqrt(8 * masked.size)


# ── a server that stops ──


def test_a_server_continues_from_the_replies_it_kept(tmp_path):
    plan = make_plan(5)
    values = make_values(plan)
    parties = make_parties(plan, values, tmp_path)
    kept = []
    server = SumServer(plan, roster(plan.parties))
    for step in range(5):
        # killed here: a new server takes the kept replies, and asks for the same as the old one
        resumed = SumServer(plan, roster(plan.parties))
        for replies in kept:
            for party, reply in replies.items():
                resumed.receive(party, reply)
            resumed.advance()
        assert resumed.messages() == server.messages(), step
        server = resumed
        replies = {party: parties[party].answer(m) for party, m in server.messages().items()}
        # a party that was asked before answers the same
        assert replies == {p: parties[p].answer(m) for p, m in server.messages().items()}
        if step == 2:
            del replies["party 04"]
        for party, reply in replies.items():
            server.receive(party, reply)
        server.advance()
        kept.append(replies)
    assert_is_sum(server.result, plan, values)
    assert server.messages() == {}


# ── replies that break the rules ──


def altered(reply, kind, **changes):
    return encode_message(msgspec.structs.replace(decode_message(reply, kind, "x"), **changes))


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x91" * 5000, b"{}", b"\xff" * 70])
def test_bytes_that_are_not_a_reply_are_refused_by_party(tmp_path, step, data):
    server, parties = until(step, make_plan(4), tmp_path)
    with pytest.raises(SecureSumError, match="sum 1 of round 3, attempt 1: party 02"):
        server.receive("party 02", data)
    # the step continues, and a valid reply counts
    message = server.messages()["party 02"]
    server.receive("party 02", parties["party 02"].answer(message))


@pytest.mark.parametrize("step", range(5))
def test_a_reply_that_is_too_large_or_comes_twice_or_from_a_stranger_is_refused(tmp_path, step):
    server, parties = until(step, make_plan(4), tmp_path)
    reply = parties["party 01"].answer(server.messages()["party 01"])
    with pytest.raises(SecureSumError, match="bytes; at most"):
        server.receive("party 01", reply + bytes(2**20 + 40))
    with pytest.raises(SecureSumError, match="not in this step"):
        server.receive("mallory", reply)
    server.receive("party 01", reply)
    with pytest.raises(SecureSumError, match="already"):
        server.receive("party 01", reply)
    if step not in (2,):
        with pytest.raises(SecureSumError):
            server.receive("party 02", reply if step in (0, 1, 3) else b"")


def test_replies_for_others_or_with_other_keys_are_refused(tmp_path):
    server, parties = until(0, make_plan(4), tmp_path)
    replies = {p: parties[p].answer(m) for p, m in server.messages().items()}
    with pytest.raises(SecureSumError, match="not signed by the key that the roster has"):
        server.receive("party 01", altered(replies["party 01"], PartyKeys, mask_key=b"m" * 32))
    with pytest.raises(SecureSumError, match="not for the parties of this step"):
        server.receive("party 01", replies["party 02"])


@pytest.mark.parametrize("field", ["mask_key", "channel_key"])
def test_keys_that_keep_nothing_secret_are_refused_by_server_and_parties(tmp_path, field):
    """Of low order, signed by their party: masks from them would be known to all."""
    server, parties = until(0, make_plan(4), tmp_path)
    replies = {p: parties[p].answer(m) for p, m in server.messages().items()}
    keys = decode_message(replies["party 03"], PartyKeys, "x")
    weak = msgspec.structs.replace(keys, **{field: bytes(32)})
    signature = sign(node_key("party 03"), KEYS, *keys_statement(make_plan(4).digest(), weak))
    weak = msgspec.structs.replace(weak, signature=signature)
    with pytest.raises(SecureSumError, match="the key of party 03 is of low order"):
        server.receive("party 03", encode_message(weak))
    others = [decode_message(replies[p], PartyKeys, "x") for p in names(4)[:3]]
    with pytest.raises(SecureSumError, match="the key of party 03 is of low order"):
        parties["party 01"].answer(encode_message(Advertisements(keys=[*others, weak])))


def test_shares_for_too_few_and_values_of_another_size_are_refused(tmp_path):
    server, parties = until(1, make_plan(4), tmp_path)
    reply = parties["party 01"].answer(server.messages()["party 01"])
    shares = decode_message(reply, Outbox, "x").shares
    for wrong in (shares[:-1], shares[::-1], [*shares, shares[0]], []):
        with pytest.raises(SecureSumError, match="not for the parties of this step"):
            server.receive("party 01", altered(reply, Outbox, shares=wrong))
    hashes = decode_message(reply, Outbox, "x").hashes
    for wrong in (hashes[:-1], hashes[::-1], [*hashes, hashes[0]], []):
        with pytest.raises(SecureSumError, match="not for the parties of this step"):
            server.receive("party 01", altered(reply, Outbox, hashes=wrong))

    folder = tmp_path / "more"
    folder.mkdir()
    server, parties = until(2, make_plan(4), folder)
    reply = parties["party 01"].answer(server.messages()["party 01"])
    for wrong in (b"", bytes(31), bytes(36)):
        with pytest.raises(SecureSumError, match="bytes of masked values; expected 32"):
            server.receive("party 01", altered(reply, MaskedValues, values=wrong))


@pytest.mark.parametrize("share", [bytes(32), b"\xff" * 32])
@pytest.mark.parametrize("index", [0, 4])
def test_a_party_that_opens_a_wrong_share_is_left_out_and_the_sum_completes(tmp_path, share, index):
    """Of a survivor's seed, and of the key of a party that dropped out."""
    plan = make_plan(7)
    values = make_values(plan)
    parties = make_parties(plan, values, tmp_path)
    server = SumServer(plan, roster(plan.parties))
    leaves = {"party 04": 2} if index == 4 else {}
    refused = []
    for step in range(5):
        for party, message in server.messages().items():
            if step >= leaves.get(party, 99):
                continue
            reply = parties[party].answer(message)
            if (step, party) != (4, "party 01"):
                server.receive(party, reply)
                continue
            shares = decode_message(reply, Opening, "x").shares
            shares[index] = OpenedShare(party=shares[index].party, share=share)
            with pytest.raises(SecureSumError, match="party 01 opened another share of the"):
                server.receive(party, encode_message(Opening(shares=shares)))
            refused.append(party)
        server.advance()
    assert refused == ["party 01"]
    # Its values are in the sum all the same.
    assert "party 01" in server.result.survivors
    assert_is_sum(server.result, plan, values)


@pytest.mark.parametrize("kind", ["key", "seed"])
def test_a_swapped_share_is_refused_by_the_kind_that_is_opened(tmp_path, kind):
    """A share of the key where the seed's is wanted, and the other way round."""
    plan = make_plan(5)
    parties = make_parties(plan, make_values(plan), tmp_path)
    secrets = {party: actor._secrets for party, actor in parties.items()}
    about = "party 04" if kind == "key" else "party 00"

    def swap(step, party, reply):
        if (step, party) != (4, "party 01"):
            return reply
        key_share, seed_share = secrets[party].shares[about]
        shares = decode_message(reply, Opening, "x").shares
        index = [opened.party for opened in shares].index(about)
        other = seed_share if kind == "key" else key_share
        shares[index] = OpenedShare(party=about, share=other)
        return encode_message(Opening(shares=shares))

    message = f"party 01 opened another share of the {kind} of {about} than it was given"
    with pytest.raises(SecureSumError, match=message):
        run_sum(SumServer(plan, roster(plan.parties)), parties, {"party 04": 2}, swap)


@pytest.mark.parametrize("drops", [False, True])
def test_a_party_that_gives_out_invalid_shares_is_named(tmp_path, monkeypatch, drops):
    """Its shares lie on no polynomial of the threshold; all others open them as they got them."""
    plan = make_plan(5)
    parties = make_parties(plan, make_values(plan), tmp_path)
    honest = party_module.split_secret
    liar = parties["party 03"]

    def split(secret, threshold, num_shares):
        if secret in (liar._secrets.mask_key, liar._secrets.seed):
            return [shamir.random_secret() for _ in range(num_shares)]
        return honest(secret, threshold, num_shares)

    monkeypatch.setattr(party_module, "split_secret", split)
    kind = "key" if drops else "seed"
    message = f"the shares that party 03 gave out do not open its {kind}; leave it out"
    with pytest.raises(SecureSumError, match=message):
        leaves = {"party 03": 2} if drops else {}
        run_sum(SumServer(plan, roster(plan.parties)), parties, leaves)


def test_a_server_plans_no_sum_that_parties_must_refuse():
    for changes, message in (
        ({"parties": ["a", "b"]}, "2 parties; a secure sum needs at least 3"),
        ({"parties": names(101)}, "101 parties; each masks for every other, up to 100"),
        ({"parties": ["a", "c", "b"]}, "not sorted"),
        ({"parties": ["a", "b", "b", "c"]}, "named twice"),
        ({"threshold": 2}, "threshold 2 of 4 parties; wanted 3 to 4"),
        ({"threshold": 5}, "threshold 5"),
        ({"blocks": make_plan().blocks * 2}, "two blocks have one name"),
        ({"blocks": [Block(name=n, size=2**28, bound=1.0) for n in "ab"]}, "at most 268435456"),
    ):
        plan = make_plan(4, **changes)
        with pytest.raises(SecureSumError, match=message):
            SumServer(plan, roster(plan.parties))
