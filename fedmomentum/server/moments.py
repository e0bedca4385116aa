"""The optimizer moments that clients share: from their replies to the next round's start.

Every quantity here is a weighted mean over clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmomentum.aggregation.client_updates import ClientUpdates
from fedmomentum.aggregation.moment_sums import MeanMovement, factor_shapes
from fedmomentum.aggregation.moments import (
    Moments,
    OptimizerSettings,
    SecondMomentMeans,
    carry_moments,
    limit_first_moment,
    mean_moments,
    mean_step,
    reconstruct_moments,
)
from fedmomentum.errors import PayloadError
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.global_model.shared_moments import (
    SharedMoments,
    decode_means,
    decode_moments,
)
from fedmomentum.linalg.low_rank import CORE_DTYPE
from fedmomentum.protocol.messages import OPTIMIZER, Reply, TrainResult, train_result
from fedmomentum.server.round_data import TrainedRound, UploadedMoments
from fedmomentum.server.screening import requested_steps
from fedmomentum.training.arguments import TrainingFields, optimizer_options
from fedmomentum.training.step_bounds import ROUNDING as RATE_ROUNDING
from fedmomentum.training.step_bounds import clipping_norm

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.linalg.low_rank import LowRank
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.server.checkpoint import RunDirectory


# Relative tolerance for the rounding of second moments to 16 bits and float32.
ROUNDING = 0.02
# The largest sum of the learning rates of a round, of a training function with rates of its own.
LARGEST_RATE_SUM = 1e9


class SharedOptimizer:
    """Keeps one set of moments for all clients of a run.

    Args:
        config: The run's settings; `training.optimizer-state` is `shared` or `shared-full`.
        method: The run's method.
        directory: The run's directory, which holds the moments.
    """

    def __init__(self, config: Config, method: Method, directory: RunDirectory) -> None:
        self._method = method
        self._training = config.training
        self._num_rounds = config.federation.num_rounds
        self._directory = directory
        self._is_full = config.training.optimizer_state == "shared-full"
        arguments = config.training.arguments
        defaults = TrainingFields()
        self._has_second = arguments.get("optim") != "sgd"
        self._max_norm = clipping_norm(config)
        # The sum of the second moments that this round started with, by their hash.
        self._totals: dict[str | None, float] = {}
        self._settings = OptimizerSettings(
            beta1=arguments.get("adam_beta1", defaults.adam_beta1),
            beta2=arguments.get("adam_beta2", defaults.adam_beta2),
            epsilon=arguments.get("adam_epsilon", defaults.adam_epsilon),
            weight_decay=arguments.get("weight_decay", defaults.weight_decay),
            **self._buffer_settings(arguments),
        )

    @classmethod
    def of(cls, config: Config, method: Method, directory: RunDirectory) -> SharedOptimizer | None:
        """Return the shared optimizer of a run's clients; None if they share none."""
        return cls(config, method, directory) if config.training.shares_moments else None

    def _buffer_settings(self, arguments: Mapping[str, Any]) -> dict[str, float]:
        """Return what limits SGD's buffer; nothing for Adam, or if gradients are not clipped."""
        if self._has_second or self._max_norm is None:
            return {}
        options = optimizer_options(arguments)
        try:
            momentum = float(options.get("momentum", "0"))
            dampening = float(options.get("dampening", "0"))
        except ValueError:  # the clients refuse it
            return {}
        # Dampening is left out in the first step.
        gain = max(1.0, abs(1 - dampening))
        return {"momentum": momentum, "gradient_norm": gain * self._max_norm}

    # ── replies ──

    def read(
        self, reply: Reply, start: Adapter, server_round: int, previous: str | None
    ) -> UploadedMoments:
        """Check and return the moments in a reply.

        Args:
            reply: The reply.
            start: The adapter that the clients started from.
            server_round: The round.
            previous: Hash of the moments that the round started with; None for zeros.

        Raises:
            PayloadError: If a tensor is missing, unexpected or malformed, the number of steps or
                the sum of their learning rates is not what was requested, or second moments are
                larger than clipped gradients allow; the message names the client.
        """
        name = f"client {reply.client_id}"
        result = train_result(reply)
        self._check_steps(name, reply.num_examples, result, server_round)
        tensors = optimizer_tensors(reply.tensors)
        shapes = {}
        if self._has_second or self._is_full:
            shapes = factor_shapes(start, self._method.trained_factors(server_round))
        # Clients send either full moments, or only the row and column means of second moments.
        total = 0.0
        if self._is_full:
            moments = decode_moments(tensors, shapes, name)
            started = self.started(previous, start).moments
            for key, moment in moments.items():
                # A step without a gradient for this factor, as where a layer is skipped, is not
                # counted by the optimizer.
                first_step = started[key].step if key in started else 0
                last_step = first_step + result.num_steps
                if not first_step <= moment.step <= last_step:
                    raise PayloadError(
                        f"{name}: optimizer tensor {key}.step is {moment.step}; wanted at most "
                        f"{last_step}, and at least the {first_step} steps of the moments that the "
                        "client began with"
                    )
                if (moment.second is not None) != self._has_second:
                    raise PayloadError(
                        f"{name}: optimizer tensor {key}.second is there for another optimizer "
                        "than [training.arguments] names"
                    )
                total += 0.0 if moment.second is None else float(moment.second.double().sum())
        else:
            for means in decode_means(tensors, shapes, name).values():
                total += float(means.rows.double().mean() * len(means.rows) * len(means.columns))
        # Second moments are averages of squared gradients, which clipping bounds.
        if total > self.second_total(previous, start):
            raise PayloadError(
                f"{name}: its second moments add up to {total:.3g}; gradients that are clipped "
                f"(max_grad_norm) leave at most {self.second_total(previous, start):.3g}"
            )
        return UploadedMoments(tensors, result.num_steps, result.learning_rate_sum)

    def _check_steps(
        self, name: str, num_examples: int, result: TrainResult, server_round: int
    ) -> None:
        """Check the figures that everyone's next moments are computed from.

        The steps count in the bias correction, and movements are divided by the sum of the
        learning rates, so a false figure of one client would lengthen or shorten the next steps of
        all. A training function of the user's may make fewer steps than asked, at learning rates
        of its own.

        Raises:
            PayloadError: If they are not those of the work that was requested.
        """
        hyperparameters = self._training.hyperparameters(server_round, self._num_rounds)
        num_asked = requested_steps(num_examples, hyperparameters)
        fewest = num_asked
        largest_sum = RATE_ROUNDING * result.num_steps * hyperparameters.learning_rate
        if self._training.function is not None:
            fewest = 1
            largest_sum = LARGEST_RATE_SUM
        if not fewest <= result.num_steps <= num_asked:
            raise PayloadError(
                f"{name}: it reports {result.num_steps} steps; {num_asked} were requested, and to "
                "share the optimizer's moments they must be made"
            )
        if not 0 < result.learning_rate_sum <= largest_sum:
            raise PayloadError(
                f"{name}: its {result.num_steps} steps have learning rates of "
                f"{result.learning_rate_sum:g} in all; wanted at most {largest_sum:g}, to share "
                "the optimizer's moments"
            )

    def second_total(self, previous: str | None, start: Adapter) -> float:
        """Return the largest possible sum of all second moments after a round.

        Every step replaces a fraction of it by that of the squared norm of a clipped gradient.
        """
        if self._max_norm is None:
            return math.inf
        if previous not in self._totals:
            total = 0.0
            for moment in self.started(previous, start).moments.values():
                total += 0.0 if moment.second is None else float(moment.second.double().sum())
            self._totals = {previous: total}
        return max(self._totals[previous], self._max_norm**2) * (1 + ROUNDING)

    # ── the next round's moments ──

    def advance(
        self,
        previous: str | None,
        start: Adapter,
        trained: TrainedRound,
        weights: Mapping[str, float],
        adapter: Adapter,
    ) -> StoredObject:
        """Return the moments that the next round starts with.

        Args:
            previous: Hash of those that this round started with; None for zeros.
            start: The adapter that the clients started from.
            trained: The clients' updates and the moments that they sent.
            weights: Client to its weight in the sum.
            adapter: The adapter that the next round starts from.

        Raises:
            PayloadError: If they are not finite.
        """
        started = self.started(previous, start)
        moments: dict[str, Moments] = {}
        for module, after in adapter.modules.items():
            moments |= self._advance_module(module, started, start, trained, weights, after)
        stored = SharedMoments(moments, self._is_full).as_object()
        # Refuse moments that no client could read.
        self._decode(stored, adapter)
        return stored

    def started(self, previous: str | None, start: Adapter) -> SharedMoments:
        """Return the moments that a round starts with.

        Args:
            previous: Their hash; None for zeros.
            start: The adapter that the clients start from.
        """
        if previous is None:
            return SharedMoments({}, self._is_full)
        return self._decode(StoredObject(self._directory.read(previous)), start)

    def _decode(self, stored: StoredObject, adapter: Adapter) -> SharedMoments:
        return SharedMoments.read(stored, factor_shapes(adapter, "BA"), is_full=self._is_full)

    def _advance_module(
        self,
        module: str,
        started: SharedMoments,
        start: Adapter,
        trained: TrainedRound,
        weights: Mapping[str, float],
        after: LowRank,
    ) -> dict[str, Moments]:
        """Return one module's moments: their mean, in the coordinates of its new factors."""
        # The clients' updates and moments, in the same order.
        clients = list(weights)
        updates = ClientUpdates(
            [trained.updates[client].modules[module] for client in clients],
            torch.tensor(list(weights.values()), dtype=CORE_DTYPE),
        )
        summed = trained.summed
        uploads = [] if summed is not None else [trained.moments[client] for client in clients]
        # A factor that was not trained in this round keeps its moments.
        current = started.of_module(module)
        for kind in trained.factors:
            x_start = getattr(start.modules[module], kind).to(CORE_DTYPE)
            before = current[kind].first if kind in current else None
            if self._is_full:
                received = [self._received(upload, f"{module}.{kind}") for upload in uploads]
                mean = mean_moments(received, list(weights.values()))
            else:
                first_step = current[kind].step if kind in current else 0
                if summed is not None:
                    movement = summed.moments[f"{module}.{kind}"]
                else:
                    movement = self._mean_movement(module, kind, x_start, updates, uploads)
                mean = self._reconstruct(x_start, movement, first_step)
            current[kind] = limit_first_moment(mean, x_start, before, self._settings)
        # These moments belong to the mean factors; carry them to those of the next round.
        carried = carry_moments(current, updates.mean_factors(), after)
        return {f"{module}.{kind}": moment for kind, moment in carried.items()}

    def _received(self, upload: UploadedMoments, key: str) -> Moments:
        """Return one factor's moments, as a client sent them in full."""
        second = upload.tensors[f"{key}.second"] if self._has_second else None
        return Moments(upload.tensors[f"{key}.first"], second, int(upload.tensors[f"{key}.step"]))

    def _reconstruct(self, x_start: Tensor, movement: MeanMovement, first_step: int) -> Moments:
        """Reconstruct one factor's moments from the means of second moments and movement."""
        second = None
        if movement.rows is not None and movement.columns is not None:
            second = SecondMomentMeans(movement.rows, movement.columns).expand()
        step = first_step + movement.num_steps
        return reconstruct_moments(movement.displacement, x_start, second, step, self._settings)

    def _mean_movement(
        self,
        module: str,
        kind: str,
        x_start: Tensor,
        updates: ClientUpdates,
        uploads: list[UploadedMoments],
    ) -> MeanMovement:
        """Return the weighted means of the clients' figures for one factor."""
        key = f"{module}.{kind}"
        displacement = torch.zeros_like(x_start)
        rows = torch.zeros(len(x_start), dtype=CORE_DTYPE)
        columns = torch.zeros(x_start.shape[1], dtype=CORE_DTYPE)
        weights = updates.weights.tolist()
        for weight, update, upload in zip(weights, updates, uploads, strict=True):
            movement = getattr(update, kind).to(CORE_DTYPE) - x_start
            displacement.add_(movement, alpha=weight / upload.learning_rate_sum)
            if self._has_second:
                rows.add_(upload.tensors[f"{key}.rows"], alpha=weight)
                columns.add_(upload.tensors[f"{key}.columns"], alpha=weight)
        num_steps = mean_step([upload.num_steps for upload in uploads], weights)
        if not self._has_second:
            return MeanMovement(displacement, None, None, num_steps)
        return MeanMovement(displacement, rows, columns, num_steps)


def optimizer_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a reply's tensors for moments, with the prefix removed from their names."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER):
            found[name.removeprefix(OPTIMIZER)] = tensor
    return found
