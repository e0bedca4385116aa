"""The `benchmark` command: standard benchmarks of a result and its base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fedmomentum.cli.options import (
    OUT,
    BaseOption,
    ClientOption,
    DeviceOption,
    DtypeOption,
    StoreOption,
    print_uncut,
    require_extra,
)


def benchmark(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|MODEL",
            help="run, global model, PEFT adapter, or plain model; the last two can also be a hub "
            "name, OWNER/NAME[@REVISION]",
            show_default=False,
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="names of task files, separated by commas: gsm8k,arc_easy", show_default=False
        ),
    ],
    data: Annotated[
        Path, typer.Option("--data", help="directory of task files and their data")
    ] = Path("benchmark-tasks"),
    rounds: Annotated[
        str, typer.Option(help="rounds of a run: numbers, last, best or all, separated by commas")
    ] = "last",
    limit: Annotated[int | None, typer.Option(help="only the first N examples")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="worked examples per prompt [default: each task's own]")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="wrap prompts in the tokenizer's chat template")
    ] = False,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="run programs that the model writes, in a sandbox")
    ] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="cut prompts that are too long, from the left")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="prompts in a forward pass")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="file for the scores [default: benchmarks.json in a run's directory]"
        ),
    ] = None,
    base: BaseOption = "",
    client: ClientOption = "",
    store: StoreOption = None,
    dtype: DtypeOption = "",
    device: DeviceOption = "",
) -> None:
    """Score the federated and the base model on standard benchmarks, by lm-evaluation-harness."""
    require_extra("lm_eval", "benchmark", "benchmarks need lm-evaluation-harness")
    from fedmomentum.utils.hub import go_offline, parse_hub_name

    # Download Hub models now; after that, the Hub is not accessed anymore.
    named = model
    if parse_hub_name(model) is not None or base:
        from fedmomentum.run.hub_model import fetch

        model, base = fetch(model, base)
    go_offline()
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("TQDM_DISABLE", "1")
    from fedmomentum.benchmark.language_model import PromptSettings
    from fedmomentum.benchmark.saving import ResultFile
    from fedmomentum.benchmark.scoring import Benchmarks, Subject, run_benchmarks
    from fedmomentum.cli.benchmark_tables import CAPTION, benchmark_notes, benchmark_tables
    from fedmomentum.run.inference import LoadSettings
    from fedmomentum.utils.process import quiet_libraries

    subject = Subject(model, _names(rounds), client, store)
    asked = Benchmarks(
        _names(tasks),
        data,
        PromptSettings(limit, chat, batch_size),
        num_fewshot,
        run_code,
        truncate,
    )
    file = ResultFile.of(named, out)
    # Write each result as it arrives, so that an interruption loses at most one task.
    with quiet_libraries(), OUT.status("Reading the tasks") as status:

        def on_step(step: str, num_prompts: int) -> None:
            status.update(Text(f"{step}: {num_prompts} prompts" if num_prompts else step))

        results = run_benchmarks(
            subject,
            asked,
            LoadSettings(base, dtype, device),
            on_result=file.add,
            on_step=on_step,
        )
    for table in benchmark_tables(results):
        print_uncut(table)
    OUT.print(CAPTION, markup=False, soft_wrap=True)
    for note in benchmark_notes(results):
        OUT.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    for written in file.finish():
        OUT.print(f"-> {written}", markup=False, soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of names, without duplicates."""
    names = [name.strip() for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))
