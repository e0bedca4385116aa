"""A first configuration, with comments, generated from a user's files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmomentum.config.data import DataConfig
from fedmomentum.config.schema import CLASSIFICATION
from fedmomentum.config.toml_values import format_value
from fedmomentum.data.rows import file_ending
from fedmomentum.errors import ConfigError
from fedmomentum.utils.names import check_client_name
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.run.data_report import DataReport

LENGTH_STEP = 64
"""`data.max-length` is a multiple of this."""
MAX_LENGTH = 2048
"""Longer examples must be requested explicitly, because their cost grows quadratically."""
MAX_STEPS = 50
BATCH_SIZE = 8
HELD_OUT = 0.1
NUM_CLIENTS = 4
MIN_ROWS = DataConfig().min_examples
"""A simulated client has at least as many rows, unless the source has fewer."""


def starter_config(reports: Sequence[DataReport], settings: Config, out: Path) -> str:
    """Return a configuration for files, as commented TOML.

    Args:
        reports: Reports on the files; a single one is a source for all clients, otherwise each
            client has one.
        settings: Model, task, columns and encoding.
        out: Where the configuration will be written; paths are relative to its directory.

    Raises:
        ConfigError: If the files' names do not tell clients apart, or their formats differ.
    """
    kinds = {report.kind for report in reports}
    if len(kinds) > 1:
        listed = ", ".join(f"{report.source}: {report.kind}" for report in reports)
        raise ConfigError(f"the files are of different formats ({listed}); one run takes one")
    lines = [
        "# Made by `fedmomentum init`. Every key: docs/configuration.md",
        f"# Look at the data:  fedmomentum data --config {out.name}",
        f"# What it will cost: fedmomentum run {out.name} --plan",
        "",
        *_model_lines(settings),
        *_data_lines(reports, settings, out),
        *_training_lines(reports, settings),
        "[federation]",
        "num-rounds = 5  # each: all clients train, the server combines exactly, all evaluate",
        "",
    ]
    return "\n".join(lines)


def _model_lines(settings: Config) -> list[str]:
    """Return the section [model]."""
    lines = ["[model]"]
    name = format_value(settings.model.name)
    lines.append(f"name = {name}  # or a model directory, or a name on the Hugging Face hub")
    if settings.model.revision is not None:
        lines.append(f"revision = {format_value(settings.model.revision)}")
    if settings.model.task == CLASSIFICATION:
        lines.append(f"task = {format_value(CLASSIFICATION)}  # docs/classification.md")
    return [*lines, ""]


def _data_lines(reports: Sequence[DataReport], settings: Config, out: Path) -> list[str]:
    """Return the section [data]."""
    first = reports[0]
    lines = ["[data]"]
    for report in reports:
        lengths = report.percentiles
        lines.append(
            f"# {printable(report.source, 200)}: {report.num_rows:,} rows, {report.kind}; half "
            f"have at most {lengths[50]:,} tokens, the longest {lengths[100]:,}"
        )
    if first.ignored:
        lines.append(f"# columns that are not read: {printable(', '.join(first.ignored), 200)}")
    if settings.data.encoding != "auto":
        lines.append(f"encoding = {format_value(settings.data.encoding)}")
    lines.append(f"max-length = {_max_length(reports)}  # tokens; what is longer is cut")
    lines.append(f"test-fraction = {HELD_OUT}  # of each client's rows, held out for evaluation")
    files: Mapping[str, str] = {}
    if len(reports) == 1:
        lines += _source_lines(first, out)
    else:
        files = _client_files(reports, out)
    # Tables come last: a plain key after one would belong to it.
    for title, table in (("client-files", files), ("columns", settings.data.columns)):
        if table:
            lines.append(f"[data.{title}]")
            lines += [f"{format_value(key)} = {format_value(item)}" for key, item in table.items()]
    return [*lines, ""]


def _source_lines(report: DataReport, out: Path) -> list[str]:
    """Return the keys of one source for all clients."""
    lines = [f"source = {format_value(_as_seen_from(report.source, out))}"]
    if report.clients:
        clients = printable(", ".join(report.clients), 200)
        return [*lines, f"# the file names its clients: {clients}"]
    if report.num_rows < MIN_ROWS:
        lines.append(f"min-examples = {report.num_rows}  # fewest rows of a client")
    return [
        *lines,
        f"num-clients = {_num_clients(report)}  # the rows are dealt to so many simulated clients",
        '# client-column = "..."  # instead: a column that names the client of each row',
    ]


def _num_clients(report: DataReport) -> int:
    """Return how many simulated clients the rows of a source are enough for."""
    return max(1, min(NUM_CLIENTS, report.num_rows // MIN_ROWS))


def _training_lines(reports: Sequence[DataReport], settings: Config) -> list[str]:
    """Return the section [training]."""
    lines = ["[training]"]
    if reports[0].kind == "chosen+rejected":
        lines.append('objective = "dpo"  # the rows are preferences')
    elif settings.training.loss_on != "last":
        turns = format_value(settings.training.loss_on)
        lines.append(f"loss-on = {turns}  # every turn of a chat's assistant that is to be learned")
    elif reports[0].kind in ("messages", "conversations"):
        lines.append('loss-on = "last"  # or "all-assistant": every turn of a chat\'s assistant')
    sizes = [size for report in reports for size in report.clients.values()]
    if not sizes:
        sizes = [report.num_rows for report in reports]
    if len(reports) == 1 and not reports[0].clients:
        sizes = [reports[0].num_rows // _num_clients(reports[0])]
    steps = math.ceil(min(sizes) * (1 - HELD_OUT) / BATCH_SIZE)
    steps = max(1, min(MAX_STEPS, steps))
    rate = "1e-4" if reports[0].kind == "chosen+rejected" else "5e-4"
    return [
        *lines,
        f"batch-size = {BATCH_SIZE}",
        f"local-steps = {steps}  # a round; one pass over the smallest client, at most {MAX_STEPS}",
        f"learning-rate = {rate}",
        "",
    ]


def _max_length(reports: Sequence[DataReport]) -> int:
    """Return a length that cuts no example, unless it is extreme."""
    longest = max(report.percentiles[100] for report in reports)
    return min(MAX_LENGTH, LENGTH_STEP * max(1, math.ceil(longest / LENGTH_STEP)))


def _client_files(reports: Sequence[DataReport], out: Path) -> Mapping[str, str]:
    """Return one file per client, named after the file, or after its directory if names repeat."""
    paths = [Path(report.source) for report in reports]
    stems = []
    for path in paths:
        lower = path.name.lower()
        stems.append(path.name[: lower.rindex(file_ending(path))] if file_ending(path) else lower)
    names = stems
    if len(set(names)) < len(names):
        names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the files' names do not tell their clients apart: {', '.join(map(str, paths))}; give "
            "each a name or a directory of its own"
        )
    files = {}
    for name, report in zip(names, reports, strict=True):
        check_client_name(name, report.source)
        if report.clients:
            raise ConfigError(
                f"{report.source} holds lists of rows by client; give it alone, as one source"
            )
        files[name] = _as_seen_from(report.source, out)
    return files


def _as_seen_from(source: str, out: Path) -> str:
    """Return a path relative to the configuration's directory; hub names are unchanged."""
    if not Path(source).exists():
        return source
    return os.path.relpath(Path(source).resolve(), out.resolve().parent)
