"""Local training with differential privacy: transformers' Trainer with the steps of DP-SGD."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedmomentum.base_model.devices import rounds_to_tf32
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.privacy.entropy import normals, poisson_sample, random_seed
from fedmomentum.privacy.mechanism import Mechanism, PrivateSettings
from fedmomentum.training.arguments import DEFAULT_OPTIMIZER, OPTIMIZERS_WITH_MOMENTS
from fedmomentum.training.hf_trainer import CompletionTrainer
from fedmomentum.training.unit_gradients import UnitGradients

if TYPE_CHECKING:
    from fedmomentum.data.tokenized import TokenizedExamples

LOG = logging.getLogger("fedmomentum")

ARGUMENTS_WITHOUT_PRIVACY = {
    "dataloader_drop_last": "the examples of a step are drawn at random",
    "gradient_accumulation_steps": "set training.batch-size to the examples of a step, and "
    "privacy.dp.max-rows to those of a pass",
    "gradient_checkpointing": "the gradient of each example needs a plain forward pass",
    "gradient_checkpointing_kwargs": "the gradient of each example needs a plain forward pass",
    "max_grad_norm": "the gradient of each unit is clipped to privacy.dp.max-grad-norm instead",
    "train_sampling_strategy": "the examples of a step are drawn at random",
}
"""Training arguments that private training rejects, each with the reason."""


class StepDataset(Dataset[int]):
    """A dataset with one dummy item per step, since each step draws its own examples."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> int:
        return index


def no_inputs(items: Sequence[int]) -> dict[str, Any]:
    """Collate the items of a `StepDataset` into empty inputs."""
    del items
    return {}


class PrivateTrainer(CompletionTrainer):
    """A trainer whose optimizer sees the data only as noised sums of clipped gradients.

    Args:
        settings: The mechanism, and what it protects.
        examples: The examples.
        gradients: Computes the clipped sums; its hooks are on the model.
        options: The arguments of `CompletionTrainer`.
    """

    def __init__(
        self,
        *,
        settings: PrivateSettings,
        examples: TokenizedExamples,
        gradients: UnitGradients,
        **options: Any,
    ) -> None:
        num_steps = settings.mechanism.num_steps
        super().__init__(train_dataset=StepDataset(num_steps), data_collator=no_inputs, **options)
        self._settings = settings
        self._examples = examples
        self._gradients = gradients

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[Any], int]:
        """Return the (empty) inputs of a step; the number of targets is not used."""
        del num_batches, device
        return [next(epoch_iterator)], 1

    def training_step(
        self,
        model: Any,  # a TrainableView
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Draw units, clip and sum their gradients, add noise, and set the result as gradients."""
        del inputs, num_items_in_batch
        model.train()
        # If the server could predict dropout, it could learn which units were drawn.
        torch.manual_seed(random_seed())
        mechanism = self._settings.mechanism
        # Draw each unit independently: the batch size is random too, as the accountant assumes.
        drawn = poisson_sample(len(self._settings.units), mechanism.sample_rate)
        units = [self._settings.units[index] for index in drawn]
        total = self._gradients.clipped_sum(self._examples, units, mechanism.max_grad_norm)
        if total.num_unusable:
            LOG.warning(
                "%d of %d gradients were not finite and were left out; check the data and the "
                "learning rate",
                total.num_unusable,
                len(units),
            )
        # Add noise even if no unit was drawn, since that must not show.
        noised = add_noise(total.gradients, mechanism)
        # The optimizer steps on these gradients, and sees nothing else of the data.
        for name, parameter in model.wrapped_model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = noised[name].to(parameter.dtype)
        if self.penalty is not None:
            # It depends only on the weights, which result from noised steps.
            self.penalty().backward()
        self.recorder.add(total.nll, total.num_targets)
        loss = total.nll / max(total.num_targets, 1)
        return torch.tensor(loss, device=self.args.device)


def add_noise(gradients: Mapping[str, Tensor], mechanism: Mechanism) -> dict[str, Tensor]:
    """Return clipped sums with noise, divided by the expected batch size, in float64.

    The result is later rounded to the parameters' float32, which removes the low bits in which
    float64 noise is known to be nonuniform.
    """
    scale = mechanism.noise_multiplier * mechanism.max_grad_norm
    result = {}
    for name, gradient in gradients.items():
        noise = normals(gradient.shape).to(gradient.device)
        result[name] = (gradient + scale * noise) / mechanism.expected_batch
    return result


def check_private_arguments(arguments: Mapping[str, Any]) -> None:
    """Reject training arguments that would break the privacy of a training.

    Args:
        arguments: Fields of `transformers.TrainingArguments`.

    Raises:
        ConfigError: If there are any.
    """
    for name, reason in ARGUMENTS_WITHOUT_PRIVACY.items():
        if arguments.get(name):
            raise ConfigError(
                f"training argument {name} must be left out with [privacy.dp]: {reason}"
            )
    optimizer = str(arguments.get("optim", DEFAULT_OPTIMIZER))
    if optimizer not in OPTIMIZERS_WITH_MOMENTS:
        raise ConfigError(
            f"training argument optim: {optimizer!r} is not known to read noised gradients only; "
            f"with [privacy.dp] use {', '.join(OPTIMIZERS_WITH_MOMENTS)}"
        )


def check_private_device(model: nn.Module) -> None:
    """Reject a device that rounds gradients coarsely.

    Raises:
        ModelError: If it multiplies in TF32.
    """
    if rounds_to_tf32(next(model.parameters()).device):
        raise ModelError(
            "differential privacy: this GPU multiplies in TF32, and the rounding of one example "
            "would depend on the others of its batch; set model.tf32 = false"
        )
