"""One page a comparison: `comparison.html`, complete in itself, with the data of its figures as files beside it."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmomentum.errors import ConfigError
from fedmomentum.report import comparison_plots as plots
from fedmomentum.report.cells import (
    COMPARISON,
    Comparison,
    compare_runs,
    read_comparison,
    settings_of,
    summarise_methods,
)
from fedmomentum.report.html import render, write_page
from fedmomentum.report.run import Run
from fedmomentum.report.summary import natural_order

DATA = "comparison-data"
_OWN = {"method.name", "method.settings", "run.seed"}  # what a comparison compares


def write_comparison_page(folders: Sequence[Path], *, out: Path | None = None, target: float = 0.5) -> Path:
    """Write `comparison.html`, and a CSV a figure into `comparison-data/` beside it. Same folders, same bytes.

    Args:
        folders: one that `fedmomentum compare` wrote, or several runs' folders.
        out: where to write; by default the comparison's folder, or the current one.
        target: the exact match to count rounds, bytes and time to; a comparison has its own.

    Raises:
        ConfigError: a comparison among several folders.
        ModelError: a folder that is neither.
        DataError: a damaged file.
    """
    alone = len(folders) == 1 and (Path(folders[0]) / COMPARISON).is_file()
    if not alone and any((Path(folder) / COMPARISON).is_file() for folder in folders):
        raise ConfigError("report takes one comparison's folder, or several runs' folders, not both together")
    comparison = read_comparison(folders[0]) if alone else compare_runs(folders, target)
    place = Path(out or (folders[0] if alone else "."))
    content = _content(comparison, [] if alone else list(folders))
    page = render("comparison.html.j2", content, lambda plot: f"{DATA}/{plot.key}.csv")
    (place / DATA).mkdir(parents=True, exist_ok=True)
    for name in ("difference_plots", "score_plots", "method_plots", "client_plots"):
        for plot in content[name]:
            (place / DATA / f"{plot.key}.csv").write_text(plot.csv, encoding="utf-8", newline="\n")
    return write_page(place / "comparison.html", page)


def _content(comparison: Comparison, folders: Sequence[Path]) -> dict[str, Any]:
    summaries = summarise_methods(comparison)
    clients = sorted({name for cell in comparison.cells for name in cell.by_client}, key=natural_order)
    runs = [run for cell in comparison.cells for run in cell.runs]
    by_client = plots.client_plot(comparison, clients)
    references = {cell.method for cell in comparison.cells if cell.kind != "federated"}
    scored = [one for one in summaries if one.exact_match and one.loss and one.method not in references]
    means = plots.client_means(comparison, clients)
    return {
        "comparison": comparison,
        "summaries": summaries,
        "seeds": sorted({cell.seed for cell in comparison.cells}),
        "highest": max(scored, key=lambda one: _mean(one.exact_match), default=None),
        "lowest": min(scored, key=lambda one: _mean(one.loss), default=None),
        "least": min(
            (one for one in summaries if one.bytes_to_target), key=lambda one: _mean(one.bytes_to_target), default=None
        ),
        "items": sorted({cell.num_examples for cell in comparison.cells if cell.num_examples}),
        "model": str(runs[0].plan.get("model", "a model")),
        "clients": clients,
        "by_client": [[means.get((client, method)) for method in comparison.methods] for client in clients],
        "difference_plots": plots.difference_plots(comparison, summaries),
        "score_plots": plots.score_plots(comparison),
        "method_plots": plots.method_plots(comparison),
        "client_plots": [by_client] if by_client else [],
        "differing": _differing(comparison),
        "config_text": runs[0].config_text,
        "first": f"{comparison.cells[0].method}, seed {comparison.cells[0].seed}",
        "environment": _environments(runs),
        "commands": _commands(comparison, folders),
        "num_methods": len(summaries) - len(references),
        "num_references": len(references),
        "unfinished": [
            f"{cell.method}, seed {cell.seed}"
            for cell in comparison.cells
            if cell.points[-1].round < cell.runs[0].plan.get("num_rounds", 0)
        ],
    }


def _mean(value: Any) -> float:
    return float(value.mean)


def _differing(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings that the federated runs do not share, besides what is compared: key, then value and its methods."""
    cells = [cell for cell in comparison.cells if cell.kind == "federated"]
    tables = [(cell.method, _flat(settings_of(cell.runs[0]))) for cell in cells]
    found = []
    for key in sorted({key for _, table in tables for key in table} - _OWN):
        values: dict[str, list[str]] = {}
        for method, table in tables:
            values.setdefault(table.get(key, "not set"), []).append(method)
        if len(values) > 1:
            found.append((key, [(value, ", ".join(dict.fromkeys(who))) for value, who in values.items()]))
    return found


def _flat(table: dict[str, Any]) -> dict[str, str]:
    return {
        f"{section}.{key}": repr(value)
        for section, values in table.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _environments(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Every fact of the runs' environments, all its values."""
    facts: dict[str, list[str]] = {}
    for run in runs:
        for name, value in run.environment.items():
            inner = value.items() if isinstance(value, dict) else [(name, value)]
            for key, one in inner:
                facts.setdefault(key, []).append(str(one))
    return [(name, " | ".join(dict.fromkeys(values))) for name, values in facts.items()]


def _commands(comparison: Comparison, folders: Sequence[Path]) -> list[tuple[str, str]]:
    if comparison.command:
        return [("This comparison; started again, it goes on", comparison.command)]
    again = shlex.join(["fedmomentum", "report", *map(str, folders)])
    runs = [
        (
            f"A run like {folder}",
            shlex.join(["fedmomentum", "run", f"{folder}/config.toml", "--out", f"{folder}-again"]),
        )
        for folder in folders
    ]
    return [("This page", again), *runs]
