"""Commands on models: `export`, `inspect`, `evaluate`, `generate`, and `models` for families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from fedmomentum.cli.options import (
    OUT,
    BaseOption,
    ClientOption,
    DeviceOption,
    DtypeOption,
    ModelPath,
    OutOption,
    RoundOption,
    StoreOption,
    check_output_directory,
    print_full_width,
    print_uncut,
)
from fedmomentum.errors import ConfigError

if TYPE_CHECKING:
    from fedmomentum.base_model.families import ClassifierFamily, Family
    from fedmomentum.run.saved_model import Result
    from fedmomentum.utils.hub_upload import Destination


def export(
    model: ModelPath,
    out: OutOption,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="merged: a transformers directory; adapter: one plain PEFT adapter"
        ),
    ],
    server_round: RoundOption = "last",
    dtype: Annotated[
        str,
        typer.Option(
            help="dtype of merged weights: float32, bfloat16, float16, auto [default: float32]",
            show_default=False,
        ),
    ] = "",
    base: BaseOption = "",
    client: ClientOption = "",
    store: StoreOption = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="device on which the export is compared with the run's model: auto, cpu, cuda, "
            "... [default: the run's]",
            show_default=False,
        ),
    ] = "",
    push_to: Annotated[
        str,
        typer.Option(
            "--push-to-hub",
            metavar="NAME",
            help="also upload it to the Hugging Face hub, as a private repository",
        ),
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="with --push-to-hub: make the repository public")
    ] = False,
    data_description: Annotated[
        str,
        typer.Option(
            "--data-description", help="what the clients' data is, in Markdown, for the model card"
        ),
    ] = "",
) -> None:
    """Write the result in a form that stock transformers or PEFT load without fedmomentum."""
    from fedmomentum.base_model.devices import set_up_device
    from fedmomentum.base_model.loading import pick_merged_dtype
    from fedmomentum.global_model.dequantized_base import base_quantization
    from fedmomentum.global_model.export import (
        export_adapter,
        export_merged,
        require_empty_directory,
    )
    from fedmomentum.run.publish import card_facts
    from fedmomentum.run.saved_model import choose_device, find_base, open_result
    from fedmomentum.run.tokenizers import own_tokenizer
    from fedmomentum.utils.process import quiet_libraries

    if to not in ("merged", "adapter"):
        raise ConfigError(f"--to must be merged or adapter; got {to!r}")
    # check for mistakes before anything is loaded
    if dtype and to == "adapter":
        raise ConfigError(
            f"--dtype {dtype} is for --to merged; leave it out, since an adapter keeps the "
            "precision of its factors"
        )
    torch_dtype = pick_merged_dtype(dtype or "float32")
    check_output_directory(out)
    require_empty_directory(out)
    destination = _choose_destination(push_to, public)
    result = open_result(model, server_round=server_round, client=client, store=store)
    base_directory = find_base(result, base)
    facts = card_facts(result, data_description)
    if destination is not None:
        facts = replace(facts, location=destination.repository)
        result = _with_public_base(result, base)
    chosen = choose_device(result, device)
    set_up_device(chosen, tf32=False)  # float32 products are compared
    # An adapter's directory may contain the tokenizer or template of its training.
    tokenizer = own_tokenizer(result, base_directory)
    with quiet_libraries(), OUT.status("Exporting"):
        if to == "adapter":
            export_adapter(
                result.model,
                out,
                base_directory=base_directory,
                device=chosen,
                tokenizer=tokenizer,
                facts=facts,
            )
            written = "one PEFT adapter, scaling 1, for the base model"
        else:
            fraction = export_merged(
                result.model,
                out,
                base_directory=base_directory,
                dtype=torch_dtype,
                tokenizer=tokenizer,
                device=chosen,
                facts=facts,
            )
            # `auto` is shown as the dtype that it stands for.
            shown_dtype = str(torch_dtype).removeprefix("torch.")
            written = (
                f"the merged model in {shown_dtype}; {fraction:.2%} of the change arrived in its "
                "weights"
            )
            quantization = base_quantization(result.model, base_directory)
            if quantization is not None:
                written += f"; the {quantization} base is dequantized in it"
    OUT.print(f"{result.title} -> {out}: {written}", markup=False, soft_wrap=True)
    if destination is not None:
        _push(out, destination, f"{result.model.method}, round {result.model.server_round}")


def _choose_destination(name: str, is_public: bool) -> Destination | None:
    """Return the target of an upload, checked before any work is done; None for no upload.

    Raises:
        ConfigError: If `--public` is given without `--push-to-hub`.
        HubError: If the upload could not succeed.
    """
    from fedmomentum.utils.hub_upload import choose_destination

    if name:
        return choose_destination(name, is_public=is_public)
    if is_public:
        raise ConfigError("--public is for --push-to-hub NAME; a local export is not published")
    return None


def _with_public_base(result: Result, base: str) -> Result:
    """Return a result that names its base by a public name; print a note if it has none."""
    from fedmomentum.run.publish import with_public_base

    model = with_public_base(result.model, base)
    if not model.base.name:
        note = (
            f"note: the base model is a directory here, {result.model.base.name}, which is not "
            "published: the export does not name it, and is loaded with --base DIRECTORY. If the "
            "hub has the same model, name it: --base OWNER/NAME"
        )
        OUT.print(Text(note, style="yellow"), soft_wrap=True)
    return replace(result, model=model)


def _push(out: Path, destination: Destination, message: str) -> None:
    """Upload an export and print its URL."""
    from fedmomentum.results.formatting import human_bytes
    from fedmomentum.utils.hub_upload import upload

    num_bytes = sum(file.stat().st_size for file in out.iterdir())
    with OUT.status(f"Uploading {human_bytes(num_bytes)} to {destination.repository}"):
        address = upload(out, destination, message)
    access = "public" if destination.is_public else "private"
    OUT.print(
        f"{out} -> {destination.repository} on the hub, {access}: {address}",
        markup=False,
        soft_wrap=True,
    )


def inspect(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|ADAPTER",
            help="run, global model or PEFT adapter; or an adapter's hub name, "
            "OWNER/NAME[@REVISION]",
            show_default=False,
        ),
    ],
) -> None:
    """Print what a run, global model or PEFT adapter contains: ranks, scalings, norms, hashes."""
    import atexit
    import gc

    # The command takes a second, a third of which would be spent on garbage collection: while torch
    # is imported, and again when Python exits, on everything that the import created.
    gc.disable()
    atexit.register(gc.freeze)
    try:
        from fedmomentum.cli.inspection import summarize

        for table in summarize(directory):
            print_full_width(table)
    finally:
        gc.enable()


def evaluate(
    model: ModelPath,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="examples: a file, directory or hub name [default: what the run held out]",
        ),
    ] = None,
    server_round: RoundOption = "last",
    category_column: Annotated[
        str | None, typer.Option(help="column whose values are scored separately")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="split of --data, if it has several [default: test]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="only the first N examples")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="most tokens in an example [default: the run's, or 512]")
    ] = None,
    by_generation: Annotated[
        bool, typer.Option("--generate", help="generate answers and score the text")
    ] = False,
    base: BaseOption = "",
    client: ClientOption = "",
    store: StoreOption = None,
    dtype: DtypeOption = "",
    device: DeviceOption = "",
) -> None:
    """Score the tuned and the base model on held-out examples: loss, perplexity, exact match."""
    from fedmomentum.cli.evaluation_tables import (
        evaluation_notes,
        evaluation_table,
        evaluation_title,
    )
    from fedmomentum.run.evaluate import evaluate_on
    from fedmomentum.run.inference import LoadSettings
    from fedmomentum.run.saved_model import open_result
    from fedmomentum.utils.process import quiet_libraries

    # Loading and scoring take a while; results are printed afterward.
    with quiet_libraries(), OUT.status("Evaluating"):
        result = open_result(model, server_round=server_round, client=client, store=store)
        comparison = evaluate_on(
            result,
            data,
            LoadSettings(base, dtype, device),
            category_column=category_column,
            split=split,
            limit=limit,
            max_length=max_length,
            by_generation=by_generation,
        )
    OUT.print(evaluation_title(result, comparison), markup=False, soft_wrap=True)
    print_uncut(evaluation_table(comparison))
    for note in evaluation_notes(comparison):
        OUT.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def generate(
    model: ModelPath,
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="may be given several times", show_default=False)
    ],
    server_round: RoundOption = "last",
    max_new_tokens: Annotated[int, typer.Option(help="longest answer in tokens")] = 64,
    plain: Annotated[
        bool, typer.Option("--plain", help="use the prompt as it is, without the chat template")
    ] = False,
    base: BaseOption = "",
    client: ClientOption = "",
    store: StoreOption = None,
    dtype: DtypeOption = "",
    device: DeviceOption = "",
) -> None:
    """Answer prompts with the base model and with the tuned model."""
    from fedmomentum.run.inference import LoadSettings, answers
    from fedmomentum.run.saved_model import open_result
    from fedmomentum.utils.process import quiet_libraries

    with quiet_libraries(), OUT.status("Generating"):
        result = open_result(model, server_round=server_round, client=client, store=store)
        rows = answers(
            result,
            prompt,
            LoadSettings(base, dtype, device),
            max_new_tokens=max_new_tokens,
            plain=plain,
        )
    # One small table per prompt, so that long answers wrap.
    for row in rows:
        table = Table(title=None, show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_row(Text("prompt", style="dim"), Text(row.prompt))
        table.add_row(Text("base", style="dim"), Text(row.base))
        table.add_row(Text("tuned", style="dim"), Text(row.tuned))
        OUT.print(table, "")


OVERVIEW = ("family", "adapted by default", "trains and exports")


def models(
    family: Annotated[
        str,
        typer.Argument(help="only families whose name or class contains this", metavar="[NAME]"),
    ] = "",
) -> None:
    """List model families: what is adapted by default, what is not, what is refused.

    Language models come first, then sequence classifiers.
    """
    from fedmomentum.base_model.families import CLASSIFIER_COLUMNS, COLUMNS, known_families

    wanted = family.lower()
    known = known_families()
    num_found = _print_kind("language model", COLUMNS, known.families, known.not_tried, wanted)
    num_found += _print_kind(
        "sequence classifier",
        CLASSIFIER_COLUMNS,
        known.classifiers,
        known.classifiers_not_tried,
        wanted,
    )
    if not num_found:
        raise ConfigError(
            f"no family is called {family!r}; `fedmomentum models` lists those that are known"
        )


def _print_kind(
    kind: str,
    columns: Sequence[str],
    families: Sequence[Family | ClassifierFamily],
    untried: Mapping[str, str],
    wanted: str,
) -> int:
    """Print the families of a kind whose name or class contains a text; return how many."""
    found = [one for one in families if wanted in f"{one.family} {one.kind}".lower()]
    reasons = {name: why for name, why in untried.items() if wanted in name.lower()}
    if found and wanted:
        _print_families(found, columns)
    elif found:
        _print_overview(found, f"{kind}s")
    for name, why in reasons.items():
        OUT.print(Text(f"{name}: not tried as a {kind} ({why})"))
    return len(found) + len(reasons)


def _print_families(families: Sequence[Family | ClassifierFamily], columns: Sequence[str]) -> None:
    """Print one small table per family, so that long cells wrap; paths are never truncated."""
    from fedmomentum.base_model.families import family_cells

    for one in families:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, cell in zip(columns, family_cells(one), strict=True):
            table.add_row(Text(name, style="dim"), Text(cell))
        OUT.print(table, "")


def _print_overview(families: Sequence[Family | ClassifierFamily], title: str) -> None:
    """Print one row per family."""
    columns = [Column(name, overflow="fold") for name in OVERVIEW]
    table = Table(*columns, title=title, show_lines=True)
    for one in families:
        table.add_row(one.family, Text("; ".join(one.adapted)), Text(one.refused or "yes"))
    OUT.print(table)
