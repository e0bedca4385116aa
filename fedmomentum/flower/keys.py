"""Key pairs of nodes, and the nodes that the server has admitted.

A node signs its requests with its private key. The server knows the public keys of the admitted
nodes, and each node's name is bound to its key.

::

    north.key  north.pub                made on the node; north.pub goes to the server
    keys/nodes/north.pub  ...           the nodes that the server has admitted
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmomentum.errors import ConfigError
from fedmomentum.utils.io import write_atomically
from fedmomentum.utils.text import printable

NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_PUBLIC_KEY_BYTES = 16384
"""The largest public-key file that is read; a real one has about 200 bytes."""


# ── a node's keys ──


def make_node_key(name: str, directory: Path) -> tuple[Path, Path]:
    """Create a node's key pair.

    Args:
        name: The node's name.
        directory: Where to store both files.

    Returns:
        The private and the public file.

    Raises:
        ConfigError: If the name is not allowed, or the key already exists.
    """
    _check_name(name)
    directory.mkdir(parents=True, exist_ok=True)
    private_file = directory / f"{name}.key"
    public_file = directory / f"{name}.pub"
    if private_file.exists():
        raise ConfigError(f"{private_file} exists already; to replace it, remove it first")
    key = ec.generate_private_key(ec.SECP384R1())
    # no passphrase, since a service cannot type one
    private_bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    write_private_file(private_file, private_bytes)
    _write_public(public_file, key.public_key(), name)
    return private_file, public_file


def admit_node(public_file: Path, directory: Path) -> str:
    """Admit a node: store its public key under its name.

    Args:
        public_file: The node's public key; the file is named after the node.
        directory: The server's keys.

    Returns:
        The node's name.

    Raises:
        ConfigError: If the file is not a public key of the right type, or its name or key is
            already admitted.
    """
    key = load_public_key(public_file)
    name = public_file.stem
    _check_name(name)
    if not (directory / "nodes").is_dir():
        raise ConfigError(
            f"{directory} has no server keys; make them with: fedmomentum keys server"
        )
    # each key has one name, and each name one key
    for other_name, other_key in admitted_keys(directory).items():
        if other_key == key and other_name != name:
            raise ConfigError(f"{public_file}: this key is admitted already, as {other_name}")
        if other_name == name and other_key != key:
            raise ConfigError(
                f"{name} is admitted already, with another key; to replace it, remove "
                f"{directory / 'nodes' / public_file.name}"
            )
    # copy only the key, without anything else in the file, such as a comment
    public_key = serialization.load_pem_public_key(key)
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    _write_public(directory / "nodes" / f"{name}.pub", public_key, name)
    return name


@dataclass(frozen=True)
class AdmittedNodes:
    """The contents of the files in `keys/nodes`.

    Attributes:
        keys: Public keys (PEM) of the admitted nodes by name, sorted; None if the directory cannot
            be read.
        problems: What is wrong with each file that admits nobody.
    """

    keys: Mapping[str, bytes] | None
    problems: Mapping[str, str]


def read_admitted_nodes(directory: Path) -> AdmittedNodes:
    """Read which nodes are admitted.

    A file that is not a node's public key admits nobody and does not affect the others. If two
    files hold the same key, only the first by name counts.

    Args:
        directory: The server's keys.
    """
    nodes = directory / "nodes"
    try:
        files = sorted(file for file in nodes.iterdir() if file.suffix == ".pub")
    except OSError as error:
        problem = f"it cannot be read ({error.strerror}); the admitted nodes stay admitted"
        return AdmittedNodes(None, {str(nodes): problem})
    keys: dict[str, bytes] = {}
    problems: dict[str, str] = {}
    names_by_key: dict[bytes, str] = {}
    # read each file separately: a damaged one must not affect the other nodes
    for file in files:
        try:
            _check_name(file.stem)
            key = load_public_key(file)
        except ConfigError as error:
            problems[str(file)] = str(error).replace(f"{file} is", "it is", 1)
            continue
        if key in names_by_key:
            problems[str(file)] = f"its key is that of {names_by_key[key]}; a node has one name"
            continue
        keys[file.stem] = key
        names_by_key[key] = file.stem
    return AdmittedNodes(keys, problems)


def admitted_keys(directory: Path) -> dict[str, bytes]:
    """Return the admitted nodes' public keys (PEM) by name, sorted."""
    return dict(read_admitted_nodes(directory).keys or {})


# ── reading and writing keys ──


def load_public_key(file: Path) -> bytes:
    """Return a node's public key as PEM.

    Raises:
        ConfigError: If there is no such file, or it is not an elliptic-curve public key in
            OpenSSH's format.
    """
    try:
        # avoid pipes that block and files that fill the memory
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{file} is not a regular file, so it is no public key of a node")
        if status.st_size > MAX_PUBLIC_KEY_BYTES:
            raise ConfigError(
                f"{file} has {status.st_size} bytes; a node's public key has about 200"
            )
        key = serialization.load_ssh_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{file} is no public key of a node: {printable(str(error), 200)}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            f"{file} is not an elliptic-curve key; make one with: fedmomentum keys node NAME"
        )
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def load_private_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """Return a node's private key.

    Raises:
        ConfigError: If there is no such file, it is not an elliptic-curve private key, or anyone
            but its owner can access it.
    """
    check_private_file(file)
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), None)
    except TypeError as error:
        raise ConfigError(
            f"{file} has a passphrase, which a service cannot type; make a key without one"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{file} is no private key of a node: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{file} is not an elliptic-curve key; make one with: fedmomentum keys node NAME"
        )
    return key


def check_private_file(file: Path) -> None:
    """Reject a private file that is missing, or that anyone but its owner can read or write.

    Raises:
        ConfigError: If it is; the message says what to do.
    """
    if not file.is_file():
        raise ConfigError(f"there is no key {file}; make one with: fedmomentum keys")
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ConfigError(
            f"{file} can be read or written by others than its owner; run: chmod 600 "
            f"{shlex.quote(str(file))}"
        )


def _check_name(name: str) -> None:
    """Reject a name that is not allowed for a node.

    Raises:
        ConfigError: If it is not allowed.
    """
    if not NODE_NAME.fullmatch(name):
        raise ConfigError(
            f"{printable(name, 80)!r} is not a valid node name: up to 64 letters, digits, dots, "
            "dashes and underscores"
        )


def _write_public(file: Path, key: ec.EllipticCurvePublicKey, name: str) -> None:
    """Write a public key in OpenSSH's format, with the node's name as its comment."""
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_atomically(file, text + b" " + name.encode() + b"\n")


def write_private_file(file: Path, data: bytes) -> None:
    """Write a file that only its owner can read, right from its creation."""
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as opened:
        opened.write(data)
