"""The page of a comparison, `comparison.html`, and its figures' data as CSV files."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmomentum.errors import ConfigError
from fedmomentum.report.figures import method_curves, method_scores
from fedmomentum.report.figures.svg import Plot
from fedmomentum.report.html import render, write_page
from fedmomentum.results.comparison import (
    COMPARED_KEYS,
    COMPARISON,
    Comparison,
    compare_runs,
    flat_settings,
    read_comparison,
    read_settings,
)
from fedmomentum.results.comparison_gaps import find_gaps
from fedmomentum.results.method_summary import MethodSummary, summarize_methods
from fedmomentum.results.run_results import RunResults
from fedmomentum.results.statistics import MeanEstimate
from fedmomentum.results.summary import natural_order

DATA = "comparison-data"
# The most lines on what is missing to show at once; the others unfold.
MAX_GAPS = 12

# Settings that differ between runs: key -> pairs of a value and its methods.
Differences = list[tuple[str, list[tuple[str, str]]]]


def write_comparison_page(
    directories: Sequence[str | Path], *, out: str | Path | None = None, target: float = 0.5
) -> Path:
    """Write `comparison.html`, and one CSV per figure in `comparison-data/`.

    The output is reproducible byte for byte.

    Args:
        directories: One directory written by `fedmomentum compare`, or those of several runs.
        out: Where to write; by default the comparison's directory, or the current one.
        target: The exact match up to which rounds, bytes and time are counted; a comparison has its
            own.

    Returns:
        The page's path.

    Raises:
        ConfigError: If a comparison is given together with others.
        ModelError: If a directory is neither a run nor a comparison.
        DataError: If a file is damaged.
    """
    # One comparison, or several runs.
    paths = [Path(directory) for directory in directories]
    are_comparisons = [(path / COMPARISON).is_file() for path in paths]
    if any(are_comparisons) and len(paths) > 1:
        raise ConfigError(
            "report takes one comparison's directory, or those of several runs, not both together"
        )
    if any(are_comparisons):
        comparison = read_comparison(paths[0])
        content = _content(comparison, _commands(comparison, []))
        out_dir = Path(out or paths[0])
    else:
        comparison = compare_runs(paths, target)
        content = _content(comparison, _commands(comparison, paths))
        out_dir = Path(out or ".")

    # Write the page and the data of its figures.
    plots = _plots(comparison, content["summaries"], content["clients"])
    page = render("comparison.html.j2", content | plots, lambda plot: f"{DATA}/{plot.key}.csv")
    (out_dir / DATA).mkdir(parents=True, exist_ok=True)
    for section in plots.values():
        for plot in section:
            file = out_dir / DATA / f"{plot.key}.csv"
            file.write_text(plot.csv, encoding="utf-8", newline="\n")
    return write_page(out_dir / "comparison.html", page)


@dataclass(frozen=True)
class _Leaders:
    """The methods on the cards at the top of the page; several if they are tied."""

    highest: list[MethodSummary]
    lowest: list[MethodSummary]
    least: list[MethodSummary]


def _content(comparison: Comparison, commands: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the data for the template, except figures."""
    summaries = summarize_methods(comparison)
    references = {one.method for one in comparison.method_runs if one.kind != "federated"}
    leaders = _find_leaders(summaries, references)
    clients = _client_names(comparison)
    means = method_scores.client_means(comparison, clients)
    runs = [run for one in comparison.method_runs for run in one.runs]
    first = comparison.method_runs[0]
    gaps = find_gaps(comparison)
    return {
        "comparison": comparison,
        "summaries": summaries,
        "seeds": sorted({one.seed for one in comparison.method_runs}),
        "highest_methods": leaders.highest,
        "lowest_methods": leaders.lowest,
        "least_methods": leaders.least,
        "items": _example_counts(comparison),
        "model": runs[0].plan.model,
        "clients": clients,
        "by_client": [
            [means.get((client, method)) for method in comparison.methods] for client in clients
        ],
        "differing": _find_differences(comparison),
        "config_text": runs[0].config_text,
        "first": f"{first.method}, seed {first.seed}",
        "environment": _environment_facts(runs),
        "commands": commands,
        "num_methods": len(summaries) - len(references),
        "num_references": len(references),
        "gaps": gaps[:MAX_GAPS],
        "more_gaps": gaps[MAX_GAPS:],
    }


def _plots(
    comparison: Comparison, summaries: Sequence[MethodSummary], clients: Sequence[str]
) -> dict[str, list[Plot]]:
    """Return the figures by section."""
    by_client = method_scores.client_plot(comparison, clients)
    return {
        "difference_plots": method_scores.difference_plots(comparison, summaries),
        "score_plots": method_curves.score_plots(comparison),
        "method_plots": method_curves.method_plots(comparison),
        "client_plots": [by_client] if by_client else [],
    }


def _find_leaders(summaries: Sequence[MethodSummary], references: set[str]) -> _Leaders:
    """Find the best method by each measure; references only compete for the fewest bytes.

    A method that reached the target with few seeds may have done so on the easy ones, so bytes are
    compared only between the methods that reached it with the most seeds.
    """
    scored = []
    for summary in summaries:
        if summary.exact_match and summary.loss and summary.method not in references:
            scored.append(summary)
    most = max((summary.reached for summary in summaries if summary.bytes_to_target), default=0)
    reached = [one for one in summaries if one.bytes_to_target and one.reached == most]
    return _Leaders(
        highest=_best(scored, max, _mean_of(lambda one: one.exact_match)),
        lowest=_best(scored, min, _mean_of(lambda one: one.loss)),
        least=_best(reached, min, _mean_of(lambda one: one.bytes_to_target)),
    )


def _best(
    summaries: Sequence[MethodSummary],
    choose: Callable[[list[float]], float],
    mean: Callable[[MethodSummary], float],
) -> list[MethodSummary]:
    """Return the methods whose mean is the highest or lowest of all."""
    if not summaries:
        return []
    best = choose([mean(summary) for summary in summaries])
    return [summary for summary in summaries if mean(summary) == best]


def _mean_of(
    estimate_of: Callable[[MethodSummary], MeanEstimate | None],
) -> Callable[[MethodSummary], float]:
    def mean(summary: MethodSummary) -> float:
        estimate = estimate_of(summary)
        assert estimate is not None
        return estimate.mean

    return mean


def _client_names(comparison: Comparison) -> list[str]:
    names: set[str] = set()
    for one in comparison.method_runs:
        names.update(one.by_client)
    return sorted(names, key=natural_order)


def _example_counts(comparison: Comparison) -> list[int]:
    counts = {one.num_examples for one in comparison.method_runs if one.num_examples}
    return sorted(counts)


def _find_differences(comparison: Comparison) -> Differences:
    """Find settings that differ between the federated runs, besides those being compared."""
    # The settings of each federated run.
    settings = []
    for one in comparison.method_runs:
        if one.kind == "federated":
            settings.append((one.method, flat_settings(read_settings(one.runs[0]))))
    keys: set[str] = set()
    for _, table in settings:
        keys.update(table)

    # Keys with several values, with the methods that have each value.
    differences = []
    for key in sorted(keys - COMPARED_KEYS):
        methods_by_value: dict[str, list[str]] = {}
        for method, table in settings:
            methods_by_value.setdefault(table.get(key, "not set"), []).append(method)
        if len(methods_by_value) > 1:
            values = []
            for value, methods in methods_by_value.items():
                values.append((value, ", ".join(dict.fromkeys(methods))))
            differences.append((key, values))
    return differences


def _environment_facts(runs: Sequence[RunResults]) -> list[tuple[str, str]]:
    """Return all facts about the runs' environments, with all their values."""
    facts: dict[str, list[str]] = {}
    for run in runs:
        for name, value in run.environment.items():
            table = value if isinstance(value, dict) else {name: value}
            for key, one in table.items():
                facts.setdefault(key, []).append(str(one))
    return [(name, " | ".join(dict.fromkeys(values))) for name, values in facts.items()]


def _commands(comparison: Comparison, directories: Sequence[Path]) -> list[tuple[str, str]]:
    """Return the comparison's command, or the commands for this page and for similar runs."""
    if comparison.command:
        return [("This comparison; run again, it continues where it stopped", comparison.command)]
    page = shlex.join(["fedmomentum", "report", *map(str, directories)])
    commands = [("This page", page)]
    for directory in directories:
        arguments = ["run", f"{directory}/config.toml", "--out", f"{directory}-again"]
        commands.append((f"A run like {directory}", shlex.join(["fedmomentum", *arguments])))
    return commands
