"""The additional parts of a run with secure aggregation: clients' keys, and the server's steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fedmomentum.client.secure_work import SecureParty
from fedmomentum.secure_sum.journal import PartyJournal
from fedmomentum.secure_sum.party import Identity
from fedmomentum.secure_sum.roster import Roster, make_parties
from fedmomentum.server.kept_sums import KeptSums
from fedmomentum.server.round_steps import RoundSteps
from fedmomentum.utils.names import directory_name

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.client.client import Client
    from fedmomentum.config.schema import Config
    from fedmomentum.protocol.transport import Transport


@contextmanager
def parties_of_this_process(config: Config, clients: Sequence[Client]) -> Iterator[Roster | None]:
    """Have the clients of this process take part in secure sums, with keys made for this run only.

    They end with this process, so an interrupted round is simply repeated by parties with new keys.
    Its sums are bit-identical.

    Args:
        config: The run's settings.
        clients: The clients.

    Yields:
        The roster of their public keys; None in a run without secure aggregation.
    """
    if not config.privacy.secure_aggregation:
        yield None
        return
    keys, roster = make_parties(client.client_id for client in clients)
    with TemporaryDirectory() as directory:
        for client in clients:
            name = client.client_id
            identity = Identity(
                name, keys[name], roster, trusts_server=config.privacy.trusts_server
            )
            journal = PartyJournal(Path(directory) / directory_name(name))
            client.party = SecureParty(identity, journal)
        yield roster


def secure_steps(
    transport: Transport,
    config: Config,
    method: Method,
    roster: Roster,
    kept: KeptSums | None = None,
) -> RoundSteps:
    """Return the steps of rounds whose updates are summed under masks.

    Args:
        transport: Reaches the clients.
        config: The run's settings.
        method: Combines the stand-ins for the clients' updates.
        roster: The public keys that the server has for the clients.
        kept: Stores the replies of sums; needed if clients outlive this process.
    """
    # Imported only by runs with secure sums.
    from fedmomentum.server.secure_round import SecureRounds

    secure = SecureRounds(transport, roster, method=method, config=config, kept=kept)
    return RoundSteps(screening=False, diagnostics=False, secure=secure)
