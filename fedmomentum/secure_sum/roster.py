"""The parties' identities, by keys that they exchanged themselves, and signatures with these keys.

A roster file has one line per party: its node's public key as in `NAME.pub`, followed by the node's
name. `fedmomentum keys roster` makes it, of files that came from the parties themselves rather than
from the server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from fedmomentum.errors import ConfigError, SecureSumError
from fedmomentum.secure_sum.keys import PROTOCOL, joined
from fedmomentum.secure_sum.messages import SIGNATURE_BYTES
from fedmomentum.utils.records import read_file
from fedmomentum.utils.text import printable

MAX_ROSTER_BYTES = 2**20
_HALF = SIGNATURE_BYTES // 2


@dataclass(frozen=True)
class Roster:
    """The parties' public keys, by name.

    Attributes:
        keys: Name -> public key, on the curve P-384.
    """

    keys: Mapping[str, ec.EllipticCurvePublicKey]

    @classmethod
    def read(cls, file: Path) -> Roster:
        """Read a roster file, skipping empty lines and lines that begin with `#`.

        Raises:
            ConfigError: If there is no such file, a line is not a node's public key with a name, or
                a name or key is repeated.
        """
        try:
            text = read_file(file, max_bytes=MAX_ROSTER_BYTES, error=ConfigError).decode()
        except FileNotFoundError as error:
            raise ConfigError(
                f"there is no roster {file}; make it of the parties' public keys: "
                f"fedmomentum keys roster NAME.pub ... --out {file}"
            ) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is no text, and a roster is") from error
        keys: dict[str, ec.EllipticCurvePublicKey] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            place = f"{file}, line {number}"
            # Each name has one key and each key one name, so that nobody takes part twice.
            name, key = _parse_line(line, place)
            if name in keys:
                raise ConfigError(f"{place}: {name} has a key already")
            for other, other_key in keys.items():
                if other_key == key:
                    raise ConfigError(f"{place}: {name} has the key of {other}")
            keys[name] = key
        return cls(keys)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names and keys, for people to compare."""
        parts: list[bytes | str] = []
        for name, key in sorted(self.keys.items()):
            encoded = key.public_bytes(
                serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
            )
            parts += [name, encoded]
        return hashlib.sha256(joined(*parts)).hexdigest()

    def verify(self, party: str, signature: bytes, purpose: str, *parts: bytes | str) -> None:
        """Check a party's signature.

        Raises:
            SecureSumError: If the party is not on the roster, or did not sign these parts.
        """
        if party not in self.keys:
            raise SecureSumError(f"{printable(party, 80)} is not in this party's roster")
        r = int.from_bytes(signature[:_HALF], "big")
        s = int.from_bytes(signature[_HALF:], "big")
        try:
            self.keys[party].verify(
                encode_dss_signature(r, s),
                joined(PROTOCOL, purpose, *parts),
                ec.ECDSA(hashes.SHA384()),
            )
        except InvalidSignature as problem:
            raise SecureSumError(
                f"the {purpose} of {party} was not signed by the key that the roster has for it, "
                "or for another sum"
            ) from problem


def make_parties(names: Iterable[str]) -> tuple[dict[str, ec.EllipticCurvePrivateKey], Roster]:
    """Make keys for parties within one process; return their private keys and the roster."""
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
    return keys, Roster({name: key.public_key() for name, key in keys.items()})


def sign(key: ec.EllipticCurvePrivateKey, purpose: str, *parts: bytes | str) -> bytes:
    """Sign parts for a purpose; unlike the usual encoding, the signature has a fixed length."""
    signature = key.sign(joined(PROTOCOL, purpose, *parts), ec.ECDSA(hashes.SHA384()))
    r, s = decode_dss_signature(signature)
    return r.to_bytes(_HALF, "big") + s.to_bytes(_HALF, "big")


def _parse_line(line: str, place: str) -> tuple[str, ec.EllipticCurvePublicKey]:
    """Return the name and key in a line of a roster."""
    fields = line.split()
    if len(fields) != 3:
        raise ConfigError(
            f"{place}: wanted a public key with the node's name behind it, as in NAME.pub"
        )
    # To OpenSSH, the name is a comment and not part of the key.
    try:
        key = serialization.load_ssh_public_key(" ".join(fields[:2]).encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{place}: no public key: {printable(str(error), 200)}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{place}: not a node's key; make one with: fedmomentum keys node NAME")
    return fields[2], key
