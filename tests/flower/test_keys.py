"""Keys: private files are private from their first byte, names cannot be changed, and no other server or name is trusted."""

import logging
import os
import shutil
import socket
import stat
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedmomentum.errors import ConfigError
from fedmomentum.flower import keys as module
from fedmomentum.flower.certificates import make_server_keys
from fedmomentum.flower.fleet_client import ConnectionLost
from fedmomentum.flower.join import NodeIdentity, server_address
from fedmomentum.flower.keys import (
    admit_node,
    admitted_keys,
    check_private_file,
    load_private_key,
    load_public_key,
    make_node_key,
    read_admitted_nodes,
)
from fedmomentum.flower.superlink import SuperLink
from tests.flower.network import HOSTS, connect, make_keys, round_trip, running


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"), "north")


def mode(file) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def certificate(keys):
    return x509.load_pem_x509_certificate((keys / "server.pem").read_bytes())


def pem(private) -> bytes:
    return private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


# ── files ──


def test_keys_are_read_as_they_were_written(tmp_path):
    keys = make_keys(tmp_path)
    private, public = make_node_key("site-1.b", tmp_path / "new")
    assert pem(load_private_key(private)) == load_public_key(public)
    assert admit_node(public, keys) == admit_node(public, keys) == "site-1.b"  # twice does no harm
    assert admitted_keys(keys) == {"site-1.b": load_public_key(public)}


def test_private_files_are_their_owners_at_every_moment(tmp_path, monkeypatch):
    """Also while they are written, with no umask, and where a file that all may read stood before."""
    seen = {}

    def check_open(handle, kind):
        state = os.fstat(handle)
        seen[os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2]] = (
            stat.S_IMODE(state.st_mode),
            state.st_size,
        )
        return opened(handle, kind)

    opened = os.fdopen
    monkeypatch.setattr(module.os, "fdopen", check_open)
    before = os.umask(0)
    try:
        keys = tmp_path / "keys"
        make_server_keys(keys, ["localhost"])
        (keys / "server.key").chmod(0o666)
        make_server_keys(keys, ["localhost"])
        make_node_key("north", tmp_path)
    finally:
        os.umask(before)
    assert seen == {name: (0o600, 0) for name in ("ca.key", "server.key", "north.key")}
    found = {file.name: mode(file) for file in [*keys.glob("*.key"), *tmp_path.glob("*.key")]}
    assert found == dict.fromkeys(seen, 0o600) and mode(keys) == 0o700
    for file in [*tmp_path.rglob("*.p*")]:
        assert b"PRIVATE" not in file.read_bytes(), file


def test_a_private_key_that_others_can_access_is_refused(tmp_path):
    private, _ = make_node_key("north", tmp_path)
    for open_to in (0o640, 0o604, 0o620, 0o666):
        private.chmod(open_to)
        with pytest.raises(
            ConfigError, match="north.key can be read or written by others.*chmod 600"
        ):
            load_private_key(private)
    private.chmod(0o400)
    load_private_key(private)
    with pytest.raises(ConfigError, match="there is no key .*east.key"):
        check_private_file(tmp_path / "east.key")


# ── refusals ──


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", ".hidden", "-x", "a b", "a\n", "x" * 65, "nörd"]
)
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="is not a valid node name"):
        make_node_key(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_keys_are_not_overwritten_and_names_are_not_taken_over(tmp_path):
    keys = make_keys(tmp_path, "north")
    with pytest.raises(ConfigError, match="north.key exists already"):
        make_node_key("north", tmp_path)
    _, other = make_node_key("north", tmp_path / "elsewhere")
    with pytest.raises(
        ConfigError, match="north is admitted already, with another key; .*remove .*north.pub"
    ):
        admit_node(other, keys)
    renamed = tmp_path / "south.pub"
    renamed.write_bytes((tmp_path / "north.pub").read_bytes())
    with pytest.raises(ConfigError, match="admitted already, as north"):
        admit_node(renamed, keys)
    with pytest.raises(ConfigError, match="has no server keys"):
        admit_node(other, tmp_path / "nowhere")
    assert admitted_keys(keys) == {"north": load_public_key(tmp_path / "north.pub")}


def test_an_invalid_public_key_is_refused_by_name(tmp_path):
    keys = make_keys(tmp_path)
    private, _ = make_node_key("north", tmp_path)
    edwards = ed25519.Ed25519PrivateKey.generate().public_key()
    ssh = edwards.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "ed.pub").write_bytes(ssh)
    (tmp_path / "text.pub").write_text("hello")
    for file, words in (
        (private, "north.key is no public key"),  # sent by mistake
        (tmp_path / "text.pub", "text.pub is no public key"),
        (tmp_path / "missing.pub", "missing.pub is no public key"),
        (
            tmp_path / "ed.pub",
            "ed.pub is not an elliptic-curve key; make one with: fedmomentum keys node",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            admit_node(file, keys)
    assert admitted_keys(keys) == {}
    (keys / "nodes" / "bad.pub").write_text("put there by hand")
    assert admitted_keys(keys) == {}
    (problem,) = read_admitted_nodes(keys).problems.values()
    assert problem.startswith("it is no public key of a node: ")
    (tmp_path / "text.key").write_text("hello")
    (tmp_path / "text.key").chmod(0o600)
    with pytest.raises(ConfigError, match="text.key is no private key"):
        load_private_key(tmp_path / "text.key")


def test_a_server_without_names_or_with_a_damaged_authority_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--host fed.example.org"):
        make_server_keys(tmp_path / "keys", [])
    assert not (tmp_path / "keys").exists()
    keys = make_keys(tmp_path)
    (keys / "ca.key").write_text("hello")
    with pytest.raises(ConfigError, match="the authority in .* cannot be read"):
        make_server_keys(keys, ["localhost"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"server": "fed.example.org"}, "--server must be HOST:PORT"),
        ({"server": ":9443"}, "--server must be HOST:PORT"),
        (
            {"authority": "nothing.pem"},
            "there is no authority .* as keys/ca.pem. Give its path by --ca",
        ),
        ({"authority": "north.pub"}, "is no authority's certificate"),
        ({"name": "../north"}, "is not a valid node name"),
        ({"key": "south.key"}, "there is no key"),
    ],
)
def test_mistakes_of_a_party_are_reported_before_anything_is_loaded(keys, change, words):
    folder = keys.parent
    given = {
        "server": "127.0.0.1:1",
        "authority": "keys/ca.pem",
        "key": "north.key",
        "name": "north",
    } | change
    paths = {name: folder / given[name] for name in ("authority", "key")}
    with pytest.raises(ConfigError, match=words):
        NodeIdentity(
            server=given["server"], name=given["name"], store=folder / "store", **paths
        ).fleet_client()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("fed.example.org:9443", "fed.example.org:9443"),
        ("https://fed.example.org:9443", "fed.example.org:9443"),
        ("HTTPS://fed.example.org:443/", "fed.example.org:443"),
        (" 192.0.2.10:09443 ", "192.0.2.10:9443"),
        ("[2001:DB8:0::1]:9443", "[2001:db8::1]:9443"),
        ("https://[::1]:9443/", "[::1]:9443"),
    ],
)
def test_common_forms_of_an_address_are_accepted(given, wanted):
    assert server_address(given) == wanted


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("http://fed.example.org:9443", "speaks TLS only"),
        ("grpc://fed.example.org:9443", "speaks TLS only"),
        ("https://fed.example.org", "must be HOST:PORT"),
        ("fed.example.org:0", "must be HOST:PORT"),
        ("fed.example.org:65536", "must be HOST:PORT"),
        ("fed.example.org:" + "9" * 5000, "must be HOST:PORT"),
        ("fed.example.org:\u0663", "must be HOST:PORT"),
        ("fed.example.org:9443/path", "must be HOST:PORT"),
        ("::1:9443", "stands in brackets"),
        ("[fed.example.org]:9443", "not an IPv6 address"),
        ("[fe80::1%eth0]:9443", "not an IPv6 address"),
        ("user@fed.example.org:9443", "neither a host name"),
        ("fed example:9443", "neither a host name"),
        ("\x1b[2Jfed:9443", "neither a host name"),
        ("", "must be HOST:PORT"),
    ],
)
def test_an_invalid_address_is_refused_with_a_message(given, words):
    with pytest.raises(ConfigError, match=words) as raised:
        server_address(given)
    assert len(str(raised.value)) < 600 and "\x1b" not in str(raised.value)


def test_a_node_reaches_a_server_by_its_ipv6_address(tmp_path):
    keys = make_keys(tmp_path, "north")
    make_server_keys(keys, ["::1"])
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with SuperLink(keys, "::1", 0) as link:
        party = NodeIdentity(
            f"https://[::1]:{link.port}", keys / "ca.pem", tmp_path / "north.key", tmp_path, "north"
        )
        party.fleet_client().probe()


# ── mistakes of the operator ──


def test_bad_files_among_the_nodes_are_reported_once_and_the_others_continue(tmp_path, caplog):
    """Half a key, no key, a directory, a pipe, a huge file, odd names, a key twice, a dangling link."""
    keys = make_keys(tmp_path, "north", "south")
    nodes = keys / "nodes"
    key = (nodes / "north.pub").read_bytes()

    def write_bad_files():
        (nodes / "half.pub").write_bytes(key[: len(key) // 2])
        (nodes / "text.pub").write_text("hello\x1b[2J")
        (nodes / "empty.pub").touch()
        (nodes / "directory.pub").mkdir()
        os.mkfifo(nodes / "pipe.pub")
        (nodes / "huge.pub").write_bytes(key + b" " * 20_000_000)
        (nodes / "nowhere.pub").symlink_to(tmp_path / "nothing")
        (nodes / "north copy.pub").write_bytes(key)
        (nodes / "-x.pub").write_bytes(key)
        (nodes / "zwilling.pub").write_bytes(key)
        (nodes / "readme.txt").write_text("not looked at")

    with caplog.at_level(logging.WARNING, "fedmomentum"), running(keys) as link:
        assert link.registered() == ["north", "south"]
        with connect(link.port, keys, "north") as connection:
            write_bad_files()
            for _ in range(3):
                assert link.registered() == ["north", "south"]
                assert round_trip(link, connection, "north", b"task", b"reply") == (
                    b"task",
                    b"reply",
                )
        warnings = [
            record.getMessage()
            for record in caplog.records
            if "admits nobody" in record.getMessage()
        ]
        assert len(warnings) == 10, warnings
        for name in (
            "half",
            "text",
            "empty",
            "directory",
            "pipe",
            "huge",
            "nowhere",
            "north copy",
            "-x",
            "zwilling",
        ):
            assert sum(f"{name}.pub admits nobody" in line for line in warnings) == 1
        assert any(
            "zwilling.pub admits nobody: its key is that of north; a node has one name" in line
            for line in warnings
        )
        assert all(line.isprintable() or "\ufffd" in line for line in warnings)

        (nodes / "south.pub").write_bytes(
            b""
        )  # half copied over the existing one: south is out, north is not
        assert link.registered() == ["north"]
        (nodes / "north.pub").rename(nodes / "elsewhere")
        assert link.registered() == ["zwilling"]  # whose key it is now
        shutil.rmtree(nodes)
        assert link.registered() == ["zwilling"]  # what cannot be read changes nothing
        assert any(
            "the admitted nodes stay admitted" in record.getMessage() for record in caplog.records
        )


def test_a_bad_file_does_not_keep_another_from_being_admitted(tmp_path):
    keys = make_keys(tmp_path, "north")
    (keys / "nodes" / "bad.pub").write_text("hello")
    _, public = make_node_key("south", tmp_path)
    public.write_bytes(public.read_bytes().rstrip() + b" a comment\x1b[2J\n")
    assert admit_node(public, keys) == "south" and list(admitted_keys(keys)) == ["north", "south"]
    assert (
        (keys / "nodes" / "south.pub").read_bytes().endswith(b" south\n")
    )  # the key and the name, nothing else


# ── certificates ──


def test_renewing_keeps_the_authority(tmp_path):
    keys = make_keys(tmp_path, "north")
    old, authority = (
        certificate(keys),
        {name: (keys / name).read_bytes() for name in ("ca.pem", "ca.key")},
    )
    make_server_keys(keys, HOSTS)
    new = certificate(keys)
    assert {name: (keys / name).read_bytes() for name in authority} == authority
    assert new.serial_number != old.serial_number and new.public_key() != old.public_key()
    assert admitted_keys(keys).keys() == {"north"}
    with running(keys) as link:
        connect(link.port, keys, "north").probe()  # with the ca.pem it has


@pytest.mark.parametrize("missing, kept", [("ca.key", "ca.pem"), ("ca.pem", "ca.key")])
def test_an_authority_that_is_elsewhere_is_not_replaced(tmp_path, missing, kept):
    """`ca.key` may be kept offline; a new authority would be one that no node trusts."""
    keys = make_keys(tmp_path, "north")
    away = (keys / missing).rename(tmp_path / missing)
    before = {file.name: file.read_bytes() for file in keys.iterdir() if file.is_file()}
    with pytest.raises(ConfigError, match=f"has the authority's {kept} but not its {missing}"):
        make_server_keys(keys, HOSTS)
    assert {file.name: file.read_bytes() for file in keys.iterdir() if file.is_file()} == before
    away.rename(keys / missing)
    make_server_keys(keys, HOSTS)


def test_certificates_are_for_the_names_given_and_last_as_long_as_they_say(keys):
    authority = x509.load_pem_x509_certificate((keys / "ca.pem").read_bytes())
    new = certificate(keys)
    names = new.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fed.example.org"]
    for new_certificate, days in ((authority, 3650), (new, 730)):
        lifetime = new_certificate.not_valid_after_utc - new_certificate.not_valid_before_utc
        assert days <= lifetime.total_seconds() / 86400 < days + 1
    new.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not new.extensions.get_extension_for_class(
        x509.BasicConstraints
    ).value.ca  # it can vouch for nobody


def test_a_client_trusts_no_other_name_and_no_other_authority(keys, tmp_path):
    other_keys = make_keys(tmp_path / "elsewhere")
    named = make_keys(tmp_path / "named", "north")
    make_server_keys(named, ["fed.example.org"])
    with running(keys) as link:
        connect(link.port, keys, "north").probe()
        connect(link.port, keys, "north", host="localhost").probe()
        with pytest.raises(ConnectionLost, match="certificate is not one that --ca vouches for"):
            connect(link.port, keys, "north", ca=other_keys / "ca.pem").probe()
        with pytest.raises(ConnectionLost, match="certificate is not one that --ca vouches for"):
            connect(link.port, keys, "north", ca=other_keys / "ca.pem").__enter__()
    with (
        running(named) as link,
        pytest.raises(ConnectionLost, match="vouches for, for this name.*mismatch"),
    ):
        connect(link.port, named, "north").probe()


@pytest.mark.parametrize(
    "host", ["fed.example.org:9443", "https://fed.example.org", "über.example", "", "a b", "-x.org"]
)
def test_an_invalid_host_is_refused_before_anything_is_written(tmp_path, host):
    with pytest.raises(ConfigError, match="neither a host name nor an address"):
        make_server_keys(tmp_path / "keys", ["good.example", host])
    assert not (tmp_path / "keys").exists()


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
def test_a_key_with_a_passphrase_is_refused_by_name(tmp_path):
    file = tmp_path / "north.key"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", str(file)],
        check=True,
    )
    with pytest.raises(ConfigError, match="has a passphrase"):
        load_private_key(file)
