"""Loss, perplexity and exact match of a model's predictions for given answers, in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedmomentum.errors import DataError
from fedmomentum.evaluation.tasks import Evaluation, TeacherForcedTask, evaluate_task
from fedmomentum.objectives.objective import CAUSAL_LM, ExampleScore, Objective, Predictions
from fedmomentum.objectives.preference import answer_log_probs, pair_batch, predict_answers

if TYPE_CHECKING:
    from fedmomentum.data.tokenized import TokenizedExamples


def evaluate(
    model: nn.Module,
    examples: TokenizedExamples,
    *,
    pad_token_id: int,
    batch_size: int = 32,
    objective: Objective = CAUSAL_LM,
) -> Evaluation:
    """Score a model on examples in one teacher-forced pass; see `TeacherForcedTask`.

    Greedy generation would choose the same tokens, so this is the exact match of generation without
    generating. In 16 bits, the two may differ if the top two tokens are within one rounding step of
    each other.

    The result does not depend on the order of the examples. The model's train/eval mode is kept.

    Args:
        model: A model, with or without adapters.
        examples: The examples to score.
        pad_token_id: Pads short rows; can be any valid id, since it is masked.
        batch_size: Examples per forward pass.
        objective: The objective to score.

    Returns:
        The scores in total and by category.

    Raises:
        DataError: If there are no examples.
    """
    if not examples:
        raise DataError("no examples to evaluate on; give some test data, or turn evaluation off")
    with evaluation_mode(model):
        predictions = predict_examples(model, examples, objective, pad_token_id, batch_size)
        return evaluate_task(TeacherForcedTask(examples), predictions)


def predict_examples(
    model: nn.Module,
    examples: TokenizedExamples,
    objective: Objective,
    pad_token_id: int,
    batch_size: int,
) -> Iterator[tuple[int, ExampleScore]]:
    """Yield the index and score of each example, in an order independent of the examples' order.

    Args:
        model: The model, in evaluation mode.
        examples: The examples to score.
        objective: The objective to score.
        pad_token_id: Pads short rows.
        batch_size: Examples per forward pass.
    """
    # Run the examples of a batch through the model together, but score them one by one.
    device = next(model.parameters()).device
    order = _batch_order(examples)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = objective.collate([examples.example(row) for row in rows], pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        predictions = objective.predict(model, batch)
        yield from zip(rows, objective.score(predictions), strict=True)


def measure_reference(
    model: nn.Module, examples: TokenizedExamples, *, pad_token_id: int, batch_size: int = 32
) -> TokenizedExamples:
    """Return pairs with the log-probabilities of their answers under the reference model.

    An evaluation of the same examples with the same batch size uses the same batches. So a model
    equal to the reference has margins of exactly 0, in any dtype.

    Args:
        model: The reference model.
        examples: The pairs.
        pad_token_id: Pads short rows; can be any valid id, since it is masked.
        batch_size: Pairs per forward pass.

    Raises:
        DataError: If an example is not a pair.
    """
    device = next(model.parameters()).device
    order = _batch_order(examples)
    reference: list[tuple[float, ...]] = [()] * len(examples)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pair_batch([examples.example(row) for row in rows], pad_token_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            log_probs = answer_log_probs(Predictions(*predict_answers(model, batch)))
            chosen, rejected = log_probs.chunk(2)
            for row, *both in zip(rows, chosen.tolist(), rejected.tolist(), strict=True):
                reference[row] = tuple(both)
    return replace(examples, reference=tuple(reference))


def _batch_order(examples: TokenizedExamples) -> list[int]:
    """Return the order in which examples are batched.

    Batching rows of equal length wastes no padding. Ties are broken by the ids themselves, so that
    the batches, and with them the rounding, do not depend on the order of the examples.
    """

    def key(row: int) -> tuple[Any, ...]:
        example = examples.example(row)
        return example.length, *example.content

    return sorted(range(len(examples)), key=key)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Temporarily put a model in evaluation mode without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a buffer that the model happens to update would be unusable in the
        # next training.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
