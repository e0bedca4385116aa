"""Which examples a client holds out: remembered while a run lasts, so that no other division goes unnoticed.

A client that starts again with another seed or other data trains on examples that it held out before. Its scores then
measure memory, and nothing in them shows it. So the division that a run began with is kept beside the client's other
files, and a later one is compared with it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from fedmomentum.data.tokens import TokenisedExamples
from fedmomentum.errors import ModelError
from fedmomentum.files import write_json
from fedmomentum.records import checksummed, read_record
from fedmomentum.schema import Count, Hash, Schema, Text

FILE = "split.json"
DIGEST_BYTES = 16


class Split(Schema, frozen=True):
    """The division that a run began with.

    Attributes:
        run_id: Of the run.
        salt: Secret of this client; without it the digests cannot be compared with guessed examples.
        whole: Digest of the whole division.
        held_out: Digests of the examples held out, sorted.
        num_train: How many examples were trained on.
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


def split_fingerprint(train: TokenisedExamples, test: TokenisedExamples, key: str) -> str:
    """Return a hash of how examples are divided; the order within the parts does not count.

    Args:
        train: The examples trained on.
        test: The examples held out.
        key: Without it nobody can tell whether a guess of all the examples is right.
    """
    whole = hmac.new(key.encode(), digestmod=hashlib.sha256)
    for part in (train, test):
        digests = sorted(_digests(part, key))
        whole.update(len(digests).to_bytes(8, "little"))
        whole.update("".join(digests).encode())
    return whole.hexdigest()


def _digests(examples: TokenisedExamples, key: str) -> Iterator[str]:
    """Yield a short hash for every example."""
    for ids, num_prompt_tokens in zip(examples.input_ids, examples.num_prompt_tokens, strict=True):
        content = array("q", [num_prompt_tokens, *ids]).tobytes()
        yield hmac.new(key.encode(), content, hashlib.sha256).hexdigest()[: 2 * DIGEST_BYTES]


def compare_split(
    folder: Path, run_id: str, train: TokenisedExamples, test: TokenisedExamples, *, seed: int
) -> str | None:
    """Compare the division with the one that the run began with, and keep it if this is another run or the first.

    Args:
        folder: Of this client's files.
        run_id: Of the run that the client takes part in.
        train: The examples trained on now.
        test: The examples held out now.
        seed: The configuration's `run.seed` now.

    Returns:
        What is wrong, in words for whoever runs the client; None if nothing is.
    """
    file = folder / FILE
    damage = None
    try:
        began: Split | None = read_record(file, Split)
    except FileNotFoundError:
        began = None
    except ModelError as error:
        began = None
        damage = (
            f"{error}. Whether the examples are divided as before is not known; the division of now is kept instead"
        )
    if began is None or began.run_id != run_id:
        salt = secrets.token_hex(32)
        now = {
            "run_id": run_id,
            "salt": salt,
            "whole": split_fingerprint(train, test, salt),
            "held_out": sorted(_digests(test, salt)),
            "num_train": len(train),
            "seed": seed,
        }
        write_json(file, checksummed(now))
        file.chmod(0o600)
        return damage
    if split_fingerprint(train, test, began.salt) == began.whole:
        return None
    leaked = len(set(began.held_out).intersection(_digests(train, began.salt)))
    why = f" run.seed was {began.seed} and is {seed}." if seed != began.seed else ""
    sizes = f"{began.num_train} examples were trained on and {len(began.held_out)} held out, now {len(train)} and "
    sizes += str(len(test))
    if not leaked:
        return f"the examples differ from those this run began with: {sizes}. None that was held out is trained on now"
    return (
        f"THE EXAMPLES ARE DIVIDED OTHERWISE THAN WHEN THIS RUN BEGAN: {leaked} of {len(began.held_out)} that were "
        f"held out are trained on now, and this client's scores no longer measure what the model has learned.{why} "
        f"({sizes}.) Stop this client and start it with the data and the seed that it had; or, to go on knowingly, "
        f"remove {file}"
    )
