"""MethodSummary: a method over its seeds, with differences from the baseline paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fedmomentum.results.comparison import Comparison
from fedmomentum.results.method_run import MethodRun
from fedmomentum.results.statistics import MeanEstimate, estimate_mean

CSV_HEADER = [
    "method",
    "seed",
    "exact_match",
    "loss",
    "items",
    "best_exact_match",
    "best_loss",
    "rounds",
    "bytes",
    "seconds",
    "rounds_to_target",
    "bytes_to_target",
    "seconds_to_target",
]


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds; the fields are those of comparison.json's `summary`.

    Attributes:
        method: The method.
        seeds: Its seeds.
        exact_match: After the last round, on all held-out examples.
        loss: After the last round, on all held-out examples.
        best_exact_match: The best of all rounds, on the examples that all evaluations share.
        best_loss: The lowest of all rounds, on the same examples.
        exact_match_difference: From the baseline, paired by seed, over the seeds in which both were
            scored on equally many examples.
        loss_difference: The loss's difference from the baseline, paired in the same way.
        reached: The number of seeds whose exact match reached the target.
        rounds_to_target: Rounds until the target was reached, over the seeds that reached it.
        bytes_to_target: Bytes of all clients, both ways, until then.
        seconds_to_target: Seconds until then.
    """

    method: str
    seeds: tuple[int, ...]
    exact_match: MeanEstimate | None
    loss: MeanEstimate | None
    best_exact_match: MeanEstimate | None
    best_loss: MeanEstimate | None
    exact_match_difference: MeanEstimate | None
    loss_difference: MeanEstimate | None
    reached: int
    rounds_to_target: MeanEstimate | None
    bytes_to_target: MeanEstimate | None
    seconds_to_target: MeanEstimate | None


def summarize_methods(comparison: Comparison) -> list[MethodSummary]:
    """Summarize every method over its seeds, in the order given."""
    return [_summarize(comparison, method) for method in comparison.methods]


def paired_differences(
    comparison: Comparison, method: str, score_of: Callable[[MethodRun], float | None]
) -> dict[int, float]:
    """Return a method's scores minus the baseline's, by seed.

    A seed is left out if one of the two scores is missing or not finite, or if they are over
    different numbers of examples.

    Args:
        comparison: The comparison.
        method: The method; the baseline itself has no differences.
        score_of: Extracts the score from a run.
    """
    if method == comparison.baseline:
        return {}
    baseline_runs = {one.seed: one for one in comparison.runs_of(comparison.baseline)}
    differences = {}
    for run in comparison.runs_of(method):
        baseline = baseline_runs.get(run.seed)
        if baseline is None or run.num_examples != baseline.num_examples:
            continue
        score = score_of(run)
        baseline_score = score_of(baseline)
        if score is None or baseline_score is None:
            continue
        if math.isfinite(score - baseline_score):
            differences[run.seed] = score - baseline_score
    return differences


def _summarize(comparison: Comparison, method: str) -> MethodSummary:
    """Summarize one method over its seeds."""
    runs = comparison.runs_of(method)
    exact_matches = paired_differences(comparison, method, lambda run: run.exact_match)
    losses = paired_differences(comparison, method, lambda run: run.loss)

    # The cost of reaching the target, over the seeds that reached it.
    candidates = [run.first_reaching(comparison.target) for run in runs]
    reached = [point for point in candidates if point is not None]
    return MethodSummary(
        method=method,
        seeds=tuple(run.seed for run in runs),
        exact_match=_estimate(run.exact_match for run in runs),
        loss=_estimate(run.loss for run in runs),
        best_exact_match=_estimate(run.best("exact_match", max) for run in runs),
        best_loss=_estimate(run.best("loss", min) for run in runs),
        exact_match_difference=_estimate(exact_matches.values()),
        loss_difference=_estimate(losses.values()),
        reached=len(reached),
        rounds_to_target=_estimate(float(point.round) for point in reached),
        bytes_to_target=_estimate(point.num_bytes for point in reached),
        seconds_to_target=_estimate(point.seconds for point in reached),
    )


def _estimate(values: Iterable[float | None]) -> MeanEstimate | None:
    """Estimate the mean of the values that were measured and are finite."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return estimate_mean(known)


def summary_tables(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the summaries as JSON values, for comparison.json."""
    return [asdict(summary) for summary in summarize_methods(comparison)]


def csv_rows(comparison: Comparison) -> list[list[Any]]:
    """Return the rows of comparison.csv: the header, then one row per method and seed."""
    rows: list[list[Any]] = [list(CSV_HEADER)]
    for run in comparison.method_runs:
        last = run.points[-1]
        reached = run.first_reaching(comparison.target)
        row = [
            run.method,
            run.seed,
            run.exact_match,
            run.loss,
            run.num_examples,
            run.best("exact_match", max),
            run.best("loss", min),
            last.round,
            last.num_bytes,
            last.seconds,
        ]
        if reached is None:
            row += [None, None, None]
        else:
            row += [reached.round, reached.num_bytes, reached.seconds]
        rows.append(row)
    return rows
