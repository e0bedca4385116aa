import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedmomentum.errors import ConfigError, SecureSumError
from fedmomentum.flower.keys import load_private_key, make_node_key
from fedmomentum.secure_sum.roster import Roster, sign
from tests.secure_sum.sums import node_key, roster


def line(key, name):
    encoded = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return f"{encoded.decode()} {name}\n"


def test_a_roster_is_made_of_the_nodes_own_files(tmp_path):
    files = [make_node_key(name, tmp_path) for name in ("south", "north")]
    text = "".join(public.read_text() for _, public in files)
    (tmp_path / "roster").write_text(f"# exchanged by hand\n\n{text}")
    read = Roster.read(tmp_path / "roster")
    assert sorted(read.keys) == ["north", "south"]
    signature = sign(load_private_key(files[0][0]), "test", b"part")
    read.verify("south", signature, "test", b"part")
    for wrong in (("north", signature, "test", b"part"), ("south", signature, "other", b"part")):
        with pytest.raises(SecureSumError, match="was not signed by the key that the roster has"):
            read.verify(*wrong)
    with pytest.raises(SecureSumError, match="zoe is not in this party's roster"):
        read.verify("zoe", signature, "test", b"part")


def test_the_fingerprint_is_over_names_and_keys_and_not_their_order(tmp_path):
    one = roster(["a", "b"])
    assert one.fingerprint() == Roster(dict(reversed(one.keys.items()))).fingerprint()
    swapped = Roster({"a": one.keys["b"], "b": one.keys["a"]})
    assert len({one.fingerprint(), swapped.fingerprint(), roster(["a"]).fingerprint()}) == 3


def test_signatures_have_one_length():
    lengths = {len(sign(node_key("a"), "test", str(i))) for i in range(300)}
    assert lengths == {96}


@pytest.mark.parametrize("signature", [bytes(96), b"\xff" * 96, b"\0" * 48 + b"\1" * 48])
def test_invalid_signatures_are_refused(signature):
    with pytest.raises(SecureSumError, match="was not signed"):
        roster(["a"]).verify("a", signature, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(node_key("a"), "a") * 2, "line 2: a has a key already"),
        (line(node_key("a"), "a") + line(node_key("a"), "b"), "line 2: b has the key of a"),
        (line(node_key("a"), ""), "line 1: wanted a public key with the node's name behind it"),
        (line(ec.derive_private_key(5, ec.SECP256R1()), "a"), "line 1: not a node's key"),
        (line(ed25519.Ed25519PrivateKey.from_private_bytes(b"k" * 32), "a"), "not a node's key"),
        ("ecdsa-sha2-nistp384 AAAA a\n", "line 1: no public key"),
        ("\x00\x01", "line 1: wanted a public key"),
    ],
)
def test_lines_that_are_not_keys_are_refused_by_number(tmp_path, text, message):
    (tmp_path / "roster").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Roster.read(tmp_path / "roster")


def test_files_that_are_not_rosters_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no roster .*keys roster"):
        Roster.read(tmp_path / "none")
    with pytest.raises(ConfigError, match="no regular file"):
        Roster.read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no text"):
        Roster.read(tmp_path / "binary")
