"""What a client does with its data and a loaded global model: describe, train, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.aggregation.moments import Moments
from fedmomentum.aggregation.update_filter import ClientUpdate, UpdateFilter
from fedmomentum.client.factor_moments import moments_by_factor, moments_by_parameter
from fedmomentum.evaluation.teacher_forcing import evaluate, measure_reference
from fedmomentum.global_model.shared_moments import encode_means, encode_moments
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.probes import stack_probes
from fedmomentum.lora.adapter import Adapter, to_tensors
from fedmomentum.lora.half_precision import encode_factors, rounding_error, roundtrip, wire_dtype
from fedmomentum.objectives.objective import CAUSAL_LM, Objective
from fedmomentum.protocol.messages import (
    BASE_PROBES,
    EFFECTIVE_PROBES,
    OPTIMIZER,
    Answer,
    DescribeRequest,
    Description,
    EvaluateRequest,
    EvaluateResult,
    TrainRequest,
    TrainResult,
)
from fedmomentum.training.trainer import run_training
from fedmomentum.utils.process import installed_version

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.client.local_model import LocalModel
    from fedmomentum.client.private_party import PrivateParty
    from fedmomentum.data.tokenized import TokenizedExamples
    from fedmomentum.evaluation.tasks import Evaluation
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.training.function import TrainingFunction, TrainReport


# The packages whose versions affect the results of training.
REPORTED_PACKAGES = ("fedmomentum", "torch", "transformers", "peft")


@dataclass(frozen=True)
class WorkResult:
    """The outcome of a task.

    Attributes:
        answer: The reply's answer.
        num_examples: The number of examples behind the answer, which is its weight.
        tensors: The reply's tensors.
        moments: The optimizer's moments of the trained factors after training.
    """

    answer: Answer
    num_examples: int
    tensors: dict[str, Tensor]
    moments: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedAdapter:
    """The outcome of a training, before anything is prepared for upload.

    Attributes:
        adapter: The trained adapter.
        report: The report of the training.
        moments: The optimizer's moments of the trained factors.
    """

    adapter: Adapter
    report: TrainReport
    moments: Mapping[str, Moments]


@dataclass(kw_only=True)
class ClientWork:
    """A client's data and model, and the work that it does with them.

    Attributes:
        client_id: The client's name.
        train: Its training examples.
        test: Its held-out examples.
        method: The run's method according to this client's configuration; determines what is
            trained and what leaves the client.
        model: The model that it trains; the clients of one process may share one.
        objective: The objective for training and scoring.
        training_function: The user-defined training function, if any.
        on_step: Called after every training step with (client, step, number of steps, loss).
        update_filter: Changes updates before they are encoded; none by default.
        private: What it needs to train privately. A client with it takes part only in runs with
            differential privacy; a client without, only in runs without.
    """

    client_id: str
    train: TokenizedExamples
    test: TokenizedExamples
    method: Method
    model: LocalModel
    objective: Objective = CAUSAL_LM
    training_function: TrainingFunction | None = None
    on_step: Callable[[str, int, int, float], None] | None = field(default=None, repr=False)
    update_filter: UpdateFilter | None = None
    private: PrivateParty | None = None
    # Held-out pairs with their reference, by (start, end, batch size) of an evaluation.
    _references: dict[tuple[int, int, int], TokenizedExamples] = field(
        init=False, repr=False, default_factory=dict
    )

    @property
    def num_examples(self) -> int:
        """The number of training examples that others may know; with privacy, of public units."""
        return len(self.train) if self.private is None else self.private.public_units

    # ── describe ──

    def describe(self, request: DescribeRequest) -> WorkResult:
        """Return what the server needs to know before the first round."""
        model = self.model
        fresh = model.fresh
        if request.adapter:
            fresh = model.initial_global_model(self.method).adapter
        description = Description(
            sha256=model.identity.sha256 or "",
            tokenizer_sha256=model.identity.tokenizer_sha256 or "",
            labels=model.identity.labels,
            quantization=model.identity.quantization,
            num_parameters=model.num_parameters,
            num_train=0 if request.is_secure else self.num_examples,
            num_test=0 if request.is_secure else len(self.test),
            versions={name: installed_version(name) for name in REPORTED_PACKAGES},
            threads=torch.get_num_threads(),
            dtype=str(model.dtype).removeprefix("torch."),
            # The client's name for its base model may be a local path; the server has its own name.
            adapter_config={**fresh.config, "base_model_name_or_path": None},
            scalings=dict(fresh.scalings),
            shapes={module: matrix.shape for module, matrix in fresh.modules.items()},
            saved_shapes={name: list(tensor.shape) for name, tensor in fresh.saved.items()},
        )
        tensors = to_tensors(fresh) if request.adapter else {}
        return WorkResult(description, max(1, self.num_examples), tensors)

    # ── train ──

    def run_training(
        self,
        request: TrainRequest,
        server_round: int,
        moments: Mapping[str, Moments] | None = None,
    ) -> WorkResult:
        """Train the loaded model; return what the method uploads, and probes of the result.

        Args:
            request: What to train.
            server_round: The round.
            moments: `<module>.<factor>` to the optimizer's initial moments; None for a fresh
                optimizer whose moments are not reported.

        Raises:
            ConfigError: If the training function returns something other than a report.
            FedMomentumError: If training fails.
        """
        method = self.method
        start_factors = []
        if method.prunes:
            start_factors = [_detached_copy(m) for m in self.model.live_factors()]
        trained = self.train_adapter(request, server_round, moments)

        # Upload only the method's uploaded factors, encoded in the requested dtype.
        dtype = wire_dtype(request.uplink_dtype)
        uploaded = _uploaded(trained.adapter, method.uploaded_factors(server_round))
        tensors = encode_factors(uploaded, dtype)
        tensors |= self._probe_tensors(request.probe_seed)
        tensors |= _shared_tensors(request, trained.moments)

        next_rank = None
        if method.prunes:
            with torch.no_grad():
                next_rank = method.next_rank(
                    request.lora.rank, start_factors, self.model.live_factors()
                )
        rounding = rounding_error(trained.adapter, roundtrip(trained.adapter, dtype))
        result = train_result_of(
            trained.report, rounding, next_rank, is_private=self.private is not None
        )
        return WorkResult(result, self.num_examples, tensors, trained.moments)

    def train_adapter(
        self,
        request: TrainRequest,
        server_round: int,
        moments: Mapping[str, Moments] | None = None,
    ) -> TrainedAdapter:
        """Train the loaded model; return its adapter without uploading it; see `run_training`."""
        model = self.model
        start = model.adapter(self.client_id) if self.update_filter else None

        trained_factors = self.method.trained_factors(server_round)
        with model.training_only(trained_factors):
            # Finding the names visits all parameters of the model, so do it only if needed.
            names = {} if moments is None else model.parameter_names(trained_factors)
            report = self._train_model(request, moments_by_parameter(moments, names, model))
        trained_moments = moments_by_factor(report, names, model)

        adapter = model.adapter(self.client_id)
        if self.update_filter is not None and start is not None:
            update = ClientUpdate(self.client_id, server_round, start, adapter)
            adapter = self.update_filter.on_client(update)
        return TrainedAdapter(adapter, report, trained_moments)

    def _train_model(
        self, request: TrainRequest, moments: Mapping[str, Moments] | None
    ) -> TrainReport:
        """Train the live adapter with the hyperparameters of a request."""
        method = self.method

        def penalty() -> Tensor:
            value = method.penalty(self.model.live_factors())
            assert value is not None  # the method has one, or this is not called
            return value

        private = None
        if self.private is not None and request.private is not None:
            private = self.private.settings(request.private, request.hyperparameters)
        has_penalty = method.penalty(self.model.live_factors()) is not None
        return run_training(
            self.training_function,
            self.model.peft,
            self.train,
            request.hyperparameters,
            pad_token_id=self.model.tokenizer.pad_token_id,
            seed=request.seed,
            on_step=self._report_step,
            penalty=penalty if has_penalty else None,
            moments=moments,
            objective=self.objective,
            private=private,
        )

    def _report_step(self, step: int, num_steps: int, loss: float) -> None:
        if self.on_step is not None:
            self.on_step(self.client_id, step, num_steps, loss)

    # ── evaluate ──

    def run_evaluation(self, request: EvaluateRequest, global_model: GlobalModel) -> WorkResult:
        """Score the loaded model on the first held-out examples, and probe its weights."""
        tensors = {}
        applied_fraction = None
        if request.probe_seed is not None:
            probes = self.model.probes(request.probe_seed)
            tensors = _stacked(probes)
            if global_model.base_update:
                applied_fraction = self.model.applied_fraction(global_model, request.probe_seed)

        parts = [self._evaluate(part, request.batch_size) for part in _parts(request)]
        evaluations = [part for part in parts if part is not None]
        if not evaluations:
            return WorkResult(EvaluateResult(applied_share=applied_fraction), 1, tensors)
        combined = evaluations[0]
        for evaluation in evaluations[1:]:
            combined = combined + evaluation

        result = EvaluateResult(
            applied_share=applied_fraction,
            compared=evaluations[0].total,
            total=combined.total,
            by_category=dict(sorted(combined.by_category.items())),
        )
        return WorkResult(result, combined.total.num_examples, tensors)

    def _evaluate(self, part: slice, batch_size: int) -> Evaluation | None:
        """Score part of the held-out examples; return None if there are none."""
        examples = self.test[part]
        if not len(examples):
            return None
        if self.objective.compares_pairs:
            examples = self._references[part.start, part.stop, batch_size]
        return evaluate(
            self.model.peft,
            examples,
            pad_token_id=self.model.tokenizer.pad_token_id,
            batch_size=batch_size,
            objective=self.objective,
        )

    # ── reference ──

    def measure_references(self, request: TrainRequest | EvaluateRequest) -> None:
        """Measure the pairs that a request needs under the reference model, unless already done.

        The reference is the base model that the run started from. Measuring leaves the local model
        without a global model.
        """
        if not self.objective.compares_pairs:
            return
        pad_token_id = self.model.tokenizer.pad_token_id
        if isinstance(request, TrainRequest):
            if not all(self.train.reference):
                with self.model.base_alone() as base:
                    self.train = measure_reference(base, self.train, pad_token_id=pad_token_id)
            return
        # Use the same batches as for scoring, so that rounding does not look like a preference.
        size = request.batch_size
        for part in _parts(request):
            key = (part.start, part.stop, size)
            examples = self.test[part]
            if len(examples) and key not in self._references:
                with self.model.base_alone() as base:
                    self._references[key] = measure_reference(
                        base, examples, pad_token_id=pad_token_id, batch_size=size
                    )

    def _probe_tensors(self, seed: int | None) -> dict[str, Tensor]:
        """Return the probes of the live weights as reply tensors; empty without a seed."""
        return {} if seed is None else _stacked(self.model.probes(seed))


def _parts(request: EvaluateRequest) -> tuple[slice, slice]:
    """Return the examples that all evaluations of the run share, and the rest."""
    num_compared = min(request.num_compared, request.num_examples)
    return slice(0, num_compared), slice(num_compared, request.num_examples)


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────


def train_result_of(
    report: TrainReport,
    rounding: float = 0.0,
    next_rank: int | None = None,
    *,
    is_private: bool = False,
) -> TrainResult:
    """Convert a training report to an answer.

    Args:
        report: The report.
        rounding: The rounding error of the update in the upload dtype.
        next_rank: The client's rank in the next round, for methods that prune.
        is_private: Whether to withhold values without noise: losses and the number of targets.
    """
    return TrainResult(
        loss=None if is_private else report.loss,
        first_loss=None if is_private else report.first_loss,
        last_loss=None if is_private else report.last_loss,
        num_steps=report.num_steps,
        num_tokens=None if is_private else report.num_tokens,
        rounding=rounding,
        next_rank=next_rank,
        learning_rate_sum=report.learning_rate_sum or 0.0,
    )


def _detached_copy(factors: LowRank) -> LowRank:
    return LowRank(factors.B.detach().clone(), factors.A.detach().clone())


def _uploaded(adapter: Adapter, factors: str) -> dict[str, Tensor]:
    """Return an adapter's tensors without the kinds of factors, `B` or `A`, that are not sent."""
    retained = [f".lora_{kind}." for kind in "BA" if kind not in factors]
    uploaded = {}
    for name, tensor in to_tensors(adapter).items():
        if not any(kind in name for kind in retained):
            uploaded[name] = tensor
    return uploaded


def _shared_tensors(request: TrainRequest, moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return the optimizer moments that the reply contains."""
    if request.optimizer_state == "shared":
        encoded = encode_means(moments)
    elif request.optimizer_state == "shared-full":
        encoded = encode_moments(moments)
    else:
        encoded = {}
    return {OPTIMIZER + key: tensor for key, tensor in encoded.items()}


def _stacked(probes: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        BASE_PROBES: stack_probes(probes["base"]),
        EFFECTIVE_PROBES: stack_probes(probes["effective"]),
    }
