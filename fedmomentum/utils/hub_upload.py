"""Upload a model's directory to the Hugging Face hub, in one commit."""

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

# What decides which model a repository loads as, and with which tokens: where an upload does not
# replace these files of an earlier model, it deletes them.
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
    """Where a model is uploaded to.

    Attributes:
        repository: Owner and name of the repository.
        is_public: Whether everybody may read it.
        files: The files that it holds now.
    """

    repository: str
    is_public: bool
    files: tuple[str, ...] = ()


def choose_destination(name: str, *, is_public: bool) -> Destination:
    """Find out whether an upload can succeed, before the work for it begins; nothing is changed.

    Args:
        name: `OWNER/NAME`, or the name of a repository of the user's own.
        is_public: Whether everybody shall be able to read it.

    Raises:
        HubError: If the hub's client is offline, nobody is logged in, the login cannot write, or
            there is a repository of this name that is not as public, or as private, as asked.
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
    except Exception as error:  # the hub's client raises many kinds
        if is_of_this_machine(error):
            raise
        raise HubError(f"--push-to-hub {name}: {explain(error, HubName(name))}") from error
    return destination


def upload(directory: Path, destination: Destination, message: str) -> str:
    """Upload the files of a directory, so that the repository holds this model and no other.

    Files of a model that was there before are replaced or deleted; they stay in the repository's
    history. All of it is one commit: nobody downloads one half of each.

    Args:
        directory: What is uploaded; there are no directories in it.
        destination: Where to; created if it is not there.
        message: The commit's message.

    Returns:
        The commit's address.

    Raises:
        HubError: If it failed; the message says how to try again.
    """
    kept = f"What was exported is complete in {directory}"
    try:
        return _upload(directory, destination, message)
    except HubError as error:  # the repository is not as private as asked for, or not as public
        raise HubError(f"nothing was uploaded: {error}. {kept}") from error
    except Exception as error:  # the hub's client raises many kinds
        is_own = is_of_this_machine(error)
        reason = str(error) if is_own else explain(error, HubName(destination.repository))
        raise HubError(
            f"the upload to {destination.repository} failed: {reason}. {kept}; upload it later "
            f"with: {_retry_command(directory, destination)}"
        ) from error


def _upload(directory: Path, destination: Destination, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    repository = destination.repository
    api.create_repo(repository, private=not destination.is_public, exist_ok=True)
    # It may have been there, or its owner may not allow what was asked for.
    info = api.model_info(repository)
    _check_visibility(destination, info)
    files = _local_files(directory)
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for name in files:
        operations.append(CommitOperationAdd(name, str(directory / name)))
    for name in _outdated(_files_of(info), files):
        operations.append(CommitOperationDelete(name))
    # Based on what was looked at: a commit made in between is not undone.
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
    """Return the files of an earlier model that a new one does not replace."""
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
    """Refuse a token that is for reading only, as far as the hub says so."""
    auth = account.get("auth")
    access = auth.get("accessToken") if isinstance(auth, dict) else None
    if isinstance(access, dict) and access.get("role") == "read":
        raise HubError(
            "--push-to-hub needs a token that may write, and this login's may only read; make one "
            f"in the hub's settings, and log in with it ({LOGIN}, or HF_TOKEN)"
        )


def _find(repository: str) -> ModelInfo | None:
    """Return what the hub says of a repository; None if there is none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return HfApi().model_info(repository)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _check_visibility(destination: Destination, info: ModelInfo | None) -> None:
    """Refuse a repository that is public where a private one was asked for, or the other way.

    Raises:
        HubError: If it is.
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
