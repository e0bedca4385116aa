"""Who is who: a private certificate authority, the server's certificate, and a key pair for each node.

The server shows a certificate that the authority signed; nodes trust that authority and no other. A node signs its
requests with its private key; the server knows the public keys of the nodes it admitted, and their names are its.

::

    keys/  ca.pem  ca.key  server.pem  server.key        made by the coordinator; ca.pem goes to every node
           nodes/north.pub  nodes/south.pub              what the coordinator admitted
    north.key  north.pub                                 made by the party; north.pub goes to the coordinator
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmomentum.errors import ConfigError
from fedmomentum.files import write_atomically
from fedmomentum.schema import printable

NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
AUTHORITY_YEARS, SERVER_YEARS = 10, 2
MAX_PUBLIC_BYTES = 16384


def make_server_keys(folder: Path, hosts: Sequence[str]) -> None:
    """Make the authority, unless it is there, and a server certificate for these host names and addresses.

    Called again, it renews the server's certificate (it lasts two years); nodes keep the `ca.pem` they have.

    Raises:
        ConfigError: no hosts, or an authority that cannot be read.
    """
    if not hosts:
        raise ConfigError("give the names or addresses under which nodes reach the server, e.g. --host fed.example.org")
    for host in hosts:
        _host(host)
    (folder / "nodes").mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not (folder / "ca.key").is_file():
        key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmomentum private authority")])
        certificate = _certificate(name, name, key, key, AUTHORITY_YEARS, authority=True)
        _write_private(folder / "ca.key", _pem(key))
        write_atomically(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
    try:
        authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the authority in {folder} (ca.pem, ca.key) cannot be read: {error}") from error
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = _certificate(name, authority.subject, key, signer, SERVER_YEARS, hosts=hosts)
    _write_private(folder / "server.key", _pem(key))
    write_atomically(folder / "server.pem", certificate.public_bytes(serialization.Encoding.PEM))


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    years: int,
    *,
    hosts: Sequence[str] = (),
    authority: bool = False,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=365 * years))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(_usage(authority), critical=True)
    )
    if not authority:
        builder = builder.add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signer, hashes.SHA384())


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not HOST_NAME.fullmatch(host):
            raise ConfigError(
                f"--host {host!r} is no host name and no address; give it without https:// and without a port, and "
                "international names in their xn-- form"
            ) from None
        return x509.DNSName(host)


def make_node_key(name: str, folder: Path) -> tuple[Path, Path]:
    """Make a node's key pair; returns the private and the public file.

    Raises:
        ConfigError: a name that is no file name, or a key that is there already.
    """
    _check_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    if private.exists():
        raise ConfigError(f"{private} is there already; remove it first if it is to be replaced")
    key = ec.generate_private_key(ec.SECP384R1())
    encoding = serialization.Encoding
    _write_private(
        private,
        key.private_bytes(encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()),
    )
    text = key.public_key().public_bytes(encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_atomically(public, text + b" " + name.encode() + b"\n")
    return private, public


def admit(public: Path, folder: Path) -> str:
    """Admit a node: keep its public key under its name; returns the name.

    Raises:
        ConfigError: not a public key of the kind we use, or a name or key that is admitted already.
    """
    key, name = load_public(public), public.stem
    _check_name(name)
    if not (folder / "nodes").is_dir():
        raise ConfigError(f"{folder} holds no keys of a server; make them with: fedmomentum keys server")
    for other, known in admitted(folder).items():
        if known == key and other != name:
            raise ConfigError(f"{public}: this key is admitted already, as {other}")
        if other == name and known != key:
            raise ConfigError(
                f"{name} is admitted already, with another key; to replace it, remove {folder / 'nodes' / public.name}"
            )
    # the key alone: what else stands in the file, such as a comment, is of no use here
    text = serialization.load_pem_public_key(key).public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write_atomically(folder / "nodes" / f"{name}.pub", text + b" " + name.encode() + b"\n")
    return name


@dataclass(frozen=True)
class Nodes:
    """What the files in `keys/nodes` say.

    Attributes:
        keys: Name to public key (PEM) of the nodes that are admitted, sorted; None if the directory cannot be read.
        problems: File to what is wrong with it, of those that admit nobody.
    """

    keys: Mapping[str, bytes] | None
    problems: Mapping[str, str]


def read_nodes(folder: Path) -> Nodes:
    """Read which nodes are admitted. A file that is no node's key admits nobody; the others count as ever.

    Of two files with one key the first by name counts.
    """
    directory = folder / "nodes"
    try:
        files = sorted(file for file in directory.iterdir() if file.suffix == ".pub")
    except OSError as error:
        return Nodes(None, {str(directory): f"it cannot be read ({error.strerror}); who was admitted stays so"})
    keys: dict[str, bytes] = {}
    problems: dict[str, str] = {}
    names_by_key: dict[bytes, str] = {}
    for file in files:
        try:
            _check_name(file.stem)
            key = load_public(file)
        except ConfigError as error:
            problems[str(file)] = str(error).replace(f"{file} is", "it is", 1)
            continue
        if key in names_by_key:
            problems[str(file)] = f"its key is that of {names_by_key[key]}; a node has one name"
            continue
        keys[file.stem] = key
        names_by_key[key] = file.stem
    return Nodes(keys, problems)


def admitted(folder: Path) -> dict[str, bytes]:
    """The nodes' names and public keys (PEM), sorted."""
    return dict(read_nodes(folder).keys or {})


def load_public(file: Path) -> bytes:
    """A node's public key as PEM.

    Raises:
        ConfigError: no such file, or no elliptic-curve public key in OpenSSH's format.
    """
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{file} is no file, and so no public key of a node")
        if status.st_size > MAX_PUBLIC_BYTES:
            raise ConfigError(f"{file} has {status.st_size} bytes; a public key of a node has some 200")
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{file} is no public key of a node: {printable(str(error), 200)}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{file} is no elliptic-curve key; make one with: fedmomentum keys node NAME")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_private(file: Path) -> ec.EllipticCurvePrivateKey:
    """A node's private key.

    Raises:
        ConfigError: no such file, no elliptic-curve key, or one that others may read.
    """
    check_private(file)
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except TypeError as error:
        raise ConfigError(f"{file} has a passphrase, which a service cannot type; make a key without one") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{file} is no private key of a node: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{file} is no elliptic-curve key; make one with: fedmomentum keys node NAME")
    return key


def check_private(file: Path) -> None:
    """Refuse a private file that is not there, or that others than its owner may read or write.

    Raises:
        ConfigError: with what to do.
    """
    if not file.is_file():
        raise ConfigError(f"there is no key {file}; make one with: fedmomentum keys")
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ConfigError(
            f"{file} may be read or written by others than its owner; run: chmod 600 {shlex.quote(str(file))}"
        )


def _check_name(name: str) -> None:
    if not NODE_NAME.fullmatch(name):
        raise ConfigError(
            f"{printable(name, 80)!r} is no name for a node: up to 64 letters, digits, dots, dashes and underscores"
        )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    pkcs8 = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption())


def _write_private(file: Path, data: bytes) -> None:
    """Write a file that only its owner can read, at every moment."""
    file.unlink(missing_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as opened:
        opened.write(data)
