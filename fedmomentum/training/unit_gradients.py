"""Sums of gradients that are clipped per unit, using the hooks of Opacus.

A unit is what private training protects: an example, or all rows of one patient. Opacus computes
the gradient of every row in one backward pass; the gradients of a unit's rows are summed and then
clipped together, to one norm over all parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmomentum.data.tokenized import TokenizedExample
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.objectives.objective import Predictions
from fedmomentum.training.optimizer_state import trained_parameters

if TYPE_CHECKING:
    from fedmomentum.data.tokenized import TokenizedExamples
    from fedmomentum.objectives.objective import Objective

# How far a row's gradient in a batch may deviate from that of the row alone, relative to the
# latter: float32 kernels sum in an order that depends on the batch.
COUPLING_RTOL = 1e-3
# The same, relative to the row's gradient over all parameters, which is what is clipped.
ROUNDING_RTOL = 1e-6
EXACT_DTYPES = (torch.float32, torch.float64)
# A padded short row costs as much as a long one, so within a pass the longest row is at most this
# many times as long as the shortest.
MAX_LENGTH_RATIO = 1.5


@dataclass
class ClippedSum:
    """The sum of the clipped gradients of some units.

    Attributes:
        gradients: The sum by parameter, in float64.
        nll: Loss of the units' rows, summed over their targets.
        num_targets: Number of these targets.
        num_unusable: Number of units whose gradient was not finite; they contribute nothing.
    """

    gradients: dict[str, Tensor]
    nll: float = 0.0
    num_targets: int = 0
    num_unusable: int = 0

    def add_clipped(self, units: Mapping[str, Tensor], max_norm: float) -> None:
        """Add gradients of units, each clipped to a maximum norm over all parameters.

        Args:
            units: Gradients of shape `(units, ...)` by parameter.
            max_norm: The maximum norm.
        """
        # Compute in float64, but one parameter at a time: gradients dominate a pass's memory.
        squares: Any = 0
        for gradient in units.values():
            squares = squares + gradient.flatten(1).double().square().sum(dim=1)
        norms = squares.sqrt()
        factors = (max_norm / norms).clamp(max=1.0)
        # A gradient that is not finite cannot be clipped, so none of it may be added.
        usable = norms.isfinite()
        self.num_unusable += int((~usable).sum())
        factors = factors[usable]
        for name, gradient in units.items():
            self.gradients[name] += torch.tensordot(factors, gradient[usable].double(), dims=1)


@dataclass
class UnitGradients:
    """Computation of sums of clipped gradients, within `hooked`.

    Attributes:
        model: A model in training mode; its trainable parameters belong to linear layers.
        objective: What to minimize: the mean loss of a row's targets, summed over a unit's rows.
        pad_token_id: Pads short rows.
        max_rows: Maximum number of examples in one pass through the model.
        label_smoothing: As in `Objective.loss`.
    """

    model: nn.Module
    objective: Objective
    pad_token_id: int
    max_rows: int
    label_smoothing: float = 0.0
    _parameters: dict[str, nn.Parameter] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Find the trainable parameters."""
        self._parameters = trained_parameters(self.model)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Make every backward pass within the block keep the gradient of each row.

        Raises:
            ConfigError: If Opacus is not installed.
            ModelError: If `check_layers` rejects the model.
        """
        check_layers(self.model)
        try:
            from opacus.grad_sample import GradSampleHooks
        except ImportError as error:
            raise ConfigError(
                "differential privacy needs the package opacus: pip install 'fedmomentum[privacy]'"
            ) from error
        hooks = GradSampleHooks(self.model, loss_reduction="sum")
        try:
            with warnings.catch_warnings():
                # The inputs of the first adapted layer neither need nor have a gradient.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                yield
        finally:
            hooks.cleanup()

    def clipped_sum(
        self, examples: TokenizedExamples, units: Sequence[Sequence[int]], max_norm: float
    ) -> ClippedSum:
        """Return the sum over units of their clipped gradients; zero without units.

        Args:
            examples: The rows.
            units: The rows of each unit, by index.
            max_norm: The norm that each unit's gradient is clipped to.
        """
        result = ClippedSum({})
        for name, parameter in self._parameters.items():
            result.gradients[name] = torch.zeros_like(parameter, dtype=torch.float64)
        # Units of similar length share a pass, to reduce padding; the order of a sum is arbitrary.
        lengths = [max(examples.example(row).length for row in rows) for rows in units]
        by_length = sorted(range(len(units)), key=lengths.__getitem__)
        pairs: list[tuple[int, int]] = []
        for position, unit in enumerate(by_length):
            pairs.extend((position, row) for row in units[unit])
        passes = self._passes(pairs, [lengths[unit] for unit in by_length])
        # A unit of many rows may need several passes; `pending` holds its partial sum.
        pending: dict[str, Tensor] = {}
        for index, chunk in enumerate(passes):
            batch = [examples.example(row) for _, row in chunk]
            gradients = self._row_gradients(batch, result)
            owners = torch.tensor([position - chunk[0][0] for position, _ in chunk])
            summed = _sum_by_owner(gradients, owners, pending)
            # The last unit of the pass is complete unless the next pass begins with it.
            following = passes[index + 1 : index + 2]
            continues = bool(following) and following[0][0][0] == chunk[-1][0]
            pending = {}
            if continues:
                pending = {name: value[-1] for name, value in summed.items()}
                summed = {name: value[:-1] for name, value in summed.items()}
            result.add_clipped(summed, max_norm)
        return result

    def _passes(
        self, pairs: Sequence[tuple[int, int]], lengths: Sequence[int]
    ) -> list[list[tuple[int, int]]]:
        """Divide rows into passes of at most `max_rows`, keeping similar lengths together.

        Args:
            pairs: Position of the unit and index of each row, by ascending length of the units.
            lengths: Tokens of the longest row of the unit at each position.
        """
        passes: list[list[tuple[int, int]]] = []
        for pair in pairs:
            is_full = not passes or len(passes[-1]) == self.max_rows
            if is_full or lengths[pair[0]] > MAX_LENGTH_RATIO * lengths[passes[-1][0][0]]:
                passes.append([])
            passes[-1].append(pair)
        return passes

    def _row_gradients(
        self, batch: Sequence[TokenizedExample], result: ClippedSum
    ) -> dict[str, Tensor]:
        """Return each example's gradient by parameter, and add its loss to `result`.

        Raises:
            ModelError: If a layer's first dimension is not the batch dimension.
        """
        device = next(iter(self._parameters.values())).device
        inputs = self.objective.collate(batch, self.pad_token_id)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        predictions = self.objective.predict(self.model, inputs)
        # Sum the rows' mean losses, so that long rows count no more than short ones.
        total: Any = 0
        for part in split_predictions(predictions, len(batch)):
            loss = self.objective.loss(part, label_smoothing=self.label_smoothing)
            total = total + loss.optimized / max(loss.num_targets, 1)
            result.nll += loss.nll.item()
            result.num_targets += loss.num_targets
        total.backward()
        # Both rows of a pair are gradients of the same example.
        num_rows = len(inputs["input_ids"])
        gradients = {}
        for name, parameter in self._parameters.items():
            of_rows: Any = parameter.grad_sample  # type: ignore[attr-defined]
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
            if of_rows is None:  # the layer took no part in this batch
                of_rows = parameter.new_zeros(num_rows, *parameter.shape)
            if not isinstance(of_rows, Tensor) or len(of_rows) != num_rows:
                raise _coupled(name)
            if num_rows > len(batch):
                of_rows = of_rows.double().unflatten(0, (-1, len(batch))).sum(dim=0)
            gradients[name] = of_rows
        return gradients

    def check_rows_are_independent(self) -> None:
        """Reject a model in which one row's gradient depends on the other rows of its batch.

        This is tested on made-up tokens, so that the outcome reveals nothing about the data.

        Raises:
            ModelError: If there is such a dependence: one unit could then change the gradients of
                all others, and clipping would not bound what it reveals.
        """
        rows = _made_up_rows(self.objective.compares_pairs)
        unused = ClippedSum({})
        # Disable dropout, which differs in every pass; the hooks need linear layers in train mode.
        was_training = self.model.training
        self.model.eval()
        for module in self.model.modules():
            if type(module) is nn.Linear:
                module.train()
        try:
            self._compare_rows(rows, unused)
        finally:
            self.model.train(was_training)

    def _compare_rows(self, rows: Sequence[TokenizedExample], unused: ClippedSum) -> None:
        """Compare the gradient of each row in a batch with that of the row alone."""
        together = self._row_gradients(rows, unused)
        for index, row in enumerate(rows):
            alone = self._row_gradients([row], unused)
            norms = {name: gradient[0].double().norm() for name, gradient in alone.items()}
            # If a layer's gradient nearly cancels, only round-off is left of it.
            rounding = ROUNDING_RTOL * torch.stack(list(norms.values())).norm()
            for name, gradient in alone.items():
                difference = (gradient[0].double() - together[name][index].double()).norm()
                if not difference <= COUPLING_RTOL * norms[name] + rounding:
                    raise _coupled(name)


def split_predictions(predictions: Predictions, num_examples: int) -> Iterator[Predictions]:
    """Yield the predictions of each example of a batch; a pair's two rows stay together."""
    logits = predictions.logits.split(1)
    labels = predictions.labels.split(1)
    for index in range(num_examples):
        if predictions.reference is None:
            yield Predictions(logits[index], labels[index])
            continue
        both = (index, num_examples + index)
        yield Predictions(
            torch.cat([logits[row] for row in both]),
            torch.cat([labels[row] for row in both]),
            predictions.reference[index : index + 1],
        )


def check_layers(model: nn.Module) -> None:
    """Reject a model whose per-row gradients may be wrong.

    Raises:
        ModelError: If a trainable parameter does not belong to a linear layer, the model has batch
            normalization, or weights are not float32 or float64.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise _coupled(path)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and type(module) is not nn.Linear:
                raise ModelError(
                    f"differential privacy: {path}.{name} belongs to a {type(module).__name__}, "
                    "and the gradient of each example is only computed for linear layers; adapt "
                    "linear modules only, and leave out lora.target-parameters and "
                    "modules-to-save of other kinds"
                )
            if parameter.dtype not in EXACT_DTYPES:
                raise ModelError(
                    f"differential privacy: {path}.{name} is held in {parameter.dtype}, and the "
                    "rounding of one example would depend on the others of its batch; set "
                    'model.dtype = "float32" and model.quantization = "none"'
                )


def _sum_by_owner(
    gradients: Mapping[str, Tensor], owners: Tensor, pending: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Sum the gradients of rows by unit, in float64; `pending` belongs to the first unit."""
    num_units = int(owners[-1]) + 1
    if num_units == len(owners) and not pending:
        return dict(gradients)  # each row is a unit
    result = {}
    for name, gradient in gradients.items():
        summed = gradient.new_zeros(num_units, *gradient.shape[1:], dtype=torch.float64)
        summed.index_add_(0, owners.to(gradient.device), gradient.double())
        if pending:
            summed[0] += pending[name]
        result[name] = summed
    return result


def _made_up_rows(are_pairs: bool) -> list[TokenizedExample]:
    """Return rows of different lengths whose last number is valid as a token and as a label."""
    rejected = ((4, 5, 3), (5, 4, 6, 4, 3, 2))
    reference = ((-1.0, -2.0), (-3.0, -1.0))
    rows = []
    for index, ids in enumerate(((4, 5, 1), (5, 4, 6, 4, 0))):
        row = TokenizedExample(ids, len(ids) - 1, "", False)
        if are_pairs:
            row = row._replace(rejected_ids=rejected[index], reference=reference[index])
        rows.append(row)
    return rows


def _coupled(name: str) -> ModelError:
    return ModelError(
        f"differential privacy: the gradient of {name} cannot be attributed to single examples, "
        "because the layer mixes the rows of a batch or has another dimension first; train this "
        "model without [privacy.dp], or adapt other modules"
    )
