"""The manifest of a global model as a declared type: what a task brings over the wire and what lies on disk.

`Manifest` is what server and client exchange. On disk it is a `ModelFile`: the same fields, the sizes of the objects
that it names, a checksum over all of it and, in a run's checkpoint, the server's state (`RunState`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedmomentum.errors import FedMomentumError, FormatError, ModelError
from fedmomentum.schema import (
    Count,
    Hash,
    Label,
    ModulePath,
    PositiveCount,
    Schema,
    Size,
    Text,
    check_free_form,
    readable,
)

FORMAT = "fedmomentum global model"
FORMAT_VERSION = 3

MAX_RECIPES = 64
MAX_PARTS = 4096
"""Recipes that a client is sent at most, and parts that they name in all. One that is further behind downloads the
snapshot: looking through an endless list would cost it more."""

Scaling = Annotated[float, Meta(gt=0)]
"""`lora_alpha / rank` of a module."""
Round = Annotated[int, Meta(ge=-1, le=2**31)]


class Base(Schema, frozen=True, kw_only=True):
    """Which base model; the fields are those of `identity.BaseIdentity`."""

    name: Text
    revision: Text | None
    sha256: Hash | None
    tokenizer_sha256: Hash | None


class AdapterObjects(Schema, frozen=True, kw_only=True):
    """Hashes of the objects that hold an adapter's factors A, its factors B, and what it trains in full."""

    A: Hash
    B: Hash
    saved: Hash | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The hashes."""
        return tuple(name for name in (self.A, self.B, self.saved) if name is not None)


class Manifest(Schema, frozen=True, kw_only=True):
    """A global model by the hashes of its parts; docs/folder-formats.md describes each field."""

    format: Literal["fedmomentum global model"]
    format_version: Literal[3]
    base: Base
    base_update: tuple[Hash, ...]
    version: Hash
    adapter: AdapterObjects
    adapter_config: dict[str, Any]
    scalings: dict[ModulePath, Scaling]
    carried: Hash | None
    round: Count
    method: Text
    personal: Literal["", "A", "B", "BA"]

    def __post_init__(self) -> None:
        """Check what the types cannot say; msgspec reports a ValueError with the path of the field."""
        try:
            check_free_form(self.adapter_config, "adapter_config")
        except FedMomentumError as problem:
            raise ValueError(str(problem)) from problem

    @property
    def needed(self) -> frozenset[str]:
        """Hashes of the objects that a client needs; what is carried is the server's own."""
        return frozenset((*self.base_update, *self.adapter.names))


class Recipe(Schema, frozen=True, kw_only=True):
    """How a snapshot can be made: of what it continues from, and of the parts since.

    Attributes:
        makes: hash of the snapshot.
        onto: hash of the dense part that is summed first; None where all parts are factors.
        parts: hashes of the others, in order; FRLoRA's start comes in again and again.
        ties: hash of the near ties.
    """

    makes: Hash
    onto: Hash | None
    parts: Annotated[tuple[Hash, ...], Meta(max_length=MAX_PARTS)]
    ties: Hash

    @property
    def summed(self) -> tuple[str, ...]:
        """Hashes of all that is summed, in order."""
        return (self.onto, *self.parts) if self.onto else self.parts

    @property
    def fetched(self) -> set[str]:
        """Hashes of what no other recipe makes."""
        return {*self.parts, self.ties}


class MetricsPrefix(Schema, frozen=True, kw_only=True):
    """The lines of metrics.jsonl that belong to a checkpoint: how many, and the SHA-256 of their bytes."""

    rows: PositiveCount
    sha256: Hash


class Fingerprint(Schema, frozen=True, kw_only=True):
    """Hashes of one client's data: the texts trained on, those held out, and all of them as tokens."""

    train: Hash
    held_out: Hash
    tokens: Hash | None = None


class RunState(Schema, frozen=True, kw_only=True):
    """What a run's checkpoint holds besides the model.

    Attributes:
        run_id: random name of the run on the wire.
        held: client to the hashes of the objects that it has said it holds.
        best_round: the evaluated round with the lowest loss, -1 where there is none.
        best_loss: that loss.
        started_from: hashes of the objects of the adapter that the round started from.
        merged: hashes of what the round merged into the base.
        ranks: with a method that prunes, client to the rank at which it continues.
        recipes: how the last snapshots were made, oldest first.
        splits: client to the hash of how its examples are divided into those trained on and those held out.
        settings: the run's configuration as TOML; config.toml is a copy of it for people.
        metrics: the rows up to this round.
        data: fingerprints of the clients' data, where the process that wrote the run knew it.
    """

    run_id: Label
    held: dict[Text, tuple[Hash, ...]]
    best_round: Round
    best_loss: Size | None
    started_from: tuple[Hash, ...]
    merged: tuple[Hash, ...]
    ranks: dict[Text, PositiveCount]
    recipes: tuple[Recipe, ...]
    splits: dict[Text, Hash]
    settings: str
    metrics: MetricsPrefix
    data: dict[Text, Fingerprint] | None = None

    @property
    def needed(self) -> frozenset[str]:
        """Hashes of the objects from which the next round is measured and snapshots are made again."""
        fetched = (name for recipe in self.recipes for name in recipe.fetched)
        return frozenset((*self.started_from, *self.merged, *fetched))


class ModelFile(Manifest, frozen=True, kw_only=True):
    """A manifest as it lies on disk: global_model.json, or a round of a run.

    Attributes:
        sizes: hash to bytes, of every object that the file names; so a truncated one is found without reading it.
        sha256: over all other fields, see `records.checksum`.
        run: the server's state, in a run's checkpoint.
    """

    sizes: dict[Hash, Count]
    sha256: Hash
    run: RunState | None = None

    def __post_init__(self) -> None:
        """Check that every named object has a size."""
        super().__post_init__()
        named = {*self.needed, *(self.run.needed if self.run else ()), *((self.carried,) if self.carried else ())}
        if self.sizes.keys() != named:
            raise ValueError("sizes must name the objects of the manifest, all of them and no other")


def as_manifest(value: Manifest | Mapping[str, Any], name: str) -> Manifest:
    """Return a manifest that came as plain JSON values as the declared type.

    Args:
        value: the manifest; a `Manifest` is returned as it is.
        name: what to call it in messages.

    Raises:
        ModelError: If it is of another format or version, or a field does not fit.
    """
    if isinstance(value, Manifest):
        return value
    check_format(value.get("format"), value.get("format_version"), name)
    try:
        return msgspec.convert(value, Manifest)
    except (msgspec.ValidationError, RecursionError) as problem:
        raise ModelError(f"{name}: {readable(problem)}") from problem


def check_format(kind: Any, version: Any, name: str) -> None:
    """Refuse another format than ours, or another version of it, before its fields are looked at.

    Raises:
        FormatError: If it is.
    """
    if kind != FORMAT:
        raise FormatError(f"{name} is not a {FORMAT} (its format is {str(kind)[:80]!r})")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(
            f"{name} has format_version {str(version)[:80]}; this fedmomentum reads {FORMAT_VERSION}. Use the "
            "fedmomentum that wrote it, or a newer one"
        )
