"""The train/test split of a client, remembered for the duration of a run.

A client that restarts with a different seed or different data would train on examples that it held
out before. Its scores would then measure memorization without showing it. So the split that a run
began with is stored with the client's other files, and later ones are compared with it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from fedmomentum.errors import ModelError
from fedmomentum.utils.io import json_bytes, write_atomically
from fedmomentum.utils.records import read_record, with_checksum
from fedmomentum.utils.schema import Count, Hash, Schema, Text

if TYPE_CHECKING:
    from fedmomentum.data.tokenized import TokenizedExamples


FILE = "split.json"
# 128 bits: no two examples of any data set share a digest by accident.
DIGEST_BYTES = 16
SALT_BYTES = 32


class Split(Schema, frozen=True):
    """The split that a run began with.

    Attributes:
        run_id: The run.
        salt: A secret of this client, which prevents others from checking guessed examples
            against the digests.
        whole: Digest of the entire split.
        held_out: Digests of the held-out examples, sorted.
        num_train: Number of training examples.
        seed: The configuration's `run.seed`.
        sha256: Checksum of the file.
    """

    run_id: Text
    salt: Hash
    whole: Hash
    held_out: list[Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]]
    num_train: Count
    seed: int
    sha256: Hash


def split_fingerprint(train: TokenizedExamples, test: TokenizedExamples, key: str) -> str:
    """Return a hash of a split; the order of examples within each part does not matter.

    Args:
        train: The training examples.
        test: The held-out examples.
        key: A secret, without which a guess of all examples cannot be confirmed.
    """
    fingerprint = hmac.new(key.encode(), digestmod=hashlib.sha256)
    for part in (train, test):
        digests = sorted(_digests(part, key))
        fingerprint.update(len(digests).to_bytes(8, "little"))
        fingerprint.update("".join(digests).encode())
    return fingerprint.hexdigest()


def _digests(examples: TokenizedExamples, key: str) -> Iterator[str]:
    """Yield a short hash of every example."""
    for index in range(len(examples)):
        example = examples.example(index)
        numbers = [example.num_prompt_tokens, *example.input_ids]
        # Optional parts are marked by numbers that are not token ids.
        for start, end in example.gaps:
            numbers += [-1, start, end]
        if example.rejected_ids:
            numbers += [-2, *example.rejected_ids]
        content = array("q", numbers).tobytes()
        digest = hmac.new(key.encode(), content, hashlib.sha256).hexdigest()
        yield digest[: 2 * DIGEST_BYTES]


def compare_split(
    directory: Path, run_id: str, train: TokenizedExamples, test: TokenizedExamples, *, seed: int
) -> str | None:
    """Compare a client's split with the one that the run began with.

    If the run is new, the split is stored instead.

    Args:
        directory: The directory of this client's files.
        run_id: The run that the client takes part in.
        train: The current training examples.
        test: The current held-out examples.
        seed: The configuration's current `run.seed`.

    Returns:
        A warning for the person who runs the client, or None if nothing is wrong.
    """
    file = directory / FILE
    original: Split | None = None
    damage = None
    try:
        original = read_record(file, Split)
    except FileNotFoundError:
        pass
    except ModelError as error:
        damage = (
            f"{error}. Whether the examples are divided as before is not known; the division of "
            "now is kept instead"
        )
    if original is None or original.run_id != run_id:
        _store_split(file, run_id, train, test, seed)
        return damage
    if split_fingerprint(train, test, original.salt) == original.whole:
        return None
    return _describe_change(file, original, train, test, seed)


def _store_split(
    file: Path, run_id: str, train: TokenizedExamples, test: TokenizedExamples, seed: int
) -> None:
    """Store the split in a file that only this user can read."""
    salt = secrets.token_hex(SALT_BYTES)
    table = {
        "run_id": run_id,
        "salt": salt,
        "whole": split_fingerprint(train, test, salt),
        "held_out": sorted(_digests(test, salt)),
        "num_train": len(train),
        "seed": seed,
    }
    write_atomically(file, json_bytes(with_checksum(table)), permissions=0o600)


def _describe_change(
    file: Path, original: Split, train: TokenizedExamples, test: TokenizedExamples, seed: int
) -> str:
    """Explain what a split that differs from the original means for the client's scores."""
    # The examples themselves are not stored, only their digests.
    num_leaked = len(set(original.held_out).intersection(_digests(train, original.salt)))
    sizes = (
        f"{original.num_train} examples were trained on and {len(original.held_out)} held out, now "
        f"{len(train)} and {len(test)}"
    )
    if not num_leaked:
        return (
            f"the examples differ from those this run began with: {sizes}. None that was held out "
            "is trained on now"
        )
    reason = ""
    if seed != original.seed:
        reason = f" run.seed was {original.seed} and is {seed}."
    return (
        f"THE EXAMPLES ARE DIVIDED OTHERWISE THAN WHEN THIS RUN BEGAN: {num_leaked} of "
        f"{len(original.held_out)} that were held out are trained on now, and this client's scores "
        f"no longer measure what the model has learned.{reason} ({sizes}.) Stop this client and "
        f"start it with the data and the seed that it had; or, to continue anyway, remove {file}"
    )
