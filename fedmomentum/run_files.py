"""The files that a run leaves for people and for its report, each as a declared type: metrics, plan, partition, ...

All but metrics.jsonl are records with a checksum of their own (`records`); the rows of metrics are covered by a hash
in every checkpoint. A reader takes fields that it does not know, so that an older release reads a newer one's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedmomentum.errors import DataError, FedMomentumError, ModelError
from fedmomentum.manifest import Fingerprint, MetricsPrefix
from fedmomentum.records import MAX_JSON_BYTES, parse_record, read_file
from fedmomentum.schema import Count, Fraction, Hash, Seed, check_free_form, parse_json

METRICS = "metrics.jsonl"
DATA = "data.json"


class _Open(msgspec.Struct, frozen=True, kw_only=True):
    """A table with declared fields; others are ignored."""


# ── metrics.jsonl ────────────────────────────────────────────────────────────────────────────────────────────────


LARGEST = 1e300
"""Larger numbers overflow as soon as something is done with them, be it drawing a curve."""
Number = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Amount = Annotated[float, Meta(ge=0, le=LARGEST)]


class Score(_Open, frozen=True, kw_only=True):
    """A score on held-out examples."""

    nll: Amount
    num_tokens: Count
    num_examples: Count
    num_exact: Count
    loss: Amount | None
    perplexity: Amount | None
    exact_match: Fraction | None

    def __post_init__(self) -> None:
        """Check that the numbers fit each other."""
        if self.num_exact > self.num_examples:
            raise ValueError(f"{self.num_exact} exact answers of {self.num_examples} examples")
        if self.num_examples and (self.loss is None or self.exact_match is None):
            raise ValueError("a score over examples needs loss and exact_match")


class Evaluation(_Open, frozen=True, kw_only=True):
    """The scores of a round."""

    total: Score
    compared: Score | None = None
    by_client: dict[str, Score] = {}
    by_category: dict[str, Score] = {}


class ClientTraining(_Open, frozen=True, kw_only=True):
    """What one client's training in a round came to."""

    loss: Number
    first_loss: Number
    last_loss: Number
    rank: Count | None = None
    rounding: Amount | None = None
    num_steps: Count | None = None
    num_tokens: Count | None = None


class Cosines(_Open, frozen=True, kw_only=True):
    """A cosine over the clients."""

    min: Number | None = None
    mean: Number | None = None
    max: Number | None = None


class Sides(_Open, frozen=True, kw_only=True):
    """A number for each of the two factors."""

    A: Number | None = None
    B: Number | None = None


class FactorNorms(_Open, frozen=True, kw_only=True):
    """The factors' norms before and after the aggregation."""

    before: Sides | None = None
    after: Sides | None = None


class Diagnostics(_Open, frozen=True, kw_only=True):
    """How a round moved the model."""

    update_norm: Amount | None = None
    update_cosine: Number | None = None
    client_cosine: Cosines | None = None
    client_drift: Amount | None = None
    subspace_angle: Sides | None = None
    factor_norms: FactorNorms | None = None


class Row(_Open, frozen=True, kw_only=True):
    """A row of metrics.jsonl; docs/metrics.md describes each field."""

    round: Annotated[int, Meta(ge=0, le=2**31)]
    participants: list[str] = []
    accepted: list[str] = []
    failures: dict[str, str] = {}
    weights: dict[str, Fraction] = {}
    num_examples: dict[str, Count] = {}
    learning_rate: Amount | None = None
    train_loss: Number | None = None
    clients: dict[str, ClientTraining] = {}
    evaluation: Evaluation | None = None
    retained_energy: Number | None = None
    residual_rank: Amount | None = None
    residual_norm: Amount | None = None
    carried_norm: Amount | None = None
    fallbacks: Amount | None = None
    exactness_error: Amount | None = None
    applied_share: Number | None = None
    uplink_rounding: Amount | None = None
    downlink_rounding: Amount | None = None
    diagnostics: Diagnostics | None = None
    is_best: bool = False
    version: str | None = None
    uplink_bytes: dict[str, Count] = {}
    downlink_bytes: dict[str, Count] = {}
    seconds: dict[str, Amount | None] = {}


def encode_row(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of metrics.jsonl.

    Raises:
        ModelError: If it holds a number that is not finite, or a field of another type than declared.
    """
    name = f"the metrics of round {row.get('round')}"
    try:
        text = json.dumps(row, allow_nan=False)
        if "\\ud" in text:  # half a surrogate pair, from somebody's data, is no text for a strict reader
            text = json.dumps(_without_surrogates(row), allow_nan=False)
        line = text.encode() + b"\n"
    except ValueError as problem:
        raise ModelError(f"{name} hold a number that is not finite: {problem}") from problem
    parse_row(line, name, ModelError)
    return line


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, (list, tuple)):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, Mapping):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def parse_row(line: bytes | str, name: str, error: type[FedMomentumError] = DataError) -> dict[str, Any]:
    """Check a line of metrics.jsonl against `Row`, and return it as plain JSON values.

    Args:
        line: the line.
        name: what to call it in messages.
        error: the error to raise.

    Raises:
        FedMomentumError: If it does not fit; the message names the field.
    """
    parse_json(line, Row, name, error)
    row = parse_json(line, dict[str, Any], name, error)
    check_free_form(row, name, error)
    return row


def read_metrics(path: Path, error: type[FedMomentumError] = DataError) -> list[bytes]:
    """Return the complete lines of metrics.jsonl, newlines included; what follows the last newline is being written.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it cannot be read.
    """
    lines = read_file(path, max_bytes=4 * MAX_JSON_BYTES, error=error).split(b"\n")
    return [line + b"\n" for line in lines[:-1]]


def metrics_prefix(lines: Sequence[bytes]) -> MetricsPrefix:
    """Return what a checkpoint records of these lines."""
    return MetricsPrefix(rows=len(lines), sha256=hashlib.sha256(b"".join(lines)).hexdigest())


def check_metrics(
    lines: Sequence[bytes], wanted: MetricsPrefix, path: Path, error: type[FedMomentumError] = ModelError
) -> None:
    """Refuse lines that are not those which a checkpoint was committed with; rows after them are not its business.

    Raises:
        FedMomentumError: If a row is missing, or one was altered.
    """
    if len(lines) < wanted.rows:
        raise error(f"{path} has {len(lines)} rows, and {wanted.rows} were committed; rows are missing")
    if metrics_prefix(lines[: wanted.rows]) != wanted:
        raise error(f"{path} was damaged or altered: its first {wanted.rows} rows are not those that were committed")


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _RunRecord(_Open, frozen=True, kw_only=True):
    """A file of a run; `run_id` ties it to the run's checkpoints."""

    sha256: Hash
    run_id: str | None = None


class PlanFile(_RunRecord, frozen=True, kw_only=True):
    """plan.json: what a run was estimated to cost; the fields are those of `run.Plan`."""

    model: str
    num_parameters: Count
    num_trained: Count
    num_clients: Count
    num_rounds: Count
    method: str
    uplink_bytes: Count
    downlink_bytes: Count
    memory_bytes: Count
    disk_bytes: Count
    warnings: list[str] = []


class PartitionFile(_RunRecord, frozen=True, kw_only=True):
    """partition.json: client to `train` and `test`, to category, to number of examples."""

    clients: dict[str, dict[Literal["train", "test"], dict[str, Count]]]


class OriginFile(_RunRecord, frozen=True, kw_only=True):
    """data.json: where a run was made, and the fingerprint of each client's data."""

    directory: str
    clients: dict[str, Fingerprint]


class EnvironmentFile(_RunRecord, frozen=True, kw_only=True):
    """environment.json: what the last bits of a result depend on."""

    versions: dict[str, str]
    threads: Count
    platform: str = ""
    processor: str = ""
    device: str | None = None
    dtype: str | None = None
    base_sha256: Hash | None = None
    tokenizer_sha256: Hash | None = None
    clients: dict[str, str] = {}


class ReportedFile(_RunRecord, frozen=True, kw_only=True):
    """trackers/reported.json: tracker to the last round that it was told of."""

    rounds: dict[str, Annotated[int, Meta(ge=-1, le=2**31)]]


class ClientStatus(_Open, frozen=True, kw_only=True):
    """What a served run knows of one client."""

    connected: bool
    state: Literal["idle", "asked", "answered", "failed"]
    until: float | None
    reason: str | None
    rounds: Count
    up_bytes: Count
    down_bytes: Count


class StatusFile(_RunRecord, frozen=True, kw_only=True):
    """status.json of a served run."""

    phase: Literal["waiting", "training", "evaluating", "aggregating", "ended"]
    round: Count | None
    num_rounds: Count
    version: str | None
    waiting_for: list[str]
    waits_until: float | None
    clients: dict[str, ClientStatus]
    written: float


class ComparedCell(_Open, frozen=True, kw_only=True):
    """One method with one seed, and the folders of its runs within the comparison's."""

    method: str
    kind: Literal["federated", "centralised", "local"]
    seed: Seed
    folders: Annotated[list[str], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Check that no folder leads out of the comparison's."""
        for folder in self.folders:
            if Path(folder).is_absolute() or ".." in Path(folder).parts:
                raise ValueError(f"folder {folder[:200]!r} is not inside the comparison's")


class ComparisonHead(_Open, frozen=True, kw_only=True):
    """What decides whether the rest of comparison.json is looked at."""

    format: Any = None
    format_version: Any = None


class ComparisonFile(_RunRecord, frozen=True, kw_only=True):
    """comparison.json."""

    format: str
    format_version: int
    baseline: str
    target: Fraction
    command: str | None
    cells: Annotated[list[ComparedCell], Meta(min_length=1)]
    summary: list[Any]


def read_facts(
    path: Path, kind: type[_RunRecord], error: type[FedMomentumError] = ModelError
) -> tuple[dict[str, Any], str | None]:
    """Read a record, and return its content as plain JSON values and the run that it belongs to.

    Args:
        path: the file.
        kind: what it must be.
        error: the error to raise.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it cannot be read, a field does not fit, or it was changed since it was written.
    """
    data = read_file(path, error=error)
    record = parse_record(data, kind, str(path), error)
    table: dict[str, Any] = msgspec.json.decode(data)
    check_free_form(table, str(path), error)
    return {key: value for key, value in table.items() if key not in ("sha256", "run_id")}, record.run_id
