"""Errors that users can cause; messages say what was received, what was expected and what to do.

The command line prints them and exits with code 2.
"""

import re
from collections.abc import Mapping


class FedMomentumError(Exception):
    """A mistake in the input from a user or client, never a bug in the package."""


class ConfigError(FedMomentumError):
    """An invalid run configuration, such as an unknown key or a value out of range."""


class DataError(FedMomentumError):
    """A data file, row or partition that cannot be used."""


class AdapterError(FedMomentumError):
    """An adapter that cannot be read, combined or written without changing its meaning."""


class ModelError(FedMomentumError):
    """A base model or global model directory that is missing, different or unreadable."""


class HubError(ModelError):
    """A failed download from or upload to a model hub."""


class FormatError(ModelError):
    """A file with another format or version, possibly intact, that this release cannot read."""


class MissingObject(ModelError):
    """A part of a global model that is missing from its directory."""


class DamagedObject(MissingObject):
    """A part of a global model whose file does not match its name, and which counts as missing."""


class PayloadError(FedMomentumError):
    """Received bytes that violate the protocol."""


class QuorumError(FedMomentumError):
    """Too few usable answers from clients in a round."""


class LostRoundError(QuorumError):
    """A round in which a sum was opened, but too few clients are left to open the rest.

    Clients do not open a round's sums a second time, so the round cannot be repeated.

    Args:
        text: What happened.
        failures: Client -> why it did not open its part.
        uplink_bytes: Client -> bytes that it sent in the round.
        downlink_bytes: Client -> bytes that it was sent.
    """

    def __init__(
        self,
        text: str,
        failures: Mapping[str, str],
        uplink_bytes: Mapping[str, int] | None = None,
        downlink_bytes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(text)
        self.failures = dict(failures)
        self.uplink_bytes = dict(uplink_bytes or {})
        self.downlink_bytes = dict(downlink_bytes or {})


class SecureSumError(FedMomentumError):
    """An invalid message or broken rule in a secure sum, for which nothing was opened."""


class PrivacyError(FedMomentumError):
    """A training that a party's privacy ledger forbids, or an unusable ledger."""


def failure_text(error: BaseException) -> str:
    """Return an error's type and message, and where it arose if that was noted, on one machine."""
    notes = [f"({note})" for note in getattr(error, "__notes__", [])]
    return " ".join([f"{type(error).__name__}: {error}", *notes])


# From a word with a path separator up to a quote, a bracket or a colon: file names may contain
# spaces and commas.
_PATH = re.compile(r"(?:[A-Za-z]:)?[^\s'\"(),;:=\[\]]*[/\\][^'\"()\[\]:\n]*")


def public_text(error: Exception) -> str:
    """Return what another machine may learn about an error: neither paths nor data.

    Messages about data quote it, and those of other libraries can contain anything, so only the
    type of such errors is returned.
    """
    kind = type(error).__name__
    if isinstance(error, FedMomentumError) and not isinstance(error, DataError):
        return f"{kind}: {_PATH.sub('[path]', str(error))}"
    return f"{kind} (its own log says more)"
