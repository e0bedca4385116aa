"""The server's identity: a private certificate authority and the server's certificate.

The server presents a certificate signed by the authority, the only one that nodes trust.

::

    keys/  ca.pem  ca.key  server.pem  server.key    made on the server; ca.pem goes to every node
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmomentum.errors import ConfigError
from fedmomentum.flower.keys import write_private_file
from fedmomentum.utils.io import write_atomically

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?"
HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")
AUTHORITY_YEARS = 10
"""Longer than any run, since nodes would need a new `ca.pem` afterward."""
SERVER_YEARS = 2
"""Can be short, since renewal needs no change on the nodes."""
CLOCK_TOLERANCE = timedelta(hours=1)
"""How far in the past a certificate's validity starts, because clocks differ."""


def make_server_keys(directory: Path, hosts: Sequence[str]) -> None:
    """Create the authority, if there is none yet, and a server certificate for these hosts.

    Another call renews the server's certificate, which is valid for two years; nodes keep their
    `ca.pem`. It needs the authority's key: a new authority would be one that no node trusts.

    Args:
        directory: Where to store the keys; readable only by its owner.
        hosts: Host names and addresses at which nodes reach the server.

    Raises:
        ConfigError: If there are no hosts, one of them is invalid, or the existing authority is
            incomplete or cannot be read.
    """
    # check all hosts before anything is written
    if not hosts:
        raise ConfigError(
            "give the names or addresses under which nodes reach the server, e.g. --host "
            "fed.example.org"
        )
    for host in hosts:
        _general_name(host)
    # make the directory private before it holds a key
    (directory / "nodes").mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    if not any((directory / name).exists() for name in ("ca.pem", "ca.key")):
        _make_authority(directory)
    authority, authority_key = _load_authority(directory)

    # a new key and certificate for the server, signed by the authority
    key = ec.generate_private_key(ec.SECP384R1())
    # an X.509 common name holds at most 64 characters; clients check the alternative names
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    alternative_names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    server_only = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = _certificate_builder(subject, authority.subject, key, authority_key, SERVER_YEARS)
    builder = builder.add_extension(alternative_names, critical=False)
    builder = builder.add_extension(server_only, critical=False)
    certificate = builder.sign(authority_key, hashes.SHA384())
    write_private_file(directory / "server.key", _to_pem(key))
    write_atomically(directory / "server.pem", certificate.public_bytes(serialization.Encoding.PEM))


def _make_authority(directory: Path) -> None:
    """Create the authority's key and its self-signed certificate."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmomentum private authority")])
    builder = _certificate_builder(name, name, key, key, AUTHORITY_YEARS)
    certificate = builder.sign(key, hashes.SHA384())
    write_private_file(directory / "ca.key", _to_pem(key))
    write_atomically(directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return the authority's certificate and private key.

    Raises:
        ConfigError: If one of them is missing or invalid.
    """
    for name, other in (("ca.key", "ca.pem"), ("ca.pem", "ca.key")):
        if not (directory / name).is_file():
            raise ConfigError(
                f"{directory} has the authority's {other} but not its {name}, which may be kept "
                "elsewhere; put it back to renew the server's certificate. Without it, the only "
                "way is a new directory of keys, and a new ca.pem for every node"
            )
    try:
        authority = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the authority in {directory} (ca.pem, ca.key) cannot be read: {error}"
        ) from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return authority, key


def _certificate_builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    years: int,
) -> x509.CertificateBuilder:
    """Return an unsigned certificate, which is an authority's if its own key will sign it."""
    is_authority = key is issuer_key
    now = datetime.now(UTC)
    constraints = x509.BasicConstraints(is_authority, path_length=0 if is_authority else None)
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + timedelta(days=365 * years))
        .add_extension(constraints, critical=True)
        .add_extension(subject_id, critical=False)
        .add_extension(issuer_id, critical=False)
        .add_extension(_key_usage(is_authority=is_authority), critical=True)
    )


def _key_usage(*, is_authority: bool) -> x509.KeyUsage:
    """Return what a key may be used for: signing certificates or signing handshakes."""
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    """Return a host name or address in the form used in certificates.

    Raises:
        ConfigError: If it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not HOST_NAME.fullmatch(host):
            raise ConfigError(
                f"--host {host!r} is neither a host name nor an address; give it without https:// "
                "and without a port, and international names in their xn-- form"
            ) from None
        return x509.DNSName(host)


def _to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    pkcs8 = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption())


def server_context(keys: Path) -> ssl.SSLContext:
    """Return the server's TLS context, with its certificate and key.

    Raises:
        ConfigError: If the files are not a certificate and its key.
    """
    certificate = keys / "server.pem"
    key = keys / "server.key"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{certificate} and {key} are not a certificate and its key: {error}; make them with: "
            "fedmomentum keys server"
        ) from error
    return context
