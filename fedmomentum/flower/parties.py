"""The parties of secure sums over a network: a node's identity, and the roster.

Nodes sign with the key by which the server admitted them. A node accepts other parties according to
a roster that its site obtained from the other sites. The server's own roster, of the nodes that it
has admitted, only lets it know early which clients the others would refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedmomentum.client.secure_work import SecureParty
from fedmomentum.errors import ConfigError
from fedmomentum.flower.keys import admitted_keys, load_private_key
from fedmomentum.secure_sum.journal import PartyJournal
from fedmomentum.secure_sum.messages import MAX_PARTIES, MIN_PARTIES, min_threshold
from fedmomentum.secure_sum.party import Identity
from fedmomentum.secure_sum.roster import Roster
from fedmomentum.server.selection import sample_size
from fedmomentum.utils.io import write_atomically

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config

JOURNAL = "opened-sums.json"
"""The file in a node's store that records which sums it has opened."""


def node_identity(config: Config, name: str, key: Path) -> Identity | None:
    """Return a node's identity in secure sums; None if it does not take part in any.

    The server chooses the parties of each sum, and could choose a different few each time. So a
    node only takes part in sums whose threshold is at least what a round with its whole roster
    would need, or its own `privacy.threshold` if set.

    Args:
        config: The node's settings.
        name: The node's name.
        key: The file of its private key.

    Raises:
        ConfigError: If there is no roster, or it cannot be read, has too few parties, or does not
            list this node with this key.
    """
    privacy = config.privacy
    if not privacy.secure_aggregation:
        return None
    if privacy.roster is None:
        raise ConfigError(
            "privacy.roster is missing: with privacy.secure-aggregation a node accepts only those "
            "whose public keys its site has from them. Collect the sites' NAME.pub, not by way of "
            "the server, and make the file with: fedmomentum keys roster NAME.pub..."
        )
    # The roster must have enough parties, including this node with its own key.
    roster = Roster.read(Path(privacy.roster))
    if len(roster.keys) < MIN_PARTIES:
        raise ConfigError(
            f"{privacy.roster} has {len(roster.keys)} parties, and a secure sum needs at least "
            f"{MIN_PARTIES}"
        )
    # How many parties must open a sum, whatever the server says.
    num_sampled = sample_size(len(roster.keys), config.federation.client_fraction)
    least = min_threshold(num_sampled, trusts_server=privacy.trusts_server)
    private_key = load_private_key(key)
    try:
        return Identity(
            name,
            private_key,
            roster,
            trusts_server=privacy.trusts_server,
            least_threshold=privacy.threshold or least,
        )
    except ConfigError as error:
        raise ConfigError(
            f"{privacy.roster} does not have {name} with the public key of {key}; the other "
            "parties would refuse this node. Does the roster hold this node's own NAME.pub?"
        ) from error


def node_party(config: Config, name: str, key: Path, store: Path) -> SecureParty | None:
    """Return a node's party in secure sums; None if it does not take part in any.

    Args:
        config: The node's settings.
        name: The node's name.
        key: The file of its private key.
        store: The node's directory, which remembers what was opened.

    Raises:
        ConfigError: See `node_identity`.
    """
    identity = node_identity(config, name, key)
    if identity is None:
        return None
    return SecureParty(identity, PartyJournal(store / JOURNAL))


def server_roster(directory: Path) -> Roster:
    """Return the roster of the nodes that a server has admitted.

    Args:
        directory: The server's keys.
    """
    keys = {}
    for name, pem in admitted_keys(directory).items():
        key = serialization.load_pem_public_key(pem)
        assert isinstance(key, ec.EllipticCurvePublicKey)  # guaranteed by `load_public_key`
        keys[name] = key
    return Roster(keys)


def make_roster(public_files: list[Path], out: Path | None) -> Roster:
    """Combine public keys into a roster, sorted by name, so that all sites have equal files.

    Args:
        public_files: `NAME.pub` files or rosters.
        out: The file to write; None to write nothing.

    Raises:
        ConfigError: If a file is not a node's public key, a name or key is repeated, there are too
            few or too many, or `out` exists.
    """
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    places: dict[str, Path] = {}
    for file in public_files:
        for name, key in Roster.read(file).keys.items():
            # The same line in two files is not a contradiction, but still the caller's mistake.
            if name in keys:
                raise ConfigError(f"{file}: {name} is in {places[name]} already")
            for other, other_key in keys.items():
                if other_key == key:
                    raise ConfigError(
                        f"{file}: {name} has the key of {other}, in {places[other]}; one of the "
                        "two files is not what its name says"
                    )
            keys[name] = key
            places[name] = file
    # Sorted, so that all sites write the same bytes.
    if not MIN_PARTIES <= len(keys) <= MAX_PARTIES:
        raise ConfigError(
            f"a secure sum has {MIN_PARTIES} to {MAX_PARTIES} parties; these are {len(keys)}"
        )
    if out is not None:
        if out.exists():
            raise ConfigError(f"{out} exists already; to replace it, remove it first")
        lines = [_public_line(name, key) for name, key in sorted(keys.items())]
        write_atomically(out, b"".join(lines))
    return Roster(dict(sorted(keys.items())))


def _public_line(name: str, key: ec.EllipticCurvePublicKey) -> bytes:
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return text + b" " + name.encode() + b"\n"


def spoken_fingerprint(roster: Roster) -> str:
    """Return a roster's fingerprint in groups of four, for people to read out to one another."""
    digits = roster.fingerprint()
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))
