"""Commands for adapters you already have: `aggregate`, `methods`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from fedmomentum.cli.options import OUT, OutOption, check_output_directory
from fedmomentum.errors import ConfigError

if TYPE_CHECKING:
    from fedmomentum.aggregation.method import Method


def aggregate(
    adapters: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER...",
            help="PEFT adapter directories, or hub names: OWNER/NAME[@REVISION]",
            show_default=False,
        ),
    ],
    out: OutOption,
    weights: Annotated[
        str | None, typer.Option(help="a number for each adapter, e.g. 3,1,2 [default: equal]")
    ] = None,
    method: Annotated[
        str, typer.Option(help="see `fedmomentum methods`, or module:Class")
    ] = "fedmomentum",
    rank: Annotated[
        int | None, typer.Option(help="rank of the result [default: the largest rank]")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="fedmomentum: balanced, procrustes, singular or aligned")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="fedmomentum: fraction of squared singular values kept")
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(help="lora_alpha of the result [default: the adapters' own scaling]"),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="global: a global model directory; adapter: one plain PEFT adapter"
        ),
    ] = "global",
    base: Annotated[
        str,
        typer.Option(
            "--base",
            help="base model of all adapters, whatever they call it: a directory or a hub name, "
            "NAME[@REVISION]",
        ),
    ] = "",
) -> None:
    """Aggregate adapters you already have, exactly, without loading their base model."""
    from fedmomentum.aggregation.registry import build_method
    from fedmomentum.global_model.export import export_adapter, require_empty_directory
    from fedmomentum.run.aggregate import aggregate_directories

    if to not in ("global", "adapter"):
        raise ConfigError(f"--to must be global or adapter; got {to!r}")
    check_output_directory(out)
    require_empty_directory(out)
    # pass on only what was given, since other methods lack these settings
    options = {"split": split, "energy": energy}
    settings = {key: value for key, value in options.items() if value is not None}
    built_method = build_method(method, settings)
    with OUT.status("Aggregating"):
        result = aggregate_directories(
            adapters,
            built_method,
            weights=_parse_weights(weights),
            rank=rank,
            lora_alpha=lora_alpha,
            base=base,
        )
        if to == "adapter":
            export_adapter(result.model, out)
        else:
            result.model.save(out)
    carried = ""
    if result.model.carried:
        carried = "; a tail is carried and not part of the model (energy below 1)"
    OUT.print(
        f"{result.num_adapters} adapters by {built_method!r} -> {out}: "
        f"{len(result.model.adapter.modules)} modules of rank {result.rank}, residual of rank up "
        f"to {result.residual_rank}{carried}",
        markup=False,
        soft_wrap=True,
    )


def _parse_weights(text: str | None) -> list[float] | None:
    """Parse `--weights`.

    Raises:
        ConfigError: If it is not a list of positive numbers separated by commas.
    """
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--weights must be numbers separated by commas, e.g. 3,1,2; got {text!r}"
        ) from error
    if not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(f"--weights must be positive numbers; got {text!r}")
    return weights


def methods() -> None:
    """List the methods for [method] name: what each one trains, sends and costs."""
    from fedmomentum.aggregation.registry import METHODS

    table = Table(
        Column("name", no_wrap=True),
        "method, paper",
        "exact",
        "ranks may differ",
        "trains",
        "up",
        "down",
        caption="parameters per module, round and client; P(x) = x (out + in), r the rank, n the "
        "number of clients. Two entries are for odd and even rounds. exact: with the default "
        "settings",
        caption_justify="left",
    )
    for name, method_class in METHODS.items():
        table.add_row(name, *_method_cells(method_class()))
    OUT.print(table)


def _method_cells(method: Method) -> list[Text | str]:
    downlink = _odd_and_even(method.sent_factors, FACTOR_COST)
    if method.residual_rank:
        residual = f"P(q), {method.residual_rank}"
        downlink = f"{downlink} + {residual}" if downlink else residual
    return [
        Text(method.paper),
        "yes" if method.exact else "no",
        "yes" if method.unequal_ranks else "no",
        _odd_and_even(method.trained_factors),
        _odd_and_even(method.uploaded_factors, FACTOR_COST),
        downlink,
    ]


FACTOR_COST = {"BA": "P(r)", "B": "r out", "A": "r in", "": ""}
"""The number of parameters of a module's factors."""


def _odd_and_even(factors_of: Callable[[int], str], shown_as: dict[str, str] | None = None) -> str:
    """Return the factors of odd and even rounds, or just once if they are the same."""
    factors = [factors_of(1), factors_of(2)]
    if shown_as is not None:
        factors = [shown_as[name] for name in factors]
    return ", ".join(dict.fromkeys(factors))
