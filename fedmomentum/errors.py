"""The errors a user can cause: what came, what was wanted, what to do.

The command line prints them and exits with 2.
"""

import re
from collections.abc import Mapping


class FedMomentumError(Exception):
    """A mistake in what the user or a client gave us; never a defect of the package."""


class ConfigError(FedMomentumError):
    """A run configuration that cannot be obeyed: an unknown key, a value out of range."""


class DataError(FedMomentumError):
    """A data file, row or partition that cannot be used."""


class AdapterError(FedMomentumError):
    """An adapter that we cannot read, combine or write without changing what it means."""


class ModelError(FedMomentumError):
    """A base model or a global model directory that is missing, different or unreadable."""


class HubError(ModelError):
    """A model hub that does not give, or does not take, what it was asked."""


class FormatError(ModelError):
    """A file of another format or version: it may be intact, but this release does not read it."""


class MissingObject(ModelError):
    """A part of a global model that is not in its directory."""


class DamagedObject(MissingObject):
    """A part of a global model whose file does not match its name; it counts as missing."""


class PayloadError(FedMomentumError):
    """Bytes from the wire that are not what the protocol allows."""


class QuorumError(FedMomentumError):
    """Too few clients answered a round with something usable."""


class LostRoundError(QuorumError):
    """A round of which a sum was opened, and too few clients are left to open the rest.

    Clients open no second sum of a round, so it cannot be made again.

    Args:
        text: What happened.
        failures: Client to why it did not open its part.
    """

    def __init__(self, text: str, failures: Mapping[str, str]) -> None:
        super().__init__(text)
        self.failures = dict(failures)


class SecureSumError(FedMomentumError):
    """A message or a rule of a secure sum that does not hold; nothing was opened for it."""


class PrivacyError(FedMomentumError):
    """A training that a party's privacy ledger does not allow, or a ledger that cannot be used."""


# From a word with a separator to a quote, a bracket or a colon: file names may have blanks and
# commas in them.
_PATH = re.compile(r"(?:[A-Za-z]:)?[^\s'\"(),;:=\[\]]*[/\\][^'\"()\[\]:\n]*")


def public_text(error: Exception) -> str:
    """Return what another machine may learn of an error: no path, and no data.

    Messages about data quote it, and those of other libraries can contain anything, so only the
    kind of these is returned.
    """
    kind = type(error).__name__
    if isinstance(error, FedMomentumError) and not isinstance(error, DataError):
        return f"{kind}: {_PATH.sub('[path]', str(error))}"
    return f"{kind} (its own log says more)"
