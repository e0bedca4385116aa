"""Hugging Face Hub: tells names from paths, downloads repositories and explains errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmomentum.errors import HubError
from fedmomentum.utils.text import printable

LOGIN = "hf auth login"
"""The login command; a token may also be in HF_TOKEN."""
# Owner and name of a repository; base models from the Hub's early years have no owner.
REPOSITORY = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A repository on the Hub.

    Attributes:
        repository: Its owner and name.
        revision: A branch, tag or commit; None for the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def parse_hub_name(text: Path | str) -> HubName | None:
    """Parse `OWNER/NAME` or `OWNER/NAME@REVISION`; return None for a path.

    Anything that exists on this machine is a path, whatever it looks like.
    """
    name, revision = split_revision(str(text))
    is_name = "/" in name and REPOSITORY.fullmatch(name) is not None
    return HubName(name, revision) if is_name and not os.path.lexists(text) else None


def split_revision(text: str) -> tuple[str, str | None]:
    """Split `NAME@REVISION` of a base model on the Hub; paths and bare names stay whole.

    Returns:
        The name and the revision, or None.
    """
    name, at, revision = text.partition("@")
    is_revision = at and revision and REPOSITORY.fullmatch(name) is not None
    return (name, revision) if is_revision and not os.path.lexists(text) else (text, None)


def is_repository_name(name: str) -> bool:
    """Return whether a text could be a repository name and is not a path on this machine."""
    return REPOSITORY.fullmatch(name) is not None and not os.path.lexists(name)


# ── downloads ─────────────────────────────────────────────────────────────────────────────────────


def download(
    name: HubName, *, allow_patterns: Sequence[str], ignore_patterns: Sequence[str]
) -> Path:
    """Download files of a repository into the Hub cache, except those already there.

    Args:
        name: The repository.
        allow_patterns: The files to download.
        ignore_patterns: The exceptions among these.

    Returns:
        The directory in the cache.

    Raises:
        HubError: If the Hub does not provide them; the message says why and what to do.
    """
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=list(allow_patterns),
            ignore_patterns=list(ignore_patterns),
        )
    except Exception as error:  # the Hub client raises many kinds
        if is_of_this_machine(error):
            raise
        raise HubError(explain(error, name)) from error
    return Path(directory)


def list_files(name: HubName) -> list[str]:
    """Return a repository's files; empty if they cannot be listed."""
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(name.repository, revision=name.revision))
    except Exception:  # only used to improve a message
        return []


def go_offline() -> None:
    """Keep this process and its future children from accessing the Hub from now on."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


# ── errors ────────────────────────────────────────────────────────────────────────────────────────


def is_of_this_machine(error: Exception) -> bool:
    """Return whether an error is local, such as a full disk, rather than the Hub's."""
    from huggingface_hub.errors import HfHubHTTPError

    is_of_network = isinstance(error, (HfHubHTTPError, ConnectionError))
    return isinstance(error, OSError) and error.errno is not None and not is_of_network


def explain(error: Exception, name: HubName) -> str:
    """Explain why a Hub request failed and what to do about it, without revealing the token.

    Args:
        error: The exception raised by the Hub client.
        name: The repository.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{constants.ENDPOINT}/{name.repository}"
    # The client wraps errors in errors; the innermost known one is the most informative.
    for one in _with_causes(error):
        if isinstance(one, OfflineModeIsEnabled):
            return (
                f"the hub's cache on this machine does not hold all of {name}, and HF_HUB_OFFLINE "
                "is set. Unset it; or run, where there is a network, `hf download "
                f"{name.repository}`, and copy the cache"
            )
        if isinstance(one, GatedRepoError):
            return (
                f"{name.repository} is gated: ask for access at {where}, and log in with the "
                f"account that has it ({LOGIN}, or HF_TOKEN)"
            )
        if isinstance(one, RevisionNotFoundError):
            return (
                f"{name.repository} has no revision {name.revision!r}; give a branch, tag or "
                f"commit of {where}"
            )
        if isinstance(one, RepositoryNotFoundError):
            return (
                f"the hub has no repository {name.repository}, or none that this login may see. "
                f"Correct the name; for a private one log in with an account that has access "
                f"({LOGIN}, or HF_TOKEN)"
            )
        if isinstance(one, HfHubHTTPError):
            return _explain_status(one, name)
        if isinstance(one, HFValidationError):
            return f"{printable(str(name), 100)!r} is no name of a repository; wanted OWNER/NAME"
    if _is_network_error(error):
        return (
            f"the hub at {constants.ENDPOINT} cannot be reached ({_text_of(error)}). Check "
            "network and proxy, and try again"
        )
    return f"the hub's client failed: {_text_of(error)}"


def _explain_status(error: Exception, name: HubName) -> str:
    """Explain an error's HTTP status, including the Hub's message."""
    status: int = error.response.status_code  # type: ignore[attr-defined]
    message = without_secrets(getattr(error, "server_message", None) or "")
    reply = f"the hub replied {status}" + (f", {printable(message, 300)!r}" if message else "")
    if status == 401:
        return f"{reply}: the login is not valid. Log in again ({LOGIN}), or correct HF_TOKEN"
    if status == 403:
        return f"{reply}: this login may not do that with {name}. Use a token that may ({LOGIN})"
    if status == 404:
        return f"{reply}: there is no such thing in {name}"
    if status == 429 or status >= 500:
        return f"{reply}: it is overloaded or failing. Try again later"
    return reply


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, innermost first."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    yield from reversed(chain)


def _is_network_error(error: Exception) -> bool:
    """Return whether the Hub was not reached, for any HTTP client that the Hub client may use."""
    for one in _with_causes(error):
        names = {kind.__name__ for kind in type(one).__mro__}
        if isinstance(one, (ConnectionError, TimeoutError)) or "TransportError" in names:
            return True
    return False


def _text_of(error: Exception) -> str:
    text = " ".join(without_secrets(str(error)).split())
    return printable(text, 300) if text else type(error).__name__


def without_secrets(text: str) -> str:
    """Remove the user's token, which a server may have echoed, from a text."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # if the login service fails, there is no token to hide
        token = None
    if token:
        text = text.replace(token, "[token]")
    return re.sub(r"\bhf_\w{4,}|Bearer \S+", "[token]", text)
