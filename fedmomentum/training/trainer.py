"""Local training: steps on one client's examples, bit-reproducible for the same seed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor, nn
from transformers import PrinterCallback

from fedmomentum.errors import ConfigError, DataError, FedMomentumError, ModelError
from fedmomentum.objectives.objective import CAUSAL_LM
from fedmomentum.privacy.mechanism import PrivateSettings
from fedmomentum.training.arguments import (
    check_hyperparameters,
    check_optimizer,
    count_steps,
)
from fedmomentum.training.function import (
    TrainingFunction,
    TrainingKeywords,
    TrainingSettings,
    TrainReport,
    check_report,
)
from fedmomentum.training.hf_trainer import (
    CompletionTrainer,
    ExampleDataset,
    LocalTrainingArguments,
    LossRecorder,
    MomentsLoader,
    TrainableView,
)
from fedmomentum.training.isolation import global_state_restored, sdpa_backend_for
from fedmomentum.training.optimizer import (
    create_optimizer,
    device_arguments,
    trainer_arguments_from,
    with_warmup,
)
from fedmomentum.training.optimizer_state import check_moments, read_moments, trained_parameters
from fedmomentum.training.private_trainer import (
    PrivateTrainer,
    check_private_arguments,
    check_private_device,
)
from fedmomentum.training.unit_gradients import UnitGradients
from fedmomentum.utils.plugins import place_of

if TYPE_CHECKING:
    from fedmomentum.config.training import LocalTraining
    from fedmomentum.data.tokenized import TokenizedExample, TokenizedExamples
    from fedmomentum.objectives.objective import Objective


def run_training(
    function: TrainingFunction | None,
    model: nn.Module,
    examples: TokenizedExamples,
    hyperparameters: LocalTraining,
    **settings: Unpack[TrainingSettings],
) -> TrainReport:
    """Train with `train`, or with a user-defined training function.

    Args:
        function: The user's function; None for `train`.
        model: A model; its parameters with `requires_grad` are trained.
        examples: The client's examples.
        hyperparameters: The hyperparameters of this round.
        settings: The keyword arguments of `train`.

    Returns:
        The report of the training.

    Raises:
        FedMomentumError: If `train` fails, moments do not fit the model, or the user's function
            does not return a usable report.
    """
    if function is None:
        return train(model, examples, hyperparameters, **settings)
    if settings.get("private") is not None:
        raise ConfigError(
            "a training function of your own cannot be differentially private: nothing shows what "
            "it does with the examples; remove training.function, or [privacy.dp]"
        )
    keywords = TrainingKeywords(
        pad_token_id=settings["pad_token_id"],
        learning_rate=hyperparameters.learning_rate,
        local_steps=hyperparameters.local_steps,
        local_epochs=hyperparameters.local_epochs,
        batch_size=hyperparameters.batch_size,
        arguments=hyperparameters.arguments,
        seed=settings["seed"],
        on_step=settings.get("on_step") or _ignore_step,
    )
    penalty = settings.get("penalty")
    if penalty is not None:
        keywords["penalty"] = penalty
    moments = settings.get("moments")
    parameters = None
    if moments is not None:
        parameters = trained_parameters(model)
        check_moments(moments, parameters)
        keywords["moments"] = moments
    try:
        report = function(model, examples, **keywords)
    except FedMomentumError:
        raise
    except Exception as error:
        # Without the line it could not be found, since other clients go on.
        error.add_note(place_of(error))
        raise
    return check_report(
        report, function, learning_rate=hyperparameters.learning_rate, parameters=parameters
    )


def _ignore_step(step: int, num_steps: int, loss: float) -> None:
    """Do nothing."""


def train(
    model: nn.Module,
    examples: TokenizedExamples,
    hyperparameters: LocalTraining,
    **settings: Unpack[TrainingSettings],
) -> TrainReport:
    """Train a model's trainable parameters in place, with a new optimizer.

    The loss of a step is the mean over all of its targets, whatever the padding and the number of
    accumulated micro-batches. The learning rate is constant unless the arguments name a schedule.
    The order of examples and dropout depend only on ``seed``; the global random generators are
    restored. Nothing is printed or left on disk.

    Private training is DP-SGD: the examples of each step, dropout and noise come from the operating
    system's entropy, not from ``seed``, so no two trainings give the same result.

    Args:
        model: A model; its parameters with ``requires_grad`` are trained.
        examples: The client's examples.
        hyperparameters: Learning rate, steps or epochs, batch size, and further arguments.
        settings: See `TrainingSettings`.

    Returns:
        The losses, the number of steps and tokens, the sum of the learning rates, and the moments
        after the last step.

    Raises:
        ConfigError: If a hyperparameter is out of range, an argument cannot be set, or moments are
            given for an optimizer without moments.
        DataError: If there are no examples, or too few for a full batch if partial ones are
            dropped.
        ModelError: If no parameter of the model is trainable, or moments do not fit the model.
        FedMomentumError: If the loss or a weight is no longer finite.
    """
    moments = settings.get("moments")
    objective = settings.get("objective", CAUSAL_LM)
    private = settings.get("private")
    check_hyperparameters(hyperparameters)
    if moments is not None:
        check_optimizer(hyperparameters.arguments)
    if not examples:
        raise DataError("no examples to train on; give this client some, or leave it out")
    parameters = trained_parameters(model)
    if not parameters:
        raise ModelError(
            "no parameter of the model is trainable (requires_grad); add an adapter to it first"
        )
    # Count steps first, because the warm-up may be a fraction of them.
    num_steps = count_steps(len(examples), hyperparameters)
    if private is not None:
        check_private_arguments(hyperparameters.arguments)
        check_private_device(model)
        num_steps = private.mechanism.num_steps
    arguments = with_warmup(hyperparameters.arguments, num_steps)

    # Train in a directory that is deleted, and restore everything global that a trainer changes.
    recorder = LossRecorder(settings.get("on_step"))
    attention = sdpa_backend_for(model, examples.longest)
    restored = global_state_restored(
        model, undo_checkpointing=bool(arguments.get("gradient_checkpointing"))
    )
    with attention, restored, tempfile.TemporaryDirectory() as directory:
        # Pairs are compared with a reference that was measured in evaluation mode.
        view = TrainableView(model, without_noise=objective.compares_pairs)
        trainer_arguments = trainer_arguments_from(
            arguments,
            **device_arguments(next(iter(parameters.values())).device),
            **_batch_arguments(private, hyperparameters.batch_size),
            output_dir=directory,
            learning_rate=hyperparameters.learning_rate,
            max_steps=num_steps,
            seed=settings["seed"],
        )
        options: dict[str, Any] = {
            "objective": objective,
            "recorder": recorder,
            "penalty": settings.get("penalty"),
            "model": view,
            "args": trainer_arguments,
        }
        with _new_trainer(examples, settings["pad_token_id"], private, options) as trainer:
            trainer.remove_callback(PrinterCallback)
            optimizer = create_optimizer(trainer, num_steps)
            if moments is not None:
                trainer.add_callback(MomentsLoader(optimizer, parameters, moments))
            trainer.train()
    _check_finite(parameters.values(), recorder.step, hyperparameters.learning_rate)
    report = recorder.report()
    if moments is None:
        return report
    return replace(report, moments=read_moments(optimizer, parameters))


@contextmanager
def _new_trainer(
    examples: TokenizedExamples,
    pad_token_id: int,
    private: PrivateSettings | None,
    options: Mapping[str, Any],
) -> Iterator[CompletionTrainer]:
    """Yield a plain or a private trainer, and remove the latter's hooks afterward.

    Raises:
        ModelError: If the model cannot be trained privately.
    """
    objective: Objective = options["objective"]
    if private is None:

        def collate(rows: Sequence[TokenizedExample]) -> dict[str, Tensor]:
            return objective.collate(rows, pad_token_id)

        yield CompletionTrainer(
            train_dataset=ExampleDataset(examples), data_collator=collate, **options
        )
        return
    arguments: LocalTrainingArguments = options["args"]
    gradients = UnitGradients(
        options["model"].wrapped_model,
        objective,
        pad_token_id,
        max_rows=private.max_rows,
        label_smoothing=arguments.label_smoothing_factor,
    )
    with gradients.hooked():
        gradients.check_rows_are_independent()
        yield PrivateTrainer(settings=private, examples=examples, gradients=gradients, **options)


def _batch_arguments(private: PrivateSettings | None, batch_size: int) -> dict[str, Any]:
    """Return the trainer's batch arguments; private steps draw their own batches, and clip."""
    if private is None:
        return {"per_device_train_batch_size": batch_size}
    return {"per_device_train_batch_size": 1, "max_grad_norm": 0.0}


def _check_finite(parameters: Iterable[Tensor], step: int, learning_rate: float) -> None:
    """Reject trained weights that are not finite.

    Raises:
        FedMomentumError: If there are any.
    """
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise FedMomentumError(
            f"a trained weight is no longer finite after {step} steps at learning rate "
            f"{learning_rate:g}, though the loss was; lower the learning rate or set max_grad_norm"
        )
