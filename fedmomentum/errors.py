"""The errors a user can cause. Each says what came, what was wanted and what to do; the command line exits with 2."""

import re


class FedMomentumError(Exception):
    """A mistake in what the user or a client gave us; never a defect of the package."""


class ConfigError(FedMomentumError):
    """A run configuration that cannot be obeyed: an unknown key, a value out of range."""


class DataError(FedMomentumError):
    """A data file, row or partition that cannot be used."""


class AdapterError(FedMomentumError):
    """An adapter that we cannot read, combine or write without changing what it means."""


class ModelError(FedMomentumError):
    """A base model or a global model folder that is missing, different or unreadable."""


class FormatError(ModelError):
    """A file of another format, or of another version of ours; it may be whole, but this release does not read it."""


class MissingObject(ModelError):
    """A part of a global model that is not in its folder."""


class DamagedObject(MissingObject):
    """A part of a global model whose file does not hold what its name says; it is as good as missing."""


class PayloadError(FedMomentumError):
    """Bytes from the wire that are not what the protocol allows."""


class QuorumError(FedMomentumError):
    """Too few clients answered a round with something usable."""


# From a word with a separator on to a quote, a bracket or a colon: names of files may have blanks and commas in them.
_PATH = re.compile(r"(?:[A-Za-z]:)?[^\s'\"(),;:=\[\]]*[/\\][^'\"()\[\]:\n]*")


def public_text(error: Exception) -> str:
    """What may be said of an error on another machine: no path, and nothing of anybody's data.

    Messages about data quote it, and those of other libraries can hold anything, so of these only the kind is told.
    """
    kind = type(error).__name__
    if isinstance(error, FedMomentumError) and not isinstance(error, DataError):
        return f"{kind}: {_PATH.sub('[path]', str(error))}"
    return f"{kind} (its own log says more)"
