"""The files of a run for people and reports, each as a declared type: plan, partition, ...

All but metrics.jsonl are records with their own checksum (`records`); the rows of metrics are
covered by a hash in every checkpoint. Readers accept unknown fields, so that an older release can
read a newer one's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.formats.manifest import Fingerprint
from fedmomentum.utils.records import parse_record, read_file
from fedmomentum.utils.schema import Count, Fraction, Hash, Seed, check_free_form

DATA = "data.json"
SERVER_LOG = "server.log"
"""The log of the server in a federation over a network."""
RUN_LOG = "run.log"
"""The log of a run on one machine, if it has a live page."""


class _Open(msgspec.Struct, frozen=True, kw_only=True):
    """A table with declared fields; others are ignored."""


# ── metrics.jsonl ──


# ── records ───────────────────────────────────────────────────────────────────────────────────────


class RunRecord(_Open, frozen=True, kw_only=True):
    """A file of a run; `run_id` ties it to the run's checkpoints."""

    sha256: Hash
    run_id: str | None = None


class MemoryFile(_Open, frozen=True, kw_only=True):
    """Bytes of memory in each phase of a run; the fields are those of `plan.MemoryUse`."""

    at_rest: Count
    loading: Count
    training: Count
    evaluating: Count
    aggregating: Count


class WorkerFile(_Open, frozen=True, kw_only=True):
    """A process of `run.devices`; the fields are those of `plan.WorkerPlan`."""

    device: str
    clients: list[str]


class PlanFile(RunRecord, frozen=True, kw_only=True):
    """plan.json: the estimated cost of a run; the fields are those of `plan.Plan`."""

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
    adapted: list[str] = []
    not_adapted: list[str] = []
    warnings: list[str] = []
    optimizer_state: str = "fresh"
    objective: str = ""
    labels: dict[str, Count | None] = {}
    device: str = ""
    host_memory: MemoryFile | None = None
    device_memory: MemoryFile | None = None
    workers: list[WorkerFile] = []
    privacy: str = ""


class PartitionFile(RunRecord, frozen=True, kw_only=True):
    """partition.json: client to `train` and `test`, to category, to number of examples."""

    clients: dict[str, dict[Literal["train", "test"], dict[str, Count]]]


class OriginFile(RunRecord, frozen=True, kw_only=True):
    """data.json: where a run was made, and the fingerprint of each client's data."""

    directory: str
    clients: dict[str, Fingerprint]


class EnvironmentFile(RunRecord, frozen=True, kw_only=True):
    """environment.json: what the last bits of a result depend on."""

    versions: dict[str, str]
    threads: Count
    platform: str = ""
    processor: str = ""
    device: str | None = None
    tf32: bool | None = None
    dtype: str | None = None
    adapted_weights: str | None = None
    attention: str | None = None
    base_sha256: Hash | None = None
    tokenizer_sha256: Hash | None = None
    clients: dict[str, str] = {}


class ReportedFile(RunRecord, frozen=True, kw_only=True):
    """trackers/reported.json: tracker to its last reported round."""

    rounds: dict[str, Annotated[int, Meta(ge=-1, le=2**31)]]


class ComparedCell(_Open, frozen=True, kw_only=True):
    """One method with one seed, and the folders of its runs inside the comparison's."""

    method: str
    kind: Literal["federated", "centralized", "local"]
    seed: Seed
    folders: Annotated[list[str], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Check that all folders are inside the comparison's."""
        for folder in self.folders:
            if Path(folder).is_absolute() or ".." in Path(folder).parts:
                raise ValueError(f"folder {folder[:200]!r} is not inside the comparison's")


class ComparisonHead(_Open, frozen=True, kw_only=True):
    """The fields that decide whether the rest of comparison.json is decoded."""

    format: Any = None
    format_version: Any = None


class ComparisonFile(RunRecord, frozen=True, kw_only=True):
    """comparison.json."""

    format: str
    format_version: int
    baseline: str
    target: Fraction
    command: str | None
    cells: Annotated[list[ComparedCell], Meta(min_length=1)]
    summary: list[Any]


def read_facts(
    path: Path, kind: type[RunRecord], error: type[FedMomentumError] = ModelError
) -> tuple[dict[str, Any], str | None]:
    """Read a record; return its content as plain JSON values, and the run that it belongs to.

    Args:
        path: The file.
        kind: The expected type.
        error: The error to raise.

    Raises:
        FileNotFoundError: If there is no such file.
        FedMomentumError: If it cannot be read, a field is invalid, or it was changed since it was
            written.
    """
    data = read_file(path, error=error)
    record = parse_record(data, kind, str(path), error)
    table: dict[str, Any] = msgspec.json.decode(data)
    check_free_form(table, str(path), error)
    return {
        key: value for key, value in table.items() if key not in ("sha256", "run_id")
    }, record.run_id
