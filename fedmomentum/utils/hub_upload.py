"""Uploads a model's directory to the Hugging Face Hub in one commit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.errors import HubError
from fedmomentum.utils.hub import LOGIN, REPOSITORY, HubName, explain, is_of_this_machine
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

# Files that determine how a repository's model and tokenizer load: if an upload does not replace an
# earlier model's version of them, it deletes them.
MODEL_PARTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_model.bin",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "fedmomentum_base.json",
    "tokenizer*.json",
    "tokenizer.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
)


@dataclass(frozen=True)
class Destination:
    """The target of an upload.

    Attributes:
        repository: Owner and name of the repository.
        is_public: Whether it is publicly readable.
        files: The files that it currently holds.
    """

    repository: str
    is_public: bool
    files: tuple[str, ...] = ()


def choose_destination(name: str, *, is_public: bool) -> Destination:
    """Check, before any work is done for an upload, that it can succeed; change nothing.

    Args:
        name: `OWNER/NAME`, or the name of one of the user's own repositories.
        is_public: Whether it should be publicly readable.

    Raises:
        HubError: If the Hub client is offline, nobody is logged in, the login cannot write, or an
            existing repository of this name does not have the requested visibility.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if REPOSITORY.fullmatch(name) is None:
        raise HubError(
            f"--push-to-hub {printable(name, 100)!r}: no name of a repository; wanted OWNER/NAME, "
            "or a NAME of your own, of letters, digits, '-', '_' and '.', and no revision"
        )
    if is_offline_mode():
        raise HubError(
            "--push-to-hub needs a network, and HF_HUB_OFFLINE is set; unset it, or leave out "
            "--push-to-hub"
        )
    try:
        if get_token() is None:
            raise HubError(
                "--push-to-hub needs a login to the hub, and there is none; log in with "
                f"`{LOGIN}`, or put a token that may write into HF_TOKEN"
            )
        account = HfApi().whoami()
        _refuse_reading_token(account)
        repository = name if "/" in name else f"{account['name']}/{name}"
        info = _find(repository)
        destination = Destination(repository, is_public, _files_of(info))
        _check_visibility(destination, info)
    except HubError:
        raise
    except Exception as error:  # the Hub client raises many kinds
        if is_of_this_machine(error):
            raise
        raise HubError(f"--push-to-hub {name}: {explain(error, HubName(name))}") from error
    return destination


def upload(directory: Path, destination: Destination, message: str) -> str:
    """Upload a directory's files, so that the repository holds only this model.

    Files of an earlier model are replaced or deleted; they remain in the repository's history. It
    all happens in one commit, so that nobody downloads a mixture of both.

    Args:
        directory: The directory to upload, without subdirectories.
        destination: The target repository, created if needed.
        message: The commit message.

    Returns:
        The commit's URL.

    Raises:
        HubError: If it failed; the message says how to try again.
    """
    kept = f"What was exported is complete in {directory}"
    try:
        return _upload(directory, destination, message)
    except HubError as error:  # the repository does not have the requested visibility
        raise HubError(f"nothing was uploaded: {error}. {kept}") from error
    except Exception as error:  # the Hub client raises many kinds
        is_own = is_of_this_machine(error)
        reason = str(error) if is_own else explain(error, HubName(destination.repository))
        raise HubError(
            f"the upload to {destination.repository} failed: {reason}. {kept}; upload it later "
            f"with: {_retry_command(directory, destination)}"
        ) from error


def _upload(directory: Path, destination: Destination, message: str) -> str:
    """Create the repository, then upload and delete files in a single commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    repository = destination.repository
    api.create_repo(repository, private=not destination.is_public, exist_ok=True)
    # It may have existed already, or its owner may not allow the requested visibility.
    info = api.model_info(repository)
    _check_visibility(destination, info)
    files = _local_files(directory)
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name in files:
        operations.append(CommitOperationAdd(name, str(directory / name)))
    for name in _outdated(_files_of(info), files):
        operations.append(CommitOperationDelete(name))
    # Based on the revision that was inspected, so that a commit made in between is not undone.
    commit = api.create_commit(
        repository, operations, commit_message=message, parent_commit=info.sha
    )
    return str(commit.commit_url)


def _local_files(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir() if file.is_file())


def _files_of(info: ModelInfo | None) -> tuple[str, ...]:
    siblings = info.siblings if info is not None else None
    return tuple(file.rfilename for file in siblings or [])


def _outdated(there: Sequence[str], files: Sequence[str]) -> list[str]:
    """Return an earlier model's files that the new one does not replace."""
    parts = [name for name in there if any(fnmatch(name, pattern) for pattern in MODEL_PARTS)]
    return sorted(name for name in parts if "/" not in name and name not in files)


def _retry_command(directory: Path, destination: Destination) -> str:
    words = ["hf", "upload", destination.repository, str(directory), "."]
    if not destination.is_public:
        words.append("--private")
    for name in _outdated(destination.files, _local_files(directory)):
        words += ["--delete", name]
    return shlex.join(words)


def _refuse_reading_token(account: dict[str, object]) -> None:
    """Reject a read-only token, if the Hub identifies it as such."""
    auth = account.get("auth")
    access = auth.get("accessToken") if isinstance(auth, dict) else None
    if isinstance(access, dict) and access.get("role") == "read":
        raise HubError(
            "--push-to-hub needs a token that may write, and this login's may only read; make one "
            f"in the hub's settings, and log in with it ({LOGIN}, or HF_TOKEN)"
        )


def _find(repository: str) -> ModelInfo | None:
    """Return the Hub's information about a repository; None if there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return HfApi().model_info(repository)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _check_visibility(destination: Destination, info: ModelInfo | None) -> None:
    """Reject a repository that is public when a private one was requested, or vice versa.

    Raises:
        HubError: If the visibility differs.
    """
    if info is None or bool(info.private) is not destination.is_public:
        return
    if info.private:
        raise HubError(
            f"{destination.repository} is private, and --public was given; leave it out, or change "
            "the repository's visibility in its settings on the hub"
        )
    raise HubError(
        f"{destination.repository} is public: everybody could read the model. Give --public if "
        "that is meant, else another name"
    )
