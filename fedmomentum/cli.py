"""The command line: parse, call, print. No arithmetic here."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from fedmomentum.errors import ConfigError, FedMomentumError
from fedmomentum.memory import keep_freed_memory
from fedmomentum.terminal import SafeConsole

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Exact federated LoRA fine-tuning: FedMomentum.",
)  # fmt: skip
OUT = SafeConsole(highlight=False, soft_wrap=False)
ERR = SafeConsole(stderr=True, highlight=False, soft_wrap=True)

Folder = Annotated[Path, typer.Argument(show_default=False)]
OutOption = Annotated[Path, typer.Option("--out", help="folder to write", show_default=False)]
ConfigFile = Annotated[Path, typer.Argument(help="TOML file; see docs/configuration.md", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="override keys", show_default=False)
]
RunFolderOption = Annotated[Path | None, typer.Option("--out", help="run folder [default: runs/<name of the file>]")]
ResumeRoundOption = Annotated[
    int | None,
    typer.Option(
        "--round",
        help="with --resume: go on from this checkpoint instead of the last; the rounds after it are done again",
        show_default=False,
    ),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="go on where the run in --out stopped")]
BaseOption = Annotated[str, typer.Option("--base", help="base model folder, where it is not where the run found it")]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="[NAME=]FILE", help="a client's file, or the source, where it is now; repeatable"),
]
RoundOption = Annotated[str, typer.Option("--round", help="a number, last or best")]
ClientOption = Annotated[
    str, typer.Option("--client", help="whose model, where the method leaves factors with each client")
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="that client's own store (of join) [default: the run's folder]")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16 [default: the run's]", show_default=False)
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ... [default: the run's]", show_default=False)
]


def command(*words: object) -> str:
    """Return a command as it can be pasted into a shell."""
    return shlex.join(str(word) for word in words)


def main() -> None:
    """Entry point: the user's mistakes end with 2 and one message, Ctrl-C with 130; `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    INTERRUPTION.listen()
    keep_freed_memory()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, they warn where a process is started
    try:
        app(arguments, standalone_mode=True)
    except BaseException as error:
        # typer makes an exit of Ctrl-C, and a library may catch it and fail in some other way
        if INTERRUPTION.came and not debug:
            ERR.print("fedmomentum: interrupted", markup=False)
            sys.exit(130)
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        told = None if debug else _mistake(error)
        if told is None:
            raise
        ERR.print(f"fedmomentum: {told}", markup=False)
        sys.exit(2)


class Interruption:
    """Whether the user, or a service manager, asked this process to end."""

    def __init__(self) -> None:
        self.came = False

    def listen(self, *, although_ignored: bool = False) -> None:
        """Take SIGINT and SIGTERM from here on.

        Args:
            although_ignored: Take SIGINT where the parent had it ignored, too. A shell without job control starts
                background commands so, and a service that a script started with `&` could be ended by SIGKILL only.
        """
        self.came = False
        if although_ignored or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._interrupt)

    def _interrupt(self, signum: int, frame: Any) -> None:
        self.came = True
        raise KeyboardInterrupt


INTERRUPTION = Interruption()


def _mistake(error: BaseException) -> str | None:
    """Return the sentence to end with, for what is a mistake or a lack of means; None for a defect of the package."""
    if isinstance(error, FedMomentumError):
        return str(error)
    if isinstance(error, OSError):  # a full disk, a directory that may not be written
        if error.strerror is None:
            return str(error) or type(error).__name__
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}. Make room or give access, and try again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return "out of memory. Use a machine or device with more, smaller batches, or a smaller dtype"
    return None


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        OUT.print(f"fedmomentum {version('fedmomentum')}", markup=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    out: RunFolderOption = None,
    resume: ResumeOption = False,
    server_round: ResumeRoundOption = None,
    dry_run: Annotated[bool, typer.Option("--plan", help="print the plan and stop; nothing is written")] = False,
    base: BaseOption = "",
    data: DataOption = None,
) -> None:
    """Run a federation on this machine: clients train in turn, the server combines exactly."""
    from fedmomentum.config import load_config
    from fedmomentum.live import Live, quiet_libraries
    from fedmomentum.origin import placed
    from fedmomentum.run import plan_run, prepare

    settings = placed(load_config(config, overrides or []), base, data or [])
    out = out if out is not None else Path("runs") / config.stem
    _check_resume_round(server_round, resume)
    with quiet_libraries(), Live(OUT, settings.federation.num_rounds) as live:
        if dry_run:
            plan, clients = plan_run(settings, out, resume=resume, server_round=server_round, say=live.say)
            live.show_plan(plan, clients, out)
            return
        _check_out(out)
        prepared = prepare(settings, out, resume=resume, server_round=server_round, on_step=live.on_step, say=live.say)
        try:
            live.show_plan(prepared.plan, prepared.clients, out)
            try:
                prepared.start(live.observe)
            except BaseException as error:
                _report_if_any(out)
                live.stop()
                done = prepared.folder.rows[-1]["round"] if prepared.folder.rows else None
                _say_how_to_go_on(error, out, done, "run")
                raise
        finally:
            prepared.close()
    _after_run(out)


def _check_resume_round(server_round: int | None, resume: bool) -> None:
    if server_round is not None and (not resume or server_round < 0):
        raise ConfigError(f"--round goes with --resume and is a round, 0 or more; got {server_round}")


def _check_out(out: Path) -> None:
    """Refuse a directory that cannot be made, before anything is loaded.

    Raises:
        ConfigError: If there is a file in its place, or its parent may not be written.
    """
    place = out
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"--out {out}: {place} is no directory; choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {place} may not be written; give access, or choose another --out")


def _say_how_to_go_on(error: BaseException, out: Path, done: int | None, verb: str, *more: object) -> None:
    """After a run ended early: what is saved, and the command that goes on; nothing where the error is a defect."""
    if not isinstance(error, (KeyboardInterrupt, FedMomentumError, OSError)):
        return
    if not (out / "config.toml").is_file():
        ERR.print("The run had not begun", markup=False)
        return
    saved = "nothing is finished yet" if done is None else f"everything up to round {done} is saved"
    again = command("fedmomentum", verb, out / "config.toml", "--out", out, *more, "--resume")
    ERR.print(f"Stopped; {saved}. Go on with:\n  {again}", markup=False)


def _report_if_any(out: Path) -> None:
    """The report of a run that ended early; never in the way of the error that ended it."""
    from fedmomentum.report import write_report

    try:
        write_report(out)
    except Exception as error:
        ERR.print(f"no report was written: {error}", markup=False)


def _after_run(out: Path) -> None:
    from fedmomentum.live import absence_lines, summary_table
    from fedmomentum.report import read_run, write_report

    page = write_report(out)
    finished = read_run(out)
    OUT.print(summary_table(finished))
    for absence in absence_lines(finished):
        OUT.print(absence, soft_wrap=True)
    OUT.print(f"\nThe result is in {out}, its report in {page}. Next:", markup=False, soft_wrap=True)
    for what, next_command in _next_steps(out):
        OUT.print(f"  {what + ':':<24}{next_command}", markup=False, soft_wrap=True)


def _next_steps(out: Path) -> list[tuple[str, str]]:
    """What can be done with a finished run, each with its command."""
    from fedmomentum.results import example_client

    client = example_client(out)
    whose = [] if client is None else ["--client", client]
    model = "the whole model" if client is None else "the model of a client"
    return [
        (model, command("fedmomentum", "export", out, *whose, "--to", "merged", "--out", f"{out}-merged")),
        (
            "one plain PEFT adapter",
            command("fedmomentum", "export", out, *whose, "--to", "adapter", "--out", f"{out}-adapter"),
        ),
        ("try it", f'{command("fedmomentum", "generate", out, *whose)} --prompt "..."'),
    ]


@app.command()
def export(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="run, global model or PEFT adapter", show_default=False)
    ],
    out: OutOption,
    to: Annotated[str, typer.Option("--to", help="merged: a transformers folder; adapter: one plain PEFT adapter")],
    server_round: RoundOption = "last",
    dtype: Annotated[str, typer.Option(help="of merged weights: float32, bfloat16, float16")] = "float32",
    base: BaseOption = "",
    client: ClientOption = "",
    store: StoreOption = None,
) -> None:
    """Carry the result away: loads in stock transformers or PEFT, without fedmomentum."""
    import torch

    from fedmomentum.base import pick_dtype
    from fedmomentum.export import export_adapter, export_merged, refuse_full
    from fedmomentum.live import quiet_libraries
    from fedmomentum.results import base_folder, open_result

    if to not in ("merged", "adapter"):
        raise ConfigError(f"--to must be merged or adapter; got {to!r}")
    chosen = pick_dtype(dtype, torch.device("cpu"))
    _check_out(out)
    refuse_full(out)
    result = open_result(run_folder, server_round=server_round, client=client, store=store)
    folder = base_folder(result, base)
    with quiet_libraries(), OUT.status("Exporting"):
        if to == "adapter":
            export_adapter(result.model, out, base_folder=folder)
            told = "one PEFT adapter, scaling 1, for the untouched base"
        else:
            share = export_merged(result.model, out, base_folder=folder, dtype=chosen)
            told = f"the merged model in {dtype}; {share:.2%} of the change arrived in its weights"
    OUT.print(f"{result.title} -> {out}: {told}", markup=False, soft_wrap=True)


@app.command()
def aggregate(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT adapter folders", show_default=False)
    ],
    out: OutOption,
    weights: Annotated[str | None, typer.Option(help="one number an adapter, e.g. 3,1,2 [default: equal]")] = None,
    method: Annotated[str, typer.Option(help="see `fedmomentum methods`, or module:Class")] = "fedmomentum",
    rank: Annotated[int | None, typer.Option(help="of the result [default: the largest rank]")] = None,
    split: Annotated[str | None, typer.Option(help="fedmomentum: balanced, singular or aligned")] = None,
    energy: Annotated[float | None, typer.Option(help="fedmomentum: share of the squared singular values")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="of the result [default: the adapters' own scaling]")] = None,
    to: Annotated[
        str, typer.Option("--to", help="global: a global model folder; adapter: one plain PEFT adapter")
    ] = "global",
) -> None:
    """Combine adapters you already have, exactly, without loading their base model."""
    import torch

    from fedmomentum.aggregation import build_method
    from fedmomentum.aggregation.whole import aggregate_adapters
    from fedmomentum.export import export_adapter, refuse_full
    from fedmomentum.global_model import Blob, GlobalModel
    from fedmomentum.identity import BaseIdentity
    from fedmomentum.peft_io import plain_config, read_adapter
    from fedmomentum.sums import rank_of

    if to not in ("global", "adapter"):
        raise ConfigError(f"--to must be global or adapter; got {to!r}")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1; got {rank}")
    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        raise ConfigError(f"--lora-alpha must be a number above 0; got {lora_alpha:g}")
    _check_out(out)
    refuse_full(out)
    asked = {"split": split, "energy": energy}
    chosen = build_method(method, {key: value for key, value in asked.items() if value is not None})
    with OUT.status("Combining"):
        read = [read_adapter(path) for path in adapters]
        if rank is None:
            rank = max(matrix.rank for adapter in read for matrix in adapter.modules.values())
        scaling = None if lora_alpha is None else lora_alpha / rank
        result = aggregate_adapters(read, _numbers(weights), chosen, rank=rank, scaling=scaling)
        config = read[0].config
        adapter = result.adapter
        model = GlobalModel(
            base=BaseIdentity(str(config.get("base_model_name_or_path") or "unknown"), config.get("revision")),
            adapter=type(adapter)(
                {module: matrix.to(torch.float32) for module, matrix in adapter.modules.items()},
                adapter.scalings,
                adapter.saved,
                plain_config(adapter),
                "aggregate",
            ),
            base_update=(Blob.of(result.residual),) if result.residual else (),
            carried=result.carried,
            server_round=1,
            method=repr(chosen),
        )
        if to == "adapter":
            export_adapter(model, out)
        else:
            model.save(out)
    carried = "; a tail is carried and not part of the model (energy below 1)" if result.carried else ""
    OUT.print(
        f"{len(read)} adapters by {chosen!r} -> {out}: {len(adapter.modules)} modules of rank {rank}, "
        f"residual of rank up to {max(map(rank_of, result.residual.values()), default=0)}{carried}",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights must be numbers with commas between, e.g. 3,1,2; got {text!r}") from error
    if not all(0 < number < math.inf for number in numbers):
        raise ConfigError(f"--weights must be positive numbers; got {text!r}")
    return numbers


@app.command()
def methods() -> None:
    """What there is to choose from for [method] name: what each method trains, sends and costs."""
    from fedmomentum.aggregation import METHODS

    table = Table(
        Column("name", no_wrap=True), "method, paper", "exact", "ranks may differ", "trains", "up", "down",
        caption="numbers a module, round and client; P(x) = x (out + in), r the rank, n the clients. Where two stand, "
        "they are for odd and even rounds. exact: with its default settings", caption_justify="left",
    )  # fmt: skip
    cost = {"BA": "P(r)", "B": "r out", "A": "r in", "": ""}
    for name, kind in METHODS.items():
        method = kind()

        def both(of: Any, shown: Any = lambda factors: factors) -> str:
            return ", ".join(dict.fromkeys(shown(of(server_round)) for server_round in (1, 2)))

        down = [both(method.sends, cost.get), f"P(q), {method.residual_rank}" if method.residual_rank else ""]
        table.add_row(
            name, Text(method.paper), "yes" if method.exact else "no", "yes" if method.unequal_ranks else "no",
            both(method.trains), both(method.uploads, cost.get), " + ".join(part for part in down if part),
        )  # fmt: skip
    OUT.print(table)


@app.command()
def files(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="which to copy [default: all]", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="directory to copy to [default: list them only]", show_default=False)
    ] = None,
) -> None:
    """List or copy what comes with the package: example configurations, systemd units, an nginx configuration."""
    from fedmomentum.shipped import ROOT, SHIPPED, copy_shipped

    if out is not None:
        for target in copy_shipped(out, names or []):
            OUT.print(str(target), markup=False, soft_wrap=True)
        return
    if names:
        raise ConfigError("give the directory to copy to: --out DIR")
    for name, what in SHIPPED.items():
        OUT.print(f"{ROOT / name}  {what}", markup=False, soft_wrap=True)


@app.command()
def inspect(folder: Folder) -> None:
    """Print what a run, a global model, or a PEFT adapter holds: ranks, scalings, energies, norms, hashes."""
    import atexit
    import gc

    # Over in a second, a third of which would go into looking for garbage: while torch is imported, and once more,
    # through everything it brought, when Python ends.
    gc.disable()
    atexit.register(gc.freeze)
    try:
        from fedmomentum.inspection import describe

        for part in describe(folder):
            OUT.print(part)
    finally:
        gc.enable()


WhatArgument = Annotated[
    Path, typer.Argument(metavar="RUN|ADAPTER", help="run, global model or PEFT adapter", show_default=False)
]


@app.command()
def evaluate(
    what: WhatArgument,
    data: Annotated[
        str | None,
        typer.Option("--data", help="examples: a file, folder or hub name [default: what the run itself held out]"),
    ] = None,
    server_round: RoundOption = "last",
    category_column: Annotated[str | None, typer.Option(help="column to report by")] = None,
    split: Annotated[str, typer.Option(help="split of data that has several")] = "test",
    limit: Annotated[int | None, typer.Option(help="first so many examples")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="longest example in tokens [default: the run's, or 512]")
    ] = None,
    by_generation: Annotated[
        bool, typer.Option("--generate", help="answer by real generation and score the text")
    ] = False,
    base: BaseOption = "",
    client: ClientOption = "",
    store: StoreOption = None,
    dtype: DtypeOption = "",
    device: DeviceOption = "",
) -> None:
    """Loss, perplexity and exact match on held-out examples, beside the untouched model."""
    from fedmomentum.live import quiet_libraries
    from fedmomentum.results import open_result
    from fedmomentum.use import Settings, comparison_table, evaluate_on, heading, notes

    with quiet_libraries(), OUT.status("Evaluating"):
        result = open_result(what, server_round=server_round, client=client, store=store)
        comparison = evaluate_on(
            result,
            data,
            Settings(base, dtype, device),
            category_column=category_column,
            split=split,
            limit=limit,
            max_length=max_length,
            by_generation=by_generation,
        )
    OUT.print(heading(result, comparison), markup=False, soft_wrap=True)
    OUT.print(comparison_table(comparison))
    for note in notes(comparison):
        OUT.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


@app.command()
def generate(
    what: WhatArgument,
    prompt: Annotated[list[str], typer.Option("--prompt", help="may be given several times", show_default=False)],
    server_round: RoundOption = "last",
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 64,
    plain: Annotated[bool, typer.Option("--plain", help="give the prompt as it is, without the chat template")] = False,
    base: BaseOption = "",
    client: ClientOption = "",
    store: StoreOption = None,
    dtype: DtypeOption = "",
    device: DeviceOption = "",
) -> None:
    """Answer prompts: the tuned model beside the untouched one."""
    from fedmomentum.live import quiet_libraries
    from fedmomentum.results import open_result
    from fedmomentum.use import Settings, answers

    with quiet_libraries(), OUT.status("Generating"):
        result = open_result(what, server_round=server_round, client=client, store=store)
        rows = answers(result, prompt, Settings(base, dtype, device), max_new_tokens=max_new_tokens, plain=plain)
    for question, untouched, tuned in rows:
        table = Table(title=None, show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, text in (("prompt", question), ("untouched", untouched), ("tuned", tuned)):
            table.add_row(Text(name, style="dim"), Text(text))
        OUT.print(table, "")


@app.command()
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[
        str,
        typer.Option("--methods", help="with commas between; settings as name:key=value;key=value", show_default=False),
    ] = ...,  # type: ignore[assignment]
    seeds: Annotated[str, typer.Option("--seeds", help="whole numbers with commas between")] = "0,1,2",
    baseline: Annotated[str, typer.Option("--baseline", help="one of the methods [default: the first]")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="folder [default: runs/compare-<name of the file>]")] = None,
    target: Annotated[float, typer.Option("--target", help="exact match to count rounds, bytes and time to")] = 0.5,
    base: BaseOption = "",
    data: DataOption = None,
) -> None:
    """Run methods on the same data over several seeds, and tabulate them; started again, it goes on."""
    from fedmomentum import compare as comparing
    from fedmomentum.config import load_config
    from fedmomentum.live import Live, quiet_libraries
    from fedmomentum.origin import placed
    from fedmomentum.report import write_comparison_page

    settings = placed(load_config(config, overrides or []), base, data or [])
    out = out if out is not None else Path("runs") / f"compare-{config.stem}"
    _check_out(out)
    entries = comparing.parse_methods(methods, settings)
    if not baseline:
        baseline = entries[0].label
    if baseline not in [entry.label for entry in entries]:
        raise ConfigError(f"--baseline must be one of the methods, {methods}; got {baseline!r}")
    _check_target(target)
    again = command("fedmomentum", *sys.argv[1:])
    with quiet_libraries():
        cells = comparing.plan_cells(settings, entries, comparing.parse_seeds(seeds), out)
        left = [cell for cell in cells if not cell.is_finished()]
        comparing.start_comparison(settings, out)
        for number, cell in enumerate(left, start=1 + len(cells) - len(left)):
            OUT.print(f"[bold]Run {number} of {len(cells)}:[/] ", Text(cell.title), sep="", soft_wrap=True)
            with Live(OUT, cell.config.federation.num_rounds) as live:
                try:
                    comparing.run_cell(cell, observer=live.observe, on_step=live.on_step, say=live.say)
                except BaseException as error:
                    live.stop()
                    if isinstance(error, (KeyboardInterrupt, FedMomentumError)):
                        ERR.print(f"Stopped in {cell.title}; every finished round is saved. Go on with:\n  {again}",
                                  markup=False)  # fmt: skip
                    raise
    comparison = comparing.write_comparison(out, cells, baseline=baseline, target=target, command=again)
    for table in comparing.comparison_tables(comparison):
        OUT.print(table)
    page = write_comparison_page([out])
    OUT.print(f"\nThe numbers are in {out / 'comparison.json'} and {out / 'comparison.csv'}, the page in {page}",
              markup=False, soft_wrap=True)  # fmt: skip


def _check_target(target: float) -> None:
    if not 0 <= target <= 1:
        raise ConfigError(f"--target must be a share from 0 to 1; got {target:g}")


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="a run, a comparison, or several runs", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="several runs: folder for comparison.html [default: the current one]")
    ] = None,
    target: Annotated[float, typer.Option("--target", help="several runs: exact match to count rounds to")] = 0.5,
) -> None:
    """Write a run's report.html anew, or comparison.html of a comparison or of several runs."""
    from fedmomentum.report import COMPARISON, write_comparison_page, write_report

    _check_target(target)
    single = len(folders) == 1
    if single and not (folders[0] / COMPARISON).is_file():
        page = write_report(folders[0])
    else:
        page = write_comparison_page(folders, out=out, target=target)
    OUT.print(str(page), markup=False, soft_wrap=True)


# ── over a network ───────────────────────────────────────────────────────────────────────────────────────────────

keys_app = typer.Typer(no_args_is_help=True, help="Make and admit the keys of server and nodes.")
app.add_typer(keys_app, name="keys")


@keys_app.callback()
def _keys() -> None:
    _need_flower()


KeysOption = Annotated[Path, typer.Option("--keys", help="folder of the server's keys")]


@keys_app.command("server")
def keys_server(
    host: Annotated[
        list[str], typer.Option(help="name or address nodes will use; may be repeated", show_default=False)
    ],
    keys: KeysOption = Path("keys"),
) -> None:
    """Make a private authority and the server's certificate; again, to renew the certificate (it lasts two years)."""
    from fedmomentum.flower.keys import make_server_keys

    make_server_keys(keys, host)
    OUT.print(
        f"The server's keys are in {keys}. Send {keys / 'ca.pem'} to every party, which keeps it as ca.pem; keep the "
        "rest to yourself", markup=False, soft_wrap=True,
    )  # fmt: skip


@keys_app.command("node")
def keys_node(
    name: Annotated[str, typer.Argument(show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="folder to write")] = Path("."),
) -> None:
    """Make a node's key pair, on the node's own machine."""
    from fedmomentum.flower.keys import make_node_key

    private, public = make_node_key(name, out)
    OUT.print(f"Send {public} to the coordinator. {private} stays here, and is for nobody else", markup=False,
              soft_wrap=True)  # fmt: skip


@keys_app.command("admit")
def keys_admit(
    public: Annotated[list[Path], typer.Argument(metavar="NAME.pub...", show_default=False)],
    keys: KeysOption = Path("keys"),
) -> None:
    """Admit nodes by their public keys, also while a server runs. To turn one away, remove its file in nodes/."""
    from fedmomentum.flower.keys import admit

    for file in public:
        OUT.print(f"{admit(file, keys)} is admitted", markup=False)


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="TOML file; [data] does not count here", show_default=False)],
    overrides: Overrides = None,
    out: RunFolderOption = None,
    keys: KeysOption = Path("keys"),
    host: Annotated[str, typer.Option(help="address to listen on")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="port to listen on")] = 9443,
    resume: ResumeOption = False,
    server_round: ResumeRoundOption = None,
) -> None:
    """Coordinate a federation of machines: wait for the admitted nodes, then run the rounds."""
    from fedmomentum.config import load_config
    from fedmomentum.live import Live

    settings = load_config(config, overrides or [])
    out = out if out is not None else Path("runs") / config.stem
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be from 0 (any free port) to 65535; got {port}")
    _check_resume_round(server_round, resume)
    _check_out(out)
    _need_flower()
    from fedmomentum.flower.serve import serve as serve_run
    from fedmomentum.flower.views import ServerView, after_serving
    from fedmomentum.global_model import kept_rounds

    INTERRUPTION.listen(although_ignored=True)
    with Live(OUT, settings.federation.num_rounds) as live:
        view = ServerView(OUT, live, out)
        try:
            serve_run(
                settings, keys, out, host=host, port=port, resume=resume, server_round=server_round, told=view.observe
            )
        except BaseException as error:
            live.stop()
            done = max(kept_rounds(out), default=None)
            _say_how_to_go_on(error, out, done, "serve", "--keys", keys, "--host", host, "--port", port)
            raise
    after_serving(OUT, out)


@app.command()
def join(
    config: Annotated[Path, typer.Argument(help="TOML file: the run's, with this party's data", show_default=False)],
    overrides: Overrides = None,
    server: Annotated[str, typer.Option("--server", help="HOST:PORT, or https://HOST:PORT", show_default=False)] = ...,  # type: ignore[assignment]
    key: Annotated[Path, typer.Option("--key", help="this node's private key", show_default=False)] = ...,  # type: ignore[assignment]
    ca: Annotated[Path, typer.Option("--ca", help="the server's authority, its keys/ca.pem")] = Path("ca.pem"),
    name: Annotated[str, typer.Option("--name", help="[default: the key file's name]", show_default=False)] = "",
    store: Annotated[
        Path | None, typer.Option("--store", help="folder for what the server sends [default: nodes/<name>]")
    ] = None,
    check_only: Annotated[bool, typer.Option("--check", help="see whether everything is in order, and stop")] = False,
) -> None:
    """Take part with this machine's data, until Ctrl-C. Only the adapter, counts and scores leave it."""
    import threading

    from fedmomentum.config import load_config

    settings = load_config(config, overrides or [])
    _need_flower()
    from fedmomentum.flower.join import Party, check
    from fedmomentum.flower.join import join as take_part
    from fedmomentum.flower.views import NodeView
    from fedmomentum.flower.worker import WorkerError
    from fedmomentum.names import directory_name

    INTERRUPTION.listen(although_ignored=True)
    if not name:
        name = key.stem
    party = Party(server, ca, key, store if store is not None else Path("nodes") / directory_name(name), name)
    with NodeView(OUT) as view:
        if check_only:
            results = check(settings, party, view.observe)
        else:
            try:
                take_part(settings, party, threading.Event(), view.observe)
            except WorkerError as error:
                raise ConfigError(f"this node cannot take part: {error.detail}") from error
            except KeyboardInterrupt:
                ERR.print("This node has left; what it was sent stays here, and it may join again", markup=False)
                raise
            return
    table = Table("", "checked", "what is wrong", box=None)
    for what, wrong in results:
        table.add_row(Text("ok", style="green") if wrong is None else Text("no", style="red"), what, Text(wrong or ""))
    OUT.print(table)
    if any(wrong for _, wrong in results):
        sys.exit(2)


@app.command()
def status(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a served run", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="again every two seconds, until Ctrl-C")] = False,
) -> None:
    """Who is connected, who is training, until when, and how much was sent: a served run, seen from its folder."""
    import time

    from rich.live import Live as RichLive

    from fedmomentum.flower.status import read_status
    from fedmomentum.flower.views import status_table

    if not watch:
        OUT.print(status_table(read_status(run_folder), time.time()))
        return
    with RichLive(console=OUT, auto_refresh=False) as live:
        while True:
            live.update(status_table(read_status(run_folder), time.time()), refresh=True)
            time.sleep(2)


@app.command()
def simulate(
    config: ConfigFile,
    overrides: Overrides = None,
    out: RunFolderOption = None,
    resume: ResumeOption = False,
    server_round: ResumeRoundOption = None,
    base: BaseOption = "",
    data: DataOption = None,
) -> None:
    """Run a federation under Flower's simulation engine (Ray); on one machine, `run` is lighter."""
    from fedmomentum.config import load_config
    from fedmomentum.live import Live
    from fedmomentum.origin import placed

    settings = placed(load_config(config, overrides or []), base, data or [])
    out = out if out is not None else Path("runs") / config.stem
    _check_resume_round(server_round, resume)
    _check_out(out)
    _need_flower()
    from fedmomentum.flower.simulation import simulate as simulate_run
    from fedmomentum.flower.views import ServerView
    from fedmomentum.global_model import kept_rounds

    with Live(OUT, settings.federation.num_rounds) as live:
        try:
            told = ServerView(OUT, live, out).observe
            simulate_run(settings, out, resume=resume, server_round=server_round, told=told)
        except BaseException as error:
            live.stop()
            _say_how_to_go_on(error, out, max(kept_rounds(out), default=None), "simulate")
            raise
    _after_run(out)


def _need_flower() -> None:
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise ConfigError("federations over a network need Flower; install it with: pip install 'fedmomentum[flower]'")


if __name__ == "__main__":
    main()
