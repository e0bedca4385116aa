"""Our subclass of transformers' Trainer, and its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from fedmomentum.errors import FedMomentumError
from fedmomentum.training.function import OnStep, Penalty, TrainReport
from fedmomentum.training.isolation import train_without_noise
from fedmomentum.training.optimizer_state import set_moments

if TYPE_CHECKING:
    from fedmomentum.aggregation.moments import Moments
    from fedmomentum.data.tokenized import TokenizedExample, TokenizedExamples
    from fedmomentum.objectives.objective import Objective


class ExampleDataset(Dataset["TokenizedExample"]):
    """Tokenized examples as the trainer's data loader reads them."""

    def __init__(self, examples: TokenizedExamples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> TokenizedExample:
        return self._examples.example(index)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        return [self._examples.example(index).length for index in range(len(self))]


class LengthGroupedSampler(Sampler[int]):
    """A random order whose batches contain rows of similar length, to reduce padding.

    Each window of ``num_batches`` batches contains the examples that a random order would put
    there, but distributes them over its batches by length. transformers' own sampler starts with
    the longest of fifty batches: a client that takes a few steps per round would see nothing else.

    Args:
        lengths: Number of tokens of each example.
        batch_size: Examples per batch.
        num_batches: Batches per window.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, num_batches: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._num_batches = num_batches

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        # The trainer has already seeded the global generator.
        order = torch.randperm(len(self._lengths)).tolist()
        size = self._batch_size
        window = self._num_batches * size
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=self._lengths.__getitem__)
            num_full = len(rows) // size
            for batch in torch.randperm(num_full).tolist():
                yield from rows[batch * size : (batch + 1) * size]
            # An incomplete batch stays last; otherwise it would shift those after it.
            yield from rows[num_full * size :]


class LossRecorder(TrainerCallback):
    """Collector of the loss and learning rate of every step, which the trainer would only log."""

    def __init__(self, on_step: OnStep | None) -> None:
        self._on_step = on_step
        # Sums over the micro-batches of the current step.
        self._nll = 0.0
        self._num_tokens = 0
        # (loss, tokens) of each finished step.
        self._steps: list[tuple[float, int]] = []
        self._learning_rates: list[float] = []

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return len(self._steps)

    def add(self, nll: float, num_tokens: int) -> None:
        """Add the loss of one micro-batch.

        Raises:
            FedMomentumError: If the loss is not finite, since its gradient must not reach the
                weights.
        """
        if not math.isfinite(nll):
            raise FedMomentumError(
                f"the training loss is {nll} at step {self.step + 1}: lower the learning rate, and "
                "check the data and the base model if it happens at step 1"
            )
        self._nll += nll
        self._num_tokens += num_tokens

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the learning rate of the current step, which is the same for all groups."""
        del args, state, control
        optimizer: Optimizer = kwargs["optimizer"]
        self._learning_rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the current step."""
        del args, control, kwargs
        # The batch of a private step may be empty.
        loss = self._nll / self._num_tokens if self._num_tokens else math.nan
        self._steps.append((loss, self._num_tokens))
        self._nll = 0.0
        self._num_tokens = 0
        if self._on_step is not None:
            self._on_step(self.step, state.max_steps, loss)

    def report(self) -> TrainReport:
        """Return the report over all steps."""
        num_tokens = sum(tokens for _, tokens in self._steps)
        nll = sum(loss * tokens for loss, tokens in self._steps if tokens)
        first_loss, _ = self._steps[0]
        last_loss, _ = self._steps[-1]
        return TrainReport(
            loss=nll / num_tokens if num_tokens else math.nan,
            first_loss=first_loss,
            last_loss=last_loss,
            num_steps=self.step,
            num_tokens=num_tokens,
            learning_rate_sum=sum(self._learning_rates),
        )


class MomentsLoader(TrainerCallback):
    """Callback that sets the optimizer's moments when training begins.

    If they were set earlier, the trainer would move all optimizer state to the model's device, but
    torch needs the step counts of unfused AdamW on the CPU.

    Args:
        optimizer: The trainer's optimizer.
        parameters: The trained parameters by name.
        moments: The moments of some of them.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        moments: Mapping[str, Moments],
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._moments = moments

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the moments."""
        del args, state, control, kwargs
        set_moments(self._optimizer, self._parameters, self._moments)


class TrainableView(nn.Module):
    """A model as the trainer sees it: only its trainable parameters are parameters of the view.

    The trainer visits all modules and parameters a dozen or so times when it starts, and again in
    every step; a complete model has about a thousand of them.

    Args:
        model: The model.
        without_noise: Whether the model is trained without dropout and other noise.
    """

    # Attributes by which the trainer detects a quantized model, to reject one without an adapter;
    # nothing in the view is quantized.
    is_quantized = False
    is_loaded_in_4bit = False
    is_loaded_in_8bit = False
    hf_device_map: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: nn.Module, *, without_noise: bool = False) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is not a submodule
        self._without_noise = without_noise
        self._mode_is_set = False
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(self.view_name(name), parameter)

    @staticmethod
    def view_name(name: str) -> str:
        """Return the view's name for a parameter of the model.

        A module's own parameters must not have dots in their names. The slash in front avoids
        clashes with the model's attributes, which can also be read through the view.
        """
        return "/" + name.replace(".", "/")

    @property
    def wrapped_model(self) -> nn.Module:
        """The model."""
        return self._model[0]

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        return self.wrapped_model(**inputs)

    def train(self, mode: bool = True) -> TrainableView:
        """Set the model's mode, but only if it changes, not in every step."""
        if not self._mode_is_set or mode != self.training:
            if mode and self._without_noise:
                train_without_noise(self.wrapped_model)
            else:
                self.wrapped_model.train(mode)
        self._mode_is_set = True
        super().train(mode)
        return self

    def to(self, device: torch.device) -> TrainableView:  # type: ignore[override]
        """Move the complete model to a device, unless it is already there."""
        if any(parameter.device != device for parameter in self.parameters()):
            self.wrapped_model.to(device)
        return self

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the model, such as its configuration."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped_model, name)


@dataclass
class LocalTrainingArguments(TrainingArguments):
    """The trainer's arguments, modified to leave the model on its device.

    transformers would train on the first GPU, wherever the model is, and make it the current one.

    Attributes:
        model_device: The model's device.
    """

    model_device: str = "cpu"

    @cached_property
    def _setup_devices(self) -> torch.device:
        device = torch.device(self.model_device)
        # accelerate keeps one state per process, and moves batches to its device.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.distributed_state = PartialState(cpu=device.type == "cpu")
        self.distributed_state.device = device
        # Use one device per process; otherwise each batch would be split between replicas on all
        # visible GPUs.
        self._n_gpu = 0 if device.type == "cpu" else 1
        return device

    @property
    def place_model_on_device(self) -> bool:
        """Always False: moving a model, even to its own device, visits all of its tensors."""
        return False


class CompletionTrainer(Trainer):
    """A trainer that minimizes an objective and records its loss.

    Args:
        objective: What to minimize.
        recorder: Collects the losses.
        penalty: Added to the loss of every step; not included in the recorded losses.
        options: The arguments of `transformers.Trainer`.
    """

    # The loss of a micro-batch is divided by the number of tokens of the complete step.
    loss_is_scaled_for_ga = True
    objective: Objective
    recorder: LossRecorder
    penalty: Penalty | None

    def __init__(
        self,
        *,
        objective: Objective,
        recorder: LossRecorder,
        penalty: Penalty | None,
        **options: Any,
    ) -> None:
        super().__init__(callbacks=[recorder], **options)
        self.objective = objective
        self.recorder = recorder
        self.penalty = penalty

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and keep it from freeing memory when training begins.

        Nothing is left from earlier trainings, and freeing would run a garbage collection, which
        takes up to half a second, and return the GPU's cached memory.
        """
        super().create_accelerator_and_postprocess()
        accelerator: Any = self.accelerator
        accelerator.free_memory = lambda *objects: list(objects)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset: Any = self.train_dataset
        num_batches = self.args.max_steps * self.args.gradient_accumulation_steps
        batch_size = self.args.per_device_train_batch_size
        return LengthGroupedSampler(dataset.lengths, batch_size, num_batches)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Return the names of the parameters that weight decay applies to."""
        if not self.args.weight_decay:
            # Without decay the names are not needed, and finding them visits all modules.
            return []
        names = super().get_decay_parameter_names(model.wrapped_model)
        return [model.view_name(name) for name in names]

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0, since the estimate would visit all parameters in every step and is not used."""
        del inputs
        return 0

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[Any], int]:
        """Return the micro-batches of a step, and the number of their targets.

        The trainer's own count depends on the class of the model.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(self.objective.num_targets(batch) for batch in batches)

    def compute_loss(
        self,
        model: Any,  # a TrainableView
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute the loss of a micro-batch: the mean over the targets of the complete step."""
        del return_outputs
        assert num_items_in_batch is not None  # get_batch_samples has just counted it
        predictions = self.objective.predict(model.wrapped_model, inputs)
        batch_loss = self.objective.loss(
            predictions, label_smoothing=self.args.label_smoothing_factor
        )
        # Record the same loss as in evaluation, even if training uses label smoothing.
        self.recorder.add(batch_loss.nll.item(), batch_loss.num_targets)
        loss = batch_loss.optimized / num_items_in_batch
        if self.penalty is not None:
            # The last step of a pass may accumulate fewer micro-batches than usual.
            loss = loss + self.penalty() / self.current_gradient_accumulation_steps
        return loss
