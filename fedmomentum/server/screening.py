"""Which clients' updates are too large to come from the training that was requested.

Honest clients differ in how far they move: one with 360 examples makes 45 steps in an epoch, one
with 8 examples a single step, and different ranks, scalings, modules or learning rates change the
length of a step. So norms are not compared directly. Each is divided by the length of one optimizer
step of that client, and compared with two bounds:

- what the others did: the median, over the other clients, of how far they moved, times how much
  more work this client did (the factor is at least 1: a client that did less work is held to the
  others' distance);
- what its own steps can do: its number of steps, all in the same direction.

An update is left out if it is `max_ratio` times beyond the first bound *and* beyond the second. The
second bound protects honest clients whatever the others do, such as converging until they hardly
move, or sending zeros on purpose. It also makes the rule work for two clients. docs/security.md has
measurements of what this stops and what it does not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedmomentum.aggregation.client_adapters import with_fixed_residual
from fedmomentum.errors import DataError
from fedmomentum.formats.round_record import ScreeningRecord
from fedmomentum.server.client_deltas import distance
from fedmomentum.training.arguments import count_steps
from fedmomentum.training.step_bounds import StepSize

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.linalg.low_rank import LowRank
    from fedmomentum.lora.adapter import Adapter


STEP_MARGIN = 2.0
"""An update within this many times its own number of steps is never left out. Measured with AdamW,
from 1 to 1,250 steps: all steps together are at most 1.6 times as long as their number suggests."""

MAX_WORK_RATIO = 1000.0
"""A client's number of steps is capped at this many times the median of the others'. With
`local-epochs` it follows from the number of examples, which the client itself reports."""

_SAVED = "modules_to_save"
_ADAPTER = "adapter"


@dataclass(frozen=True)
class Displacement:
    """How far one client moved one part of the model.

    Attributes:
        norm: Frobenius norm of the change in the effective weights.
        step: The typical norm of one optimizer step of this client, given its factors.
        num_steps: How many steps it was asked to make.
    """

    norm: float
    step: float
    num_steps: int

    @property
    def in_steps(self) -> float:
        """How far the client moved, in units of its own steps."""
        if self.norm == 0:
            return 0.0
        return self.norm / self.step if self.step > 0 else math.inf


@dataclass(frozen=True)
class ScreeningResult:
    """The screening's result for one client.

    Attributes:
        ratio: How many times further it moved than the others would have with the same number of
            steps; None if there is no other client to compare with.
        reason: Why it is rejected; None if it is not.
    """

    ratio: float | None
    reason: str | None = None


class Screening:
    """Measures how far the clients of one round moved, and rejects those that moved too far.

    Args:
        config: The run's settings.
        method: The run's method, which determines what is trained and shared.
        server_round: The round.
        learning_rate: The learning rate of the round.
    """

    def __init__(
        self, config: Config, method: Method, server_round: int, learning_rate: float
    ) -> None:
        self._max_ratio = config.federation.outlier_norm_ratio
        self._hyperparameters = config.training.hyperparameters(
            server_round, config.federation.num_rounds
        )
        self._step_size = StepSize.of(config, learning_rate)
        self._trained = method.trained_factors(server_round)
        self._shared = method.shared_factors
        self._starts: dict[str, tuple[Adapter, dict[str, float]]] = {}
        self._displacements: dict[str, dict[str, Displacement]] = {}

    def add(
        self,
        client: str,
        update: Adapter,
        start: Callable[[], tuple[Adapter, Mapping[str, LowRank]]],
        *,
        like: str,
        num_examples: int,
    ) -> None:
        """Measure a client's update.

        Args:
            client: The client.
            update: What it sent.
            start: Returns the adapter that it trained and the part that stayed fixed, both as they
                were before training.
            like: A key shared by all clients that started from the same adapter.
            num_examples: How many examples it reports having.
        """
        # Clients with the same start share its step norms.
        if like not in self._starts:
            adapter, fixed_residual = start()
            steps = step_norms(adapter, self._step_size, trained=self._trained, shared=self._shared)
            self._starts[like] = with_fixed_residual(adapter, fixed_residual), steps
        start_adapter, steps = self._starts[like]
        num_steps = requested_steps(num_examples, self._hyperparameters)
        self._displacements[client] = displacements_of(
            update, start_adapter, steps, num_steps=num_steps, shared=self._shared
        )

    def reject_outliers(
        self, updates: dict[str, Adapter], failures: dict[str, str]
    ) -> dict[str, ScreeningRecord]:
        """Remove clients that moved too far from `updates`, and record why in `failures`.

        Returns:
            Each client's figures for the round's record.
        """
        displacements = dict(sorted(self._displacements.items()))
        results = screen(displacements, self._max_ratio, is_step_known=self._step_size.is_known)
        records = {}
        for client, result in results.items():
            # The ratio is infinite if a client changed what it does not train; JSON cannot say so.
            is_finite = result.ratio is not None and math.isfinite(result.ratio)
            records[client] = ScreeningRecord(
                norm=math.sqrt(
                    sum(displacement.norm**2 for displacement in displacements[client].values())
                ),
                ratio=result.ratio if is_finite else None,
                is_left_out=result.reason is not None,
            )
            if result.reason is not None:
                del updates[client]
                failures[client] = result.reason
        return records


# ── how far a client moved ──


def requested_steps(num_examples: int, hyperparameters: LocalTraining) -> int:
    """Return the number of optimizer steps that a client was asked to make, at least one.

    The number of steps that the client itself reports is not used.
    """
    try:
        return count_steps(num_examples, hyperparameters)
    except DataError:  # it claims fewer examples than it could train on
        return 1


def displacements_of(
    update: Adapter, start: Adapter, steps: Mapping[str, float], *, num_steps: int, shared: str
) -> dict[str, Displacement]:
    """Return how far each trained part of an update is from where the client started.

    Args:
        update: The client's update.
        start: What the client started from, including the parts that it was sent but does not
            train.
        steps: The result of `step_norms` for this client.
        num_steps: How many steps the client was asked to make.
        shared: The factors that all clients share. If B stays with each client, the server does not
            know the product, and only A is compared.
    """
    if shared == "BA":
        norms = {_ADAPTER: distance(update, start)}
    else:
        norms = {_ADAPTER: _factor_distance(update, start, shared)}
    if start.saved:
        squares = [
            float((update.saved[name].double() - tensor.double()).square().sum())
            for name, tensor in start.saved.items()
        ]
        norms[_SAVED] = math.sqrt(sum(squares))
    return {part: Displacement(norm, steps[part], num_steps) for part, norm in norms.items()}


def _factor_distance(one: Adapter, other: Adapter, factor: str) -> float:
    """Return the distance of one factor over all modules.

    If the ranks differ, the client did not train the module, which is skipped.
    """
    squares = 0.0
    for module, matrix in one.modules.items():
        ours, theirs = getattr(matrix, factor), getattr(other.modules[module], factor)
        if ours.shape == theirs.shape:
            squares += float((ours.double() - theirs.double()).square().sum())
    return math.sqrt(squares)


def step_norms(
    start: Adapter, step_size: StepSize, *, trained: str, shared: str
) -> dict[str, float]:
    """Return the norm of one optimizer step from `start`, for each part of the model.

    `(B + b)(A + a) - B A = b A + B a + b a`. In a step of Adam, the elements of b and a are about
    one learning rate in size, with signs nearly independent of A and B, so the squares of the terms
    add up.

    Args:
        start: What this client starts from: its own rank, scaling and modules.
        step_size: How long a step of the run's optimizer can be.
        trained: The factors that are trained in this round.
        shared: As in `displacements_of`.
    """
    lr = step_size.learning_rate
    if step_size.max_norm is not None:
        return _step_norms_of_sgd(start, lr * step_size.max_norm, trained, shared)
    size = lr * (step_size.per_element or 1.0)
    square = 0.0
    for module, matrix in start.modules.items():
        (out_size, in_size), s = matrix.shape, start.scalings[module]
        if shared != "BA":
            square += size**2 * in_size * matrix.rank
            continue
        A, B = float(matrix.A.double().square().sum()), float(matrix.B.double().square().sum())
        # Squared norms of b A, B a and b a; signs are independent of A and B.
        parts = (out_size * A if "B" in trained else 0.0) + (in_size * B if "A" in trained else 0.0)
        if trained == "BA":
            parts += size**2 * out_size * in_size * matrix.rank
        decayed = 2 * lr * step_size.weight_decay
        square += s**2 * (size**2 * parts + decayed**2 * A * B)
    saved = sum(tensor.numel() for tensor in start.saved.values())
    return {_ADAPTER: math.sqrt(square), _SAVED: size * math.sqrt(saved)}


def _step_norms_of_sgd(
    start: Adapter, length: float, trained: str, shared: str
) -> dict[str, float]:
    """Return the longest effective step of a given Euclidean length, in the worst direction."""
    longest = 1.0 if shared != "BA" else 0.0
    if shared == "BA":
        for module, matrix in start.modules.items():
            squares = [
                float(torch.linalg.matrix_norm(factor.double(), 2)) ** 2
                for factor, other in ((matrix.A, "B"), (matrix.B, "A"))
                if other in trained
            ]
            longest = max(longest, start.scalings[module] * math.sqrt(sum(squares)))
    return {_ADAPTER: length * longest, _SAVED: length}


# ── which clients moved too far ──


def screen(
    clients: Mapping[str, Mapping[str, Displacement]], max_ratio: float, *, is_step_known: bool
) -> dict[str, ScreeningResult]:
    """Decide which clients' updates are too large to be the result of honest training.

    Args:
        clients: Client to how far it moved each part of the model.
        max_ratio: How many times further than the others a client may go.
        is_step_known: Whether the length of a step limits how far a client can get. If not, only
            the others serve as a bound, and with fewer than three clients nobody is left out.

    Returns:
        A result for each client, in the order given.
    """
    results = {}
    for client, parts in clients.items():
        ratios, reasons = list[float](), list[str]()
        for part, displacement in parts.items():
            others = [other[part] for name, other in clients.items() if name != client]
            typical = typical_displacement(displacement, others)
            if typical is None or (not is_step_known and len(clients) < 3):
                continue
            ratio = displacement.in_steps / typical
            ratios.append(ratio)
            own_bound = STEP_MARGIN * _work(displacement, others) if is_step_known else 0.0
            if ratio > max_ratio and displacement.in_steps > own_bound:
                reasons.append(_reason(part, displacement, typical, ratio, max_ratio))
        # One part beyond both bounds is enough.
        results[client] = ScreeningResult(
            max(ratios, default=None), reasons[0] if reasons else None
        )
    return results


def typical_displacement(
    displacement: Displacement, others: Sequence[Displacement]
) -> float | None:
    """Return how far the others would have moved with this client's work, in steps.

    None if no other client moved.

    An honest client moves at most in proportion to its work, so one that did twice as much as
    another may go twice as far. One that did less may go as far as the other: on few examples,
    training keeps moving in one direction for longer. Clients that did not move are ignored.
    """
    work = _work(displacement, others)
    distances = [
        other.in_steps * max(1.0, work / other.num_steps) for other in others if other.norm > 0
    ]
    return statistics.median(distances) if distances else None


def _work(displacement: Displacement, others: Sequence[Displacement]) -> float:
    """Return a client's number of steps, capped at what is plausible."""
    if not others:
        return displacement.num_steps
    return min(
        displacement.num_steps,
        MAX_WORK_RATIO * statistics.median(other.num_steps for other in others),
    )


def _reason(
    part: str,
    displacement: Displacement,
    typical: float,
    ratio: float,
    max_ratio: float,
) -> str:
    """Return the error message for a client whose update is rejected."""
    what = (
        "its update"
        if part == _ADAPTER
        else f"its update of the modules trained in full ({_SAVED})"
    )
    return (
        f"{what} has norm {displacement.norm:.3g}, {displacement.in_steps:.3g} "
        f"times one optimizer step (steps requested: {displacement.num_steps}), and "
        f"{ratio:.0f} times the round's median for that work, {typical * displacement.step:.3g}; "
        f"at most {max_ratio:g} times is accepted (federation.outlier-norm-ratio)"
    )
