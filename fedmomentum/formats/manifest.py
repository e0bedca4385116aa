"""The manifest of a global model as a declared type: on the wire in a task, and on disk.

Server and clients exchange a `Manifest`. On disk it is a `ModelFile`: the same fields, the sizes of
the objects that it names, a checksum over everything and, in a run's checkpoint, the server's state
(`RunState`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedmomentum.errors import FedMomentumError, FormatError, ModelError
from fedmomentum.utils.schema import (
    MAX_LABELS,
    Count,
    Hash,
    Label,
    ModulePath,
    PositiveCount,
    Schema,
    Size,
    Text,
    check_free_form,
    validation_message,
)

FORMAT = "fedmomentum global model"
FORMAT_VERSION = 3

MAX_RECIPES = 64
"""The maximum number of recipes that a client is sent."""
MAX_PARTS = 4096
"""The maximum total number of parts in recipes. A client that is further behind downloads the
snapshot: searching an endless list would cost it more."""

Scaling = Annotated[float, Meta(gt=0)]
"""`lora_alpha / rank` of a module."""
Round = Annotated[int, Meta(ge=-1, le=2**31)]


class Quantization(Schema, frozen=True, kw_only=True):
    """How the stored weights of a base model's linear layers were quantized on loading.

    Attributes:
        kind: The form of a weight: `nf4` and `int8` by bitsandbytes, `torchao-int8` by torchao.
        double: Whether the scales are quantized, too.
        block_size: The number of weights that share a scale; 0 for a whole row.
    """

    kind: Literal["nf4", "int8", "torchao-int8"]
    double: bool
    block_size: Count

    def record(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {"kind": self.kind, "double": self.double, "block_size": self.block_size}

    def __str__(self) -> str:
        scales = f"blocks of {self.block_size}" if self.block_size else "rows"
        return f"{self.kind}{' with double quantization' if self.double else ''} in {scales}"


class Base(Schema, frozen=True, kw_only=True):
    """The base model; the fields are those of `fedmomentum.base_model.identity.BaseIdentity`."""

    name: Text
    revision: Text | None
    sha256: Hash | None
    tokenizer_sha256: Hash | None
    labels: Annotated[tuple[Label, ...], Meta(max_length=MAX_LABELS)] = ()
    quantization: Quantization | None = None


class AdapterObjects(Schema, frozen=True, kw_only=True):
    """Hashes of an adapter's objects: factors A, factors B, and modules trained in full."""

    A: Hash
    B: Hash
    saved: Hash | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The hashes."""
        return tuple(name for name in (self.A, self.B, self.saved) if name is not None)


class Manifest(Schema, frozen=True, kw_only=True):
    """A global model as the hashes of its parts; docs/file-formats.md describes each field."""

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
        """Check what the types cannot express; msgspec adds the field's path to a ValueError."""
        try:
            check_free_form(self.adapter_config, "adapter_config")
        except FedMomentumError as problem:
            raise ValueError(str(problem)) from problem

    @property
    def needed(self) -> frozenset[str]:
        """Hashes of the objects that a client needs; the carried part stays with the server."""
        return frozenset((*self.base_update, *self.adapter.names))


class Recipe(Schema, frozen=True, kw_only=True):
    """How a client rebuilds a snapshot from an earlier one and the parts merged since.

    Attributes:
        makes: Hash of the snapshot.
        onto: Hash of the dense part that is summed first; None if all parts are factors.
        parts: Hashes of the other parts, in order; FRLoRA's start occurs several times.
        ties: Hash of the object with the near ties, elements that may round either way.
    """

    makes: Hash
    onto: Hash | None
    parts: Annotated[tuple[Hash, ...], Meta(max_length=MAX_PARTS)]
    ties: Hash

    @property
    def summed(self) -> tuple[str, ...]:
        """Hashes of everything that is summed, in order."""
        return (self.onto, *self.parts) if self.onto else self.parts

    @property
    def fetched(self) -> set[str]:
        """Hashes of the objects that no other recipe makes."""
        return {*self.parts, self.ties}


class MetricsPrefix(Schema, frozen=True, kw_only=True):
    """The lines of metrics.jsonl that belong to a checkpoint: their number and SHA-256."""

    rows: PositiveCount
    sha256: Hash


class Fingerprint(Schema, frozen=True, kw_only=True):
    """Hashes of one client's data: training texts, held-out texts, and all of them as tokens."""

    train: Hash
    held_out: Hash
    tokens: Hash | None = None


class RoundOutcome(Schema, frozen=True, kw_only=True):
    """The outcome of a committed round for a client whose values are in its first sum.

    Attributes:
        server_round: The round.
        means: Hash of the first sum's outcome (`global_model.mean_changes`).
        in_second_sum: Whether the second sum also includes the client's values.
    """

    server_round: PositiveCount
    means: Hash
    in_second_sum: bool


class RunState(Schema, frozen=True, kw_only=True):
    """The server's state in a run's checkpoint.

    Attributes:
        run_id: Random identifier of the run on the wire.
        held: Client to the hashes of the objects that it reports having cached.
        best_round: The evaluated round with the lowest loss; -1 if there is none.
        best_loss: The loss of that round.
        started_from: Hashes of the objects of the adapter that the round started from.
        merged: Hashes of the objects that the round merged into the base.
        ranks: With a method that prunes, client to the rank at which it continues.
        recipes: How the last snapshots were made, oldest first.
        splits: Client to the hash of how its examples are divided into training and held-out ones.
        moments: Hash of the optimizer moments that the next round starts with; None if there are
            none.
        outcomes: With secure aggregation, client to the outcome of its last sums.
        summed_examples: The number of examples in the last masked sum of updates.
        settings: The run's configuration as TOML; config.toml is a copy of it for people.
        metrics: The rows of metrics.jsonl up to this round.
        data: Fingerprints of the clients' data, if the process that wrote the run knew them.
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
    moments: Hash | None = None
    outcomes: dict[Text, RoundOutcome] = {}
    summed_examples: Count = 0

    @property
    def needed(self) -> frozenset[str]:
        """Hashes of the objects that only the next round needs."""
        fetched = (name for recipe in self.recipes for name in recipe.fetched)
        moments = (self.moments,) if self.moments else ()
        means = (outcome.means for outcome in self.outcomes.values())
        return frozenset((*self.started_from, *self.merged, *fetched, *moments, *means))


class ModelFile(Manifest, frozen=True, kw_only=True):
    """A manifest on disk: global_model.json, or a round of a run.

    Attributes:
        sizes: Hash to size in bytes of every object that the file names, so that a truncated object
            is detected without reading it.
        sha256: Checksum over all other fields; see `fedmomentum.utils.records.checksum`.
        run: The server's state, in a run's checkpoint.
    """

    sizes: dict[Hash, Count]
    sha256: Hash
    run: RunState | None = None

    def __post_init__(self) -> None:
        """Check that every named object has a size."""
        super().__post_init__()
        # The objects that the model needs, and those that only the server needs.
        named = set(self.needed)
        if self.run:
            named |= self.run.needed
        if self.carried:
            named.add(self.carried)
        if self.sizes.keys() != named:
            raise ValueError(
                "sizes must name the objects of the manifest, all of them and no other"
            )


def as_manifest(value: Manifest | Mapping[str, Any], name: str) -> Manifest:
    """Convert a manifest of plain JSON values into the declared type.

    Args:
        value: The manifest; a `Manifest` is returned as it is.
        name: What to call it in messages.

    Raises:
        ModelError: If it has another format or version, or a field is invalid.
    """
    # A manifest received over the wire has already been decoded.
    if isinstance(value, Manifest):
        return value
    check_format(value.get("format"), value.get("format_version"), name)
    try:
        return msgspec.convert(value, Manifest)
    except (msgspec.ValidationError, RecursionError) as problem:
        raise ModelError(f"{name}: {validation_message(problem, value)}") from problem


def check_format(kind: Any, version: Any, name: str) -> None:
    """Refuse any other format or version before its fields are decoded.

    Args:
        kind: The file's field `format`.
        version: The file's field `format_version`.
        name: What to call the file in messages.

    Raises:
        FormatError: If the format or its version differs.
    """
    if kind != FORMAT:
        raise FormatError(f"{name} is not a {FORMAT} (its format is {str(kind)[:80]!r})")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise FormatError(
            f"{name} has format_version {str(version)[:80]}; this fedmomentum reads "
            f"{FORMAT_VERSION}. Use the fedmomentum that wrote it, or a newer one"
        )
