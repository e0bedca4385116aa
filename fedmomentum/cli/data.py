"""Commands on example files: `data` shows how they are read, `init` configures a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedmomentum.cli.options import ERR, OUT, check_output_directory, shell_command
from fedmomentum.errors import ConfigError, DataError
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.config.schema import Config
    from fedmomentum.run.data_report import DataReport, ShownExample

ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="OURS=YOURS", help="e.g. question=Frage; repeatable, see data.columns"
    ),
]
EncodingOption = Annotated[
    str, typer.Option("--encoding", help="encoding of text files, e.g. cp1252")
]
LossOnOption = Annotated[
    str, typer.Option("--loss-on", help="turns of a chat to learn: last or all-assistant")
]
TaskOption = Annotated[str, typer.Option("--task", help="causal-lm or sequence-classification")]

LEARNED_MARKS = ("⟦", "⟧")
"""The marks around tokens that are learned."""
MAX_SEGMENT = 600
"""The most characters to show of a part of an example."""
MAX_ROWS = 5


def data(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="files of examples [default: those of --config]",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="use model, columns and lengths of this configuration"),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="model whose tokenizer is used: a directory or a hub name, NAME[@REVISION] "
            "[default: the configuration's]",
        ),
    ] = "",
    column: ColumnOption = None,
    encoding: EncodingOption = "",
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="most tokens in an example")
    ] = None,
    loss_on: LossOnOption = "",
    task: TaskOption = "",
) -> None:
    """Show how files of examples are interpreted, and what the model will see of them."""
    from fedmomentum.config.toml import from_dict, load_config
    from fedmomentum.run.data_report import load_tokenizer_of, report_data
    from fedmomentum.run.task import check_task
    from fedmomentum.utils.process import quiet_libraries

    given = {
        **_model_keys(model),
        "model.task": task,
        "data.encoding": encoding,
        "data.max-length": max_length,
        "training.loss-on": loss_on,
    }
    start = load_config(config) if config is not None else from_dict({})
    settings = _with_options(start, given, column or [])
    check_task(settings)
    # Show every readable file, whatever is wrong with the others.
    sources = [(file, settings.data.split) for file in files or ()] or _sources(settings)
    with quiet_libraries():
        tokenizer = load_tokenizer_of(settings.model)
        num_broken = 0
        for number, (source, split) in enumerate(sources):
            if number:
                OUT.print()
            try:
                report = report_data(
                    source, split, settings, tokenizer, is_run_config=config is not None
                )
            except DataError as error:
                num_broken += 1
                ERR.print(f"fedmomentum: {error}", markup=False)
                continue
            _print_report(report)
    if num_broken:
        raise typer.Exit(2)


def init(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="one file for all clients, or one per client"),
    ],
    out: Annotated[Path, typer.Option("--out", help="file to write")] = Path("federation.toml"),
    model: Annotated[
        str,
        typer.Option("--model", help="base model: a directory or a hub name, NAME[@REVISION]"),
    ] = "",
    column: ColumnOption = None,
    encoding: EncodingOption = "",
    loss_on: LossOnOption = "",
    task: TaskOption = "",
) -> None:
    """Write a first configuration, with comments, based on files of examples."""
    from fedmomentum.config.toml import from_dict, load_config
    from fedmomentum.run.data_report import load_tokenizer_of, report_data
    from fedmomentum.run.starter_config import starter_config
    from fedmomentum.utils.process import quiet_libraries

    if out.exists():
        raise ConfigError(f"{out} is there already; remove it, or choose another --out")
    check_output_directory(out.parent)
    given = {
        **_model_keys(model),
        "model.task": task,
        "data.encoding": encoding,
        "training.loss-on": loss_on,
    }
    settings = _with_options(from_dict({}), given, column or [])
    with quiet_libraries():
        tokenizer = load_tokenizer_of(settings.model)
        split = settings.data.split
        reports = [report_data(source, split, settings, tokenizer) for source in files]
    text = starter_config(reports, settings, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    # Make sure that the result can be read, even with quotes in names or a path as the model.
    load_config(out)
    OUT.print(f"{out}: written. Next:", markup=False, soft_wrap=True)
    for words in (("data", "--config", out), ("run", out, "--plan"), ("run", out)):
        OUT.print(f"  {shell_command('fedmomentum', *words)}", markup=False, soft_wrap=True)


def _model_keys(model: str) -> dict[str, object]:
    """Return the keys set by `--model`."""
    from fedmomentum.utils.hub import split_revision

    name, revision = split_revision(model)
    return {"model.name": name, "model.revision": revision}


def _with_options(settings: Config, given: Mapping[str, object], columns: list[str]) -> Config:
    """Return the settings, overridden by those given on the command line."""
    from fedmomentum.config.toml import apply_overrides
    from fedmomentum.config.toml_values import format_value

    # Zero is a value: it is refused where it is out of range.
    present = {key: value for key, value in given.items() if value not in ("", None)}
    overrides = [f"{key}={format_value(value)}" for key, value in present.items()]
    # A different model does not have the configured model's revision.
    if given["model.name"] and not given["model.revision"]:
        overrides.append("model.revision=")
    settings = apply_overrides(settings, overrides)
    names = {**settings.data.columns, **_parse_columns(columns)}
    return replace(settings, data=replace(settings.data, columns=names))


def _parse_columns(pairs: list[str]) -> dict[str, str]:
    """Parse `--column`.

    Raises:
        ConfigError: If one is not a pair.
    """
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals:
            raise ConfigError(f"--column {pair!r} must be OURS=YOURS, such as question=Frage")
        columns[ours.strip()] = theirs.strip()
    return columns


def _sources(settings: Config) -> list[tuple[str, str]]:
    """Return the data sources of a configuration, each with the split that a run reads of it.

    Raises:
        ConfigError: If there are none to read.
    """
    from fedmomentum.config.data import BUILT_IN_SOURCE

    data = settings.data
    sources = [(file, data.split) for file in data.client_files.values()]
    if data.source and data.source != BUILT_IN_SOURCE:
        sources.append((data.source, data.split))
    if data.test_source:
        sources.append((data.test_source, data.test_split))
    if not sources:
        raise ConfigError("give files of examples, or --config with a configuration that has some")
    return sources


# ── printing ──────────────────────────────────────────────────────────────────────────────────────


def _print_report(report: DataReport) -> None:
    """Print a report: facts, examples, and notes to read before a run."""
    OUT.print(Text(report.source, style="bold"), soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(report):
        table.add_row(Text(name, style="dim"), Text(value))
    OUT.print(table)
    start, end = LEARNED_MARKS
    OUT.print()
    OUT.print(
        Text(f"The first examples as the model sees them; what is learned is in {start}…{end}:")
    )
    for number, example in enumerate(report.shown, start=1):
        OUT.print(Text(f"row {number}", style="dim"))
        OUT.print(Padding(_example_text(example), (0, 0, 0, 2)))
    for note in _notes(report):
        OUT.print(Text(f"note: {note}", style="yellow"))


def _facts(report: DataReport) -> Iterator[tuple[str, str]]:
    """Yield what was detected."""
    yield "file", ", ".join((report.origin.kind, *report.origin.details))
    if report.origin.encoding:
        yield "encoding", report.origin.encoding
    if report.split:
        yield "split", printable(report.split)
    yield "format", report.kind
    # The file's column names, and what they are used as if that is not obvious.
    used = []
    for ours, own in report.columns.items():
        used.append(own if own == ours else f"{own} (as {ours})")
    yield "columns read", printable(", ".join(used))
    if report.ignored:
        yield "not read", printable(", ".join(report.ignored))
    yield "rows", f"{report.num_rows:,}"
    if report.clients:
        listed = ", ".join(f"{client} {count:,}" for client, count in report.clients.items())
        yield "of clients", printable(listed)
    lengths = []
    for percent, length in report.percentiles.items():
        lengths.append(f"{percent} % ≤ {length:,}" if percent < 100 else f"longest {length:,}")
    yield "tokens", ", ".join(lengths)


def _example_text(example: ShownExample) -> Text:
    """Return an example's text, with marks around what is learned."""
    text = Text()
    start, end = LEARNED_MARKS
    for segment in example.segments:
        # Show only the beginning and end of a long text.
        shown = segment.text
        if len(shown) > MAX_SEGMENT:
            half = MAX_SEGMENT // 2
            shown = f"{shown[:half]} […] {shown[-half:]}"
        if segment.is_learned:
            text.append(f"{start}{shown}{end}", style="green")
        else:
            text.append(shown)
    if example.note:
        text.append(f"\n{printable(example.note, MAX_SEGMENT)}", style="dim")
    return text


def _notes(report: DataReport) -> Iterator[str]:
    """Yield notes about truncated, dropped and repeated rows."""
    limit = f"data.max-length = {report.max_length}"
    if report.num_cut:
        yield f"rows cut at {limit} tokens: {report.num_cut:,} of {report.num_rows:,}"
    if report.lost_rows:
        rows = ", ".join(map(str, report.lost_rows[:MAX_ROWS]))
        more = " and others" if len(report.lost_rows) > MAX_ROWS else ""
        outcome = "a run drops them"
        if report.is_refused:
            outcome = "that is more than data.max-truncated-fraction allows, so a run refuses them"
        yield (
            f"rows whose prompt alone fills {limit} tokens: {len(report.lost_rows):,} "
            f"({rows}{more}); {outcome}"
        )
    if report.num_copies:
        yield f"rows that repeat an earlier one: {report.num_copies:,}; all are trained on"
    if report.num_repeated:
        yield (
            f"rows that share their prompt with another: {report.num_repeated:,}; none of them is "
            "held out for evaluation"
        )
