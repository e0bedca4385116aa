"""What is missing from a comparison's runs: rounds, clients' updates, and scores."""

from __future__ import annotations

from collections.abc import Iterator

from fedmomentum.formats.round_record import EVALUATION_FAILED
from fedmomentum.results.comparison import Comparison
from fedmomentum.results.method_run import MethodRun
from fedmomentum.results.participation import find_absences


def find_gaps(comparison: Comparison) -> list[str]:
    """Return one line for each thing that makes a comparison less than it seems.

    These are unfinished runs, clients whose updates or last evaluations are missing, last rounds
    without a score, scores over other examples than the baseline's, and rounds that were scored by
    different clients.
    """
    # What is missing from single runs, or sets them apart from the baseline's run of that seed.
    baseline_runs = {run.seed: run for run in comparison.runs_of(comparison.baseline)}
    gaps = []
    for run in comparison.method_runs:
        title = f"{run.method}, seed {run.seed}"
        for gap in [*_gaps_of_run(run), *_gaps_to_baseline(run, baseline_runs.get(run.seed))]:
            gaps.append(f"{title}: {gap}")
    # What concerns all runs of a method alike is said once.
    uneven = [run.method for run in comparison.method_runs if _is_uneven(run)]
    if uneven:
        gaps.append(
            f"{', '.join(dict.fromkeys(uneven))}: not all rounds were scored by the same clients, "
            "so the best round and the way to the target are over different examples"
        )
    return gaps


def _is_uneven(run: MethodRun) -> bool:
    """Return whether a run's rounds were scored by different clients, as far as is known."""
    for results in run.runs:
        clients = set()
        for record in results.rounds:
            if record.evaluation is not None and record.evaluation.by_client:
                clients.add(frozenset(record.evaluation.by_client))
        if len(clients) > 1:
            return True
    return False


def _gaps_of_run(run: MethodRun) -> Iterator[str]:
    for results in run.runs:
        last = results.rounds[-1]
        num_rounds = results.plan.num_rounds
        if not results.is_finished:
            yield f"not finished, {last.round} of {num_rounds} rounds; its scores are not the last"
        for absence in find_absences(results.rounds, results.partition):
            yield absence.headline
        for client, reason in last.failures.items():
            if EVALUATION_FAILED in reason:
                yield f"{client} gave no evaluation after round {last.round}"
    is_finished = all(results.is_finished for results in run.runs)
    was_scored = any(point.loss is not None for point in run.points)
    if is_finished and was_scored and run.num_examples is None:
        yield "no score after the last round, so it is left out of the means"


def _gaps_to_baseline(run: MethodRun, baseline: MethodRun | None) -> Iterator[str]:
    if baseline is None or None in (run.num_examples, baseline.num_examples):
        return
    if run.num_examples != baseline.num_examples:
        yield (
            f"scored on {run.num_examples} examples, and {baseline.method} on "
            f"{baseline.num_examples}; the difference is left out"
        )
