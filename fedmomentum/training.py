"""Local training: some steps on one client's examples, the same bits each time for the same seed."""

from __future__ import annotations

import gc
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fedmomentum.data.batches import IGNORED, completion_batch, inner_model, model_inputs, next_token_pairs
from fedmomentum.data.tokens import TokenisedExamples
from fedmomentum.errors import ConfigError, DataError, FedMomentumError, ModelError
from fedmomentum.training_arguments import PASSED_ON as PASSED_ON
from fedmomentum.training_arguments import SET_ELSEWHERE as SET_ELSEWHERE
from fedmomentum.training_arguments import check_arguments as check_arguments
from fedmomentum.training_arguments import count_steps, count_warmup

SHORT_ROW = 128
"""Tokens of a row up to which 16-bit training on a CPU takes torch's plain attention (docs/performance.md)."""


@dataclass(frozen=True)
class TrainReport:
    """What one call of ``train`` did.

    Attributes:
        loss: Mean loss of a completion token over the whole call, in nats.
        first_loss: The same over the first step only, before any change of the weights.
        last_loss: The same over the last step.
        num_steps: Optimiser steps.
        num_tokens: Completion tokens that the loss was taken on, repetitions included.
    """

    loss: float
    first_loss: float
    last_loss: float
    num_steps: int
    num_tokens: int


def train(
    model: nn.Module,
    examples: TokenisedExamples,
    *,
    pad_token_id: int,
    learning_rate: float,
    local_steps: int | None,
    local_epochs: float | None,
    batch_size: int,
    seed: int,
    arguments: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> TrainReport:
    """Train the model's trainable parameters in place, with a fresh optimiser and the loss on completions only.

    The loss of a step is the mean over all completion tokens in it, whatever the padding and however many
    micro-batches it is accumulated from. The learning rate is constant unless ``arguments`` asks for a schedule.
    Order of examples and dropout follow from ``seed`` alone; the global random generators are left as they were.
    Nothing is printed or kept on disk.

    Args:
        model: A causal language model; what has ``requires_grad`` is trained.
        examples: The client's examples.
        pad_token_id: Fills up short rows; any valid id, it is masked.
        learning_rate: The optimiser's learning rate, above 0.
        local_steps: Optimiser steps; exactly one of this and ``local_epochs`` is given.
        local_epochs: Passes over the examples, fractions allowed, rounded up to whole steps.
        batch_size: Rows in a batch; the last batch of a pass may be smaller.
        seed: Seed of the order and of dropout.
        arguments: Further fields of ``transformers.TrainingArguments``, those in ``PASSED_ON``.
        on_step: Called after each step with (step from 1, number of steps, loss).
        penalty: Added to the loss of every step; not part of the losses that are reported.

    Raises:
        ConfigError: A number is out of range, or ``arguments`` holds a name that cannot be set.
        DataError: There are no examples, or too few for one batch where only full ones count.
        ModelError: Nothing in the model is trainable.
        FedMomentumError: The loss or a weight is no longer finite.
    """
    arguments = dict(arguments or {})
    check_arguments(arguments)
    _check_numbers(learning_rate, local_steps, local_epochs, batch_size)
    if not examples:
        raise DataError("no examples to train on; give this client some, or leave it out")
    seen = _Trained(model)
    trained = list(seen.parameters())
    if not trained:
        raise ModelError("no parameter of the model is trainable (requires_grad); add an adapter to it first")
    num_steps = count_steps(
        len(examples),
        local_steps=local_steps,
        local_epochs=local_epochs,
        batch_size=batch_size,
        arguments=arguments,
    )
    if "warmup_steps" in arguments:
        arguments["warmup_steps"] = count_warmup(num_steps, arguments)
        # The plain constant schedule would ignore it.
        arguments.setdefault("lr_scheduler_type", "constant_with_warmup")
    progress = _Progress(on_step)
    attention = attention_for(model, max(map(len, examples.input_ids)))
    restored = _global_state_restored(model, undo_checkpointing=bool(arguments.get("gradient_checkpointing")))
    with _older_objects_left_alone(), attention, restored, tempfile.TemporaryDirectory() as folder:
        settings = _settings(
            arguments,
            output_dir=folder,
            learning_rate=learning_rate,
            max_steps=num_steps,
            per_device_train_batch_size=batch_size,
            seed=seed,
            use_cpu=trained[0].device.type == "cpu",
            dataloader_pin_memory=trained[0].device.type == "cuda",
        )
        # One process, one device: several visible GPUs would otherwise split each batch between replicas.
        settings._n_gpu = min(settings.n_gpu, 1)
        trainer = _CompletionTrainer(
            model=seen,
            args=settings,
            train_dataset=_Rows(examples),
            data_collator=lambda rows: completion_batch(
                [ids for ids, _ in rows], [num_prompt for _, num_prompt in rows], pad_token_id
            ),
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.progress, trainer.penalty = progress, penalty
        _make_optimizer(trainer, num_steps)
        trainer.train()
    if not all(parameter.isfinite().all() for parameter in trained):
        raise FedMomentumError(
            f"a trained weight is no longer finite after {progress.step} steps at learning rate {learning_rate:g}, "
            "though the loss was; lower the learning rate or set max_grad_norm"
        )
    return progress.report()


def _settings(arguments: Mapping[str, Any], **decided: Any) -> _Settings:
    """Return the trainer's settings: the user's, those decided by the run, and those that keep it silent.

    Raises:
        ConfigError: If transformers does not know a value, such as the name of an optimizer.
    """
    fixed = {
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    try:
        return _Settings(**{"lr_scheduler_type": "constant", **arguments, **decided, **fixed})
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"[training.arguments] cannot be used: {_first_line(error)}") from error


def _make_optimizer(trainer: Trainer, num_steps: int) -> None:
    """Make the trainer's optimizer and schedule, which it would otherwise make itself.

    Raises:
        ConfigError: If the optimizer's package is missing, or an argument of the optimizer or schedule is.
    """
    try:
        trainer.create_optimizer_and_scheduler(num_training_steps=num_steps)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        optimizer, schedule = trainer.args.optim, trainer.args.lr_scheduler_type
        raise ConfigError(
            f"[training.arguments]: the optimizer {getattr(optimizer, 'value', optimizer)} with the schedule "
            f"{getattr(schedule, 'value', schedule)} cannot be made: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def attention_for(model: nn.Module, longest: int) -> AbstractContextManager[Any]:
    """The kernel of torch's attention for training on rows of at most ``longest`` tokens.

    On a CPU in 16 bits the backward of torch's flash attention costs more than the matrix of scores that it saves,
    as long as rows are short. The plain kernel computes in float32 inside, and keeps ``longest ** 2`` numbers a head.
    Everywhere else torch chooses. A model with an attention of its own is left alone.
    """
    is_short = longest <= SHORT_ROW and next(model.parameters()).device.type == "cpu"
    is_narrow = is_short and any(parameter.dtype.itemsize < 4 for parameter in model.parameters())
    return sdpa_kernel(SDPBackend.MATH) if is_narrow else nullcontext()


class _Rows(Dataset):
    """The examples as the trainer's data loader wants them."""

    def __init__(self, examples: TokenisedExamples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> tuple[Sequence[int], int]:
        return self._examples.input_ids[index], self._examples.num_prompt_tokens[index]


class _ByLength(Sampler[int]):
    """A random order whose batches hold rows of like length, so that little is padded.

    The first ``num_batches`` batches hold the examples that a random order would put there, only dealt out otherwise,
    and so on. transformers' own sampler starts with the longest of fifty batches: a client that makes a few steps a
    round would train on nothing else.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, num_batches: int) -> None:
        self._lengths, self._batch_size, self._num_batches = lengths, batch_size, num_batches

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self._lengths)).tolist()  # the trainer has seeded the global generator
        window, size = self._num_batches * self._batch_size, self._batch_size
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=self._lengths.__getitem__)
            whole = len(rows) // size
            for batch in torch.randperm(whole).tolist():
                yield from rows[batch * size : (batch + 1) * size]
            yield from rows[whole * size :]  # a short batch stays the last, or it would shift those behind it


class _Progress(TrainerCallback):
    """Collects the loss, which the trainer itself would only log."""

    def __init__(self, on_step: Callable[[int, int, float], None] | None) -> None:
        self._on_step = on_step
        self._nll = 0.0  # of the step under way, over its micro-batches
        self._num_tokens = 0
        self._steps: list[tuple[float, int]] = []  # (loss, tokens) of each finished step

    @property
    def step(self) -> int:
        """Steps finished."""
        return len(self._steps)

    def add(self, nll: float, num_tokens: int) -> None:
        """Count one micro-batch; refuse a loss that is not finite before it reaches the weights."""
        if not math.isfinite(nll):
            raise FedMomentumError(
                f"the training loss is {nll} at step {self.step + 1}: lower the learning rate, and check the data "
                "and the base model if it happens at step 1"
            )
        self._nll += nll
        self._num_tokens += num_tokens

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]  # noqa: D102
        del args, control, kwargs
        loss = self._nll / self._num_tokens
        self._steps.append((loss, self._num_tokens))
        self._nll, self._num_tokens = 0.0, 0
        if self._on_step is not None:
            self._on_step(self.step, state.max_steps, loss)

    def report(self) -> TrainReport:
        """Return the report over all steps."""
        num_tokens = sum(tokens for _, tokens in self._steps)
        loss = sum(loss * tokens for loss, tokens in self._steps) / num_tokens
        return TrainReport(loss, self._steps[0][0], self._steps[-1][0], self.step, num_tokens)


class _Trained(nn.Module):
    """A model as the trainer sees it: only what is trained is a parameter of it.

    The trainer walks over all modules and parameters some dozen times when it starts, and again in every step. Of a
    whole model they are a thousand.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = [model]  # in a list: no submodule
        self.is_set = False
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(self.own_name(name), parameter)

    @staticmethod
    def own_name(name: str) -> str:
        """What a parameter of the model is called here: a module's own parameters have no dot in their names."""
        return "/" + name.replace(".", "/")  # and none begins so: the model's own attributes are seen here, too

    @property
    def whole(self) -> nn.Module:
        """The model."""
        return self._whole[0]

    def forward(self, **inputs: Any) -> Any:
        """The model's own."""
        return self.whole(**inputs)

    def train(self, mode: bool = True) -> _Trained:
        """Set the model's mode, once and not in every step."""
        if not self.is_set or mode != self.training:
            self.whole.train(mode)
        self.is_set = True
        return super().train(mode)

    def to(self, device: torch.device) -> _Trained:  # type: ignore[override]
        """Move the model, and not only what is trained of it, unless it is there."""
        if any(parameter.device != device for parameter in self.parameters()):
            self.whole.to(device)
        return self

    def __getattr__(self, name: str) -> Any:
        """What the trainer asks of a model beside, such as its configuration, or to use checkpoints."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.whole, name)


class _Settings(TrainingArguments):
    @property
    def place_model_on_device(self) -> bool:
        """The model is where it should be; moving it there walks over all of its tensors."""
        return False


class _CompletionTrainer(Trainer):
    """A trainer that projects to the vocabulary only where there are labels."""

    loss_is_scaled_for_ga = True
    progress: _Progress
    penalty: Callable[[], Tensor] | None = None

    def _get_train_sampler(self, train_dataset=None):  # type: ignore[no-untyped-def]
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset
        lengths = [len(rows[i][0]) for i in range(len(rows))]
        num_batches = self.args.max_steps * self.args.gradient_accumulation_steps
        return _ByLength(lengths, self.args.per_device_train_batch_size, num_batches)

    def get_decay_parameter_names(self, model):  # type: ignore[no-untyped-def]  # noqa: D102
        # Without decay nobody needs to know; finding out walks over all modules several times.
        names = super().get_decay_parameter_names(model.whole) if self.args.weight_decay else []
        return [model.own_name(name) for name in names]

    def floating_point_ops(self, inputs):  # type: ignore[no-untyped-def]  # noqa: D102
        # An estimate that nobody reads; it walks over all of the model's parameters in every step.
        del inputs
        return 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):  # type: ignore[no-untyped-def]  # noqa: D102
        # Counted here, over all micro-batches of a step, because the trainer's own count depends on the model class.
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)

    def compute_loss(  # noqa: D102
        self,
        model: Any,  # a _Trained
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        del return_outputs
        assert num_items_in_batch is not None  # get_batch_samples has just counted it
        logits, labels = next_token_pairs(model(**model_inputs(model.whole, inputs)).logits, inputs["labels"])
        scores, wanted = logits.float().flatten(0, 1), labels.flatten()
        nll = F.cross_entropy(scores, wanted, ignore_index=IGNORED, reduction="sum")
        # What is reported is the loss of the evaluation, also where smoothed labels are trained on.
        self.progress.add(nll.item(), int((labels != IGNORED).sum()))
        loss = nll
        if self.args.label_smoothing_factor:
            loss = F.cross_entropy(
                scores,
                wanted,
                ignore_index=IGNORED,
                reduction="sum",
                label_smoothing=self.args.label_smoothing_factor,
            )
        loss = loss / num_items_in_batch
        if self.penalty is not None:
            # The last step of a pass may have fewer micro-batches than are usually accumulated.
            loss = loss + self.penalty() / self.current_gradient_accumulation_steps
        return loss


def _check_numbers(learning_rate: float, local_steps: int | None, local_epochs: float | None, batch_size: int) -> None:
    if (local_steps is None) == (local_epochs is None):
        raise ConfigError(
            f"exactly one of local-steps and local-epochs must be given; got {local_steps} and {local_epochs}"
        )
    amounts = {
        "learning-rate": learning_rate,
        "local-steps": local_steps,
        "local-epochs": local_epochs,
        "batch-size": batch_size,
    }
    for key, value in amounts.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{key} must be above 0; got {value}")


@contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """Keep the objects that are there already out of garbage collection, for a while.

    The trainer collects garbage when it starts. That would look at every object of every library: a fifth of a second
    and more, for each client in each round.
    """
    if gc.get_freeze_count():  # Somebody else has put objects aside, and wants them to stay there.
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _global_state_restored(model: nn.Module, *, undo_checkpointing: bool) -> Iterator[None]:
    """Undo what a trainer does to the world: seeds the global generators, sets the model's mode and its config."""
    was_training = model.training
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        model.train(was_training)
        if use_cache is not None:
            config.use_cache = use_cache
        if undo_checkpointing:
            inner_model(model).gradient_checkpointing_disable()
