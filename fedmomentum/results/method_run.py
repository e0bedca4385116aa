"""MethodRun: one method with one seed, round by round, from the run directories it consists of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedmomentum.formats.round_record import EvaluationRecord, RoundRecord
from fedmomentum.formats.scores import NO_EXAMPLES, Score
from fedmomentum.results.run_results import RunResults
from fedmomentum.results.summary import find_federated_round, scored, total_seconds

Kind = Literal["federated", "centralized", "local"]


@dataclass(frozen=True)
class RoundPoint:
    """A method after one round; None for anything not measured.

    Scores are over the examples that all evaluations of a run share; bytes and seconds are totals
    since the start.
    """

    round: int
    exact_match: float | None = None
    loss: float | None = None
    num_bytes: float | None = None
    seconds: float | None = None
    retained_energy: float | None = None
    residual_rank: float | None = None
    angle_a: float | None = None
    angle_b: float | None = None
    update_cosine: float | None = None


@dataclass(frozen=True)
class MethodRun:
    """One method with one seed.

    Attributes:
        method: Its label in the comparison.
        seed: The run's seed.
        points: One per round; for `local`, the mean over the clients.
        exact_match: The score on all held-out examples after the last round, or of an unfinished
            run after the last evaluated one; None without an evaluation.
        loss: The loss on these examples, in `loss_unit`; None without an evaluation.
        num_examples: The number of these examples.
        by_client: Client to its (exact match, loss) on its own examples.
        runs: The runs that it was read from.
        kind: `federated`, `centralized` or `local`; the last two are references and send nothing.
        measure: What `exact_match` is called (`Score.measure`); None without an evaluation.
        loss_unit: The unit of the loss.
    """

    method: str
    seed: int
    points: tuple[RoundPoint, ...]
    exact_match: float | None
    loss: float | None
    num_examples: int | None
    by_client: dict[str, tuple[float, float]]
    runs: tuple[RunResults, ...]
    kind: Kind = "federated"
    measure: str | None = None
    loss_unit: str = "nats per token"

    def best(self, metric: str, choose: Callable[[list[float]], float]) -> float | None:
        """Return the best score of any round after round 0, that of the base model.

        Args:
            metric: A field of `RoundPoint`.
            choose: `max` or `min`.
        """
        values = []
        for point in self.points:
            value = getattr(point, metric)
            if point.round > 0 and value is not None and math.isfinite(value):
                values.append(value)
        return choose(values) if values else None

    def first_reaching(self, target: float) -> RoundPoint | None:
        """Return the first round whose exact match reaches the target."""
        for point in self.points:
            if point.exact_match is not None and point.exact_match >= target:
                return point
        return None


def make_method_run(
    method: str, seed: int, runs: Sequence[RunResults], *, kind: Kind = "federated"
) -> MethodRun:
    """Combine the runs of one method and seed.

    Args:
        method: Its label in the comparison.
        seed: The runs' seed.
        runs: One run, or one per client if the clients train alone.
        kind: See `MethodRun`. The category of a reference's examples is the client that holds them
            out.
    """
    # After the last round: the mean over the runs, if all were evaluated.
    final_scores = [_final_score(run) for run in runs]
    scores = [score for score in final_scores if score is not None]
    is_complete = len(scores) == len(runs)
    return MethodRun(
        method=method,
        seed=seed,
        points=_points(runs, sends=kind == "federated"),
        exact_match=_mean(score.exact_match for score in scores) if is_complete else None,
        loss=_mean(score.loss for score in scores) if is_complete else None,
        num_examples=scores[0].num_examples if is_complete else None,
        by_client=_scores_by_client(runs, kind),
        runs=tuple(runs),
        kind=kind,
        measure=scores[0].measure if scores else None,
        loss_unit=scores[0].loss_unit if scores else NO_EXAMPLES.loss_unit,
    )


def _final_round(run: RunResults) -> RoundRecord | None:
    """Return the round whose scores are the run's: the last one, if it is finished."""
    final_round = find_federated_round(run.rounds)
    # The evaluations of the last round may all have failed. Earlier scores are of another model,
    # and over fewer examples.
    if run.is_finished and final_round is not run.rounds[-1]:
        return None
    return final_round


def _final_score(run: RunResults) -> Score | None:
    final_round = _final_round(run)
    if final_round is None or final_round.evaluation is None:
        return None
    return scored(final_round.evaluation.total)


def _scores_by_client(runs: Sequence[RunResults], kind: Kind) -> dict[str, tuple[float, float]]:
    by_client = {}
    for run in runs:
        for client, score in _client_scores(run, kind).items():
            # A client that trains alone is scored with its own model on its own examples.
            is_its_model = kind != "local" or client in run.partition
            if scored(score) is not None and is_its_model:
                by_client[client] = (score.exact_match, score.loss)
    return by_client


def _client_scores(run: RunResults, kind: Kind) -> dict[str, Score]:
    """Return the last scores, keyed by the client that holds out the examples."""
    final_round = _final_round(run)
    if final_round is None or final_round.evaluation is None:
        return {}
    if kind == "federated":
        return final_round.evaluation.by_client
    return final_round.evaluation.by_category


def _points(runs: Sequence[RunResults], *, sends: bool) -> tuple[RoundPoint, ...]:
    """Return the points of the rounds that all runs have, averaged over the runs."""
    # Runs of single clients may have stopped after different rounds.
    points_by_round: dict[int, list[RoundPoint]] = {}
    for run in runs:
        for point in _run_points(run):
            points_by_round.setdefault(point.round, []).append(point)
    points = []
    for server_round in sorted(points_by_round):
        if len(points_by_round[server_round]) == len(runs):
            points.append(_average_point(points_by_round[server_round], sends=sends))
    return tuple(points)


def _run_points(run: RunResults) -> list[RoundPoint]:
    """Return one point per round of a run, with the bytes and seconds up to that round."""
    points = []
    num_bytes = 0.0
    seconds = 0.0
    for record in run.rounds:
        # Costs accumulate.
        num_bytes += sum(record.uplink_bytes.values()) + sum(record.downlink_bytes.values())
        seconds += total_seconds(record)
        # Scores and diagnostics are the round's own.
        score = _comparable_score(record.evaluation)
        diagnostics = record.diagnostics
        angles = diagnostics.subspace_angle if diagnostics else None
        point = RoundPoint(
            round=record.round,
            exact_match=score.exact_match if score else None,
            loss=score.loss if score else None,
            num_bytes=num_bytes,
            seconds=seconds,
            retained_energy=record.retained_energy,
            residual_rank=record.residual_rank,
            angle_a=angles.A if angles else None,
            angle_b=angles.B if angles else None,
            update_cosine=diagnostics.update_cosine if diagnostics else None,
        )
        points.append(point)
    return points


def _comparable_score(evaluation: EvaluationRecord | None) -> Score | None:
    """Return the score on the examples that all evaluations share, else on all examples."""
    if evaluation is None:
        return None
    return scored(evaluation.compared) or scored(evaluation.total)


def _average_point(points: Sequence[RoundPoint], *, sends: bool) -> RoundPoint:
    """Average several clients' runs after one round; they train in turn, so times are added."""
    # Scores and diagnostics are averaged if all runs have them.
    averages = {}
    for name in RoundPoint.__dataclass_fields__:
        if name not in ("round", "seconds", "num_bytes"):
            averages[name] = _mean(getattr(point, name) for point in points)
    return RoundPoint(
        round=points[0].round,
        num_bytes=points[0].num_bytes if sends else None,
        seconds=sum(point.seconds or 0.0 for point in points),
        **averages,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if a value is missing."""
    known = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return math.fsum(known) / len(known) if known else None
