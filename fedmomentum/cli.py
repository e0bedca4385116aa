"""The command line: parse, call, print. No arithmetic here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmomentum.errors import ConfigError, FedMomentumError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Exact federated LoRA fine-tuning: FedMomentum.",
)  # fmt: skip
OUT = Console(highlight=False, soft_wrap=False)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)

Folder = Annotated[Path, typer.Argument(show_default=False)]
OutOption = Annotated[Path, typer.Option("--out", help="folder to write", show_default=False)]
BaseOption = Annotated[str, typer.Option("--base", help="base model folder, where it is not where the run found it")]


def main() -> None:
    """Entry point: the user's mistakes end with 2 and one message, Ctrl-C with 130; `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(arguments, standalone_mode=True)
    except FedMomentumError as error:
        if debug:
            raise
        ERR.print(f"fedmomentum: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            raise
        ERR.print("fedmomentum: interrupted", markup=False)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="TOML file; see docs/configuration.md", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="override keys", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="run folder [default: runs/<name of the file>]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run in --out stopped")] = False,
    dry_run: Annotated[bool, typer.Option("--plan", help="print the plan and stop")] = False,
) -> None:
    """Run a federation on this machine: clients train in turn, the server combines exactly."""
    from fedmomentum.config import load_config
    from fedmomentum.live import Live, quiet_libraries
    from fedmomentum.run import prepare

    settings = load_config(config, overrides or [])
    out = out or Path("runs") / config.stem
    with quiet_libraries(), Live(OUT, settings.federation.num_rounds) as live:
        prepared = prepare(settings, out, resume=resume, on_step=live.on_step, say=live.say)
        try:
            live.show_plan(prepared.plan, prepared.clients, out)
            if dry_run:
                return
            try:
                prepared.start(live.observe)
            except BaseException as error:
                _report_if_any(out)
                again = f"fedmomentum run {out / 'config.toml'} --out {out} --resume"
                live.stop()
                if isinstance(error, KeyboardInterrupt):
                    done = prepared.folder.rows[-1]["round"] if prepared.folder.rows else None
                    saved = "nothing is finished yet" if done is None else f"everything up to round {done} is saved"
                    ERR.print(f"Stopped; {saved}. Go on with:\n  {again}", markup=False)
                elif isinstance(error, FedMomentumError):
                    ERR.print(f"Go on with:\n  {again}", markup=False)
                raise
        finally:
            prepared.close()
    _after_run(out)


def _report_if_any(out: Path) -> None:
    """The report of a run that ended early; never in the way of the error that ended it."""
    from fedmomentum.report import write_report

    try:
        write_report(out)
    except Exception as error:
        ERR.print(f"no report was written: {error}", markup=False)


def _after_run(out: Path) -> None:
    from fedmomentum.live import summary_table
    from fedmomentum.report import read_run, write_report

    page = write_report(out)
    OUT.print(summary_table(read_run(out)))
    OUT.print(f"\nThe result is in [bold]{out}[/], its report in [bold]{page}[/]. Next:", soft_wrap=True)
    for what, command in (
        ("the whole model", f"fedmomentum export {out} --to merged --out {out}-merged"),
        ("one plain PEFT adapter", f"fedmomentum export {out} --to adapter --out {out}-adapter"),
        ("try it", f'fedmomentum generate {out} --prompt "..."'),
    ):
        OUT.print(f"  {what + ':':<24}{command}", markup=False, soft_wrap=True)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="run or global model folder", show_default=False)],
    out: OutOption,
    to: Annotated[str, typer.Option("--to", help="merged: a transformers folder; adapter: one plain PEFT adapter")],
    server_round: Annotated[str, typer.Option("--round", help="a number, last or best")] = "last",
    dtype: Annotated[str, typer.Option(help="of merged weights: float32, bfloat16, float16")] = "float32",
    base: BaseOption = "",
) -> None:
    """Carry the result away: loads in stock transformers or PEFT, without fedmomentum."""
    from fedmomentum.base import pick_dtype
    from fedmomentum.export import export_adapter, export_merged
    from fedmomentum.global_model import GlobalModel
    from fedmomentum.live import quiet_libraries

    if to not in ("merged", "adapter"):
        raise ConfigError(f"--to must be merged or adapter; got {to!r}")
    model = GlobalModel.load(run_folder, server_round)
    folder = _base_folder(model, base)
    with quiet_libraries(), OUT.status("Exporting"):
        if to == "adapter":
            export_adapter(model, out, base_folder=folder)
            told = "one PEFT adapter, scaling 1, for the untouched base"
        else:
            import torch

            share = export_merged(
                model, out, base_folder=folder, dtype=pick_dtype(dtype, torch.device("cpu"))
            )  # fmt: skip
            told = f"the merged model in {dtype}; {share:.2%} of the change arrived in its weights"
    OUT.print(f"Round {model.server_round} of {run_folder} -> {out}: {told}", markup=False, soft_wrap=True)


@app.command()
def aggregate(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="PEFT adapter folders", show_default=False)
    ],
    out: OutOption,
    weights: Annotated[str, typer.Option(help="one number an adapter, e.g. 3,1,2 [default: equal]")] = "",
    method: Annotated[str, typer.Option(help="fedmomentum or fedit")] = "fedmomentum",
    rank: Annotated[int | None, typer.Option(help="of the result [default: the largest rank]")] = None,
    split: Annotated[str | None, typer.Option(help="fedmomentum: balanced, singular or aligned")] = None,
    energy: Annotated[float | None, typer.Option(help="fedmomentum: share of the squared singular values")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="of the result [default: the adapters' own scaling]")] = None,
    to: Annotated[
        str, typer.Option("--to", help="global: a global model folder; adapter: one plain PEFT adapter")
    ] = "global",
) -> None:
    """Combine adapters you already have, exactly, without loading their base model."""
    from fedmomentum.aggregation import build_method
    from fedmomentum.aggregation.whole import aggregate_adapters
    from fedmomentum.export import export_adapter, refuse_full
    from fedmomentum.global_model import Blob, GlobalModel
    from fedmomentum.identity import BaseIdentity
    from fedmomentum.peft_io import plain_config, read_adapter

    if to not in ("global", "adapter"):
        raise ConfigError(f"--to must be global or adapter; got {to!r}")
    refuse_full(out)
    asked = {"split": split, "energy": energy}
    chosen = build_method(method, {key: value for key, value in asked.items() if value is not None})
    with OUT.status("Combining"):
        read = [read_adapter(path) for path in adapters]
        largest = rank or max(matrix.rank for adapter in read for matrix in adapter.modules.values())
        result = aggregate_adapters(
            read, _numbers(weights), chosen, rank=largest, scaling=lora_alpha / largest if lora_alpha else None
        )
        config = read[0].config
        adapter = result.adapter
        model = GlobalModel(
            base=BaseIdentity(str(config.get("base_model_name_or_path") or "unknown"), config.get("revision")),
            adapter=type(adapter)(adapter.modules, adapter.scalings, adapter.saved, plain_config(adapter), "aggregate"),
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
        f"{len(read)} adapters by {chosen!r} -> {out}: {len(adapter.modules)} modules of rank {largest}, "
        f"residual of rank up to {max((part.rank for part in result.residual.values()), default=0)}{carried}",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise ConfigError(f"--weights must be numbers with commas between, e.g. 3,1,2; got {text!r}") from error


@app.command()
def inspect(folder: Folder) -> None:
    """Print what a run, a global model, or a PEFT adapter holds: ranks, scalings, energies, norms, hashes."""
    from fedmomentum.inspection import describe

    for part in describe(folder):
        OUT.print(part)


@app.command()
def evaluate(
    what: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="run, global model or PEFT adapter", show_default=False)
    ],
    data: Annotated[
        str, typer.Option("--data", help="held-out examples: a file, folder or hub name", show_default=False)
    ],
    server_round: Annotated[str, typer.Option("--round", help="a number, last or best")] = "last",
    category_column: Annotated[str | None, typer.Option(help="column to report by")] = None,
    split: Annotated[str, typer.Option(help="split of data that has several")] = "test",
    limit: Annotated[int | None, typer.Option(help="first so many examples")] = None,
    max_length: Annotated[int, typer.Option(help="longest example in tokens")] = 512,
    by_generation: Annotated[
        bool, typer.Option("--generate", help="answer by real generation and score the text")
    ] = False,
    base: BaseOption = "",
) -> None:
    """Loss, perplexity and exact match on your own examples, beside the untouched model."""
    from fedmomentum.live import quiet_libraries
    from fedmomentum.use import evaluate_on

    with quiet_libraries(), OUT.status("Evaluating"):
        table = evaluate_on(
            what, data, server_round=server_round, category_column=category_column, split=split, limit=limit,
            max_length=max_length, by_generation=by_generation, base=base,
        )  # fmt: skip
    OUT.print(table)


@app.command()
def generate(
    what: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="run, global model or PEFT adapter", show_default=False)
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", help="may be given several times", show_default=False)],
    server_round: Annotated[str, typer.Option("--round", help="a number, last or best")] = "last",
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 64,
    plain: Annotated[bool, typer.Option("--plain", help="give the prompt as it is, without the chat template")] = False,
    base: BaseOption = "",
) -> None:
    """Answer prompts: the tuned model beside the untouched one."""
    from fedmomentum.live import quiet_libraries
    from fedmomentum.use import answers

    with quiet_libraries(), OUT.status("Generating"):
        rows = answers(
            what, prompt, server_round=server_round, max_new_tokens=max_new_tokens, plain=plain, base=base
        )  # fmt: skip
    for question, untouched, tuned in rows:
        table = Table(title=None, show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, text in (("prompt", question), ("untouched", untouched), ("tuned", tuned)):
            table.add_row(Text(name, style="dim"), Text(text))
        OUT.print(table, "")


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", show_default=False)]) -> None:
    """Write a run's report.html anew."""
    from fedmomentum.report import write_report

    OUT.print(str(write_report(run_folder)), markup=False, soft_wrap=True)


def _base_folder(model: Any, base: str) -> Path:
    from fedmomentum.identity import resolve_base

    return resolve_base(base or model.base.name, model.base.revision)


if __name__ == "__main__":
    main()
