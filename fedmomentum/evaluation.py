"""How well a model answers: loss, perplexity and exact match from one pass, and greedy generation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from fedmomentum.data.batches import (
    IGNORED,
    completion_batch,
    inner_model,
    model_inputs,
    next_token_pairs,
    pad_left,
)
from fedmomentum.data.examples import Prompt
from fedmomentum.data.tokens import TokenisedExamples, end_token_id, prompt_token_ids
from fedmomentum.errors import DataError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_NORMAL_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal: two-sided 95 %."""


@dataclass(frozen=True)
class Score:
    """Sums over a group of items, so that groups and clients add up.

    Attributes:
        nll: Summed negative log-likelihood of the completion tokens, in nats.
        num_tokens: Completion tokens, end tokens included.
        num_examples: Items.
        num_exact: Items that greedy generation answers word for word.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_examples: int = 0
    num_exact: int = 0

    def __add__(self, other: Score) -> Score:
        """Return the score of both groups together."""
        return Score(
            self.nll + other.nll,
            self.num_tokens + other.num_tokens,
            self.num_examples + other.num_examples,
            self.num_exact + other.num_exact,
        )

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a completion token, in nats; NaN without tokens."""
        return self.nll / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def exact_match(self) -> float:
        """Share of items answered word for word; NaN without items."""
        return self.num_exact / self.num_examples if self.num_examples else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of ``exact_match``; everything, (0, 1), without items.

        Unlike the normal interval it stays inside [0, 1] and does not shrink to nothing at 0 % or 100 %.
        """
        n = self.num_examples
        if n == 0:
            return 0.0, 1.0
        z2 = _NORMAL_95**2
        share = self.num_exact / n
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = _NORMAL_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
        # At 0 and n hits the bound is 0 or 1 exactly; rounding would leave it a hair beside.
        low = 0.0 if self.num_exact == 0 else centre - half
        high = 1.0 if self.num_exact == n else centre + half
        return low, high


@dataclass(frozen=True)
class Evaluation:
    """The score of all items, and that of each category (sorted by name)."""

    total: Score
    by_category: dict[str, Score]

    def __add__(self, other: Evaluation) -> Evaluation:
        """Return the score of both groups of items together."""
        nothing = Score(0.0, 0, 0, 0)
        names = sorted(self.by_category.keys() | other.by_category.keys())
        return Evaluation(
            self.total + other.total,
            {n: self.by_category.get(n, nothing) + other.by_category.get(n, nothing) for n in names},
        )


def evaluate(model: nn.Module, examples: TokenisedExamples, *, pad_token_id: int, batch_size: int = 32) -> Evaluation:
    """Score the model on the examples in one teacher-forced pass.

    An item counts as exact when the most likely token is the right one at each place of the completion and its end
    token. Greedy generation takes the same tokens, so this is its word-for-word match without generating; in 16 bits
    the two may differ where the best two tokens are within one rounding step of each other. An item whose
    completion was cut off (``is_truncated``) adds to the loss and never counts as exact.

    The result does not depend on the order of the examples. The model keeps its train or eval mode.

    Args:
        model: A causal language model, with or without adapters.
        examples: What to score.
        pad_token_id: Fills up short rows; any valid id, it is masked.
        batch_size: Rows in a batch.

    Raises:
        DataError: There are no examples.
    """
    if not examples:
        raise DataError("no examples to evaluate on; give some test data, or turn evaluation off")
    device = next(model.parameters()).device
    # Rows of equal length together waste no padding; the ids themselves break ties, so that batches, and with them
    # the rounding, are the same however the examples came.
    order = sorted(
        range(len(examples)),
        key=lambda i: (len(examples.input_ids[i]), examples.input_ids[i], examples.num_prompt_tokens[i]),
    )
    scores = {category: Score() for category in sorted(set(examples.categories))}
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = completion_batch(
                [examples.input_ids[i] for i in rows], [examples.num_prompt_tokens[i] for i in rows], pad_token_id
            )
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            logits, labels = next_token_pairs(model(**model_inputs(model, batch)).logits, batch["labels"])
            for i, row_logits, row_labels in zip(rows, logits, labels, strict=True):
                category = examples.categories[i]
                scores[category] += _score_row(row_logits, row_labels, can_be_exact=not examples.is_truncated[i])
    return Evaluation(sum(scores.values(), Score()), scores)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Return the model's greedy answer to each prompt, without special tokens.

    Sampling, repetition penalties and whatever else the model's own generation settings hold are switched off: the
    answer is the sequence of most likely tokens, up to the end token or ``max_new_tokens``.

    Raises:
        DataError: A chat prompt meets a tokenizer without chat template.
    """
    from transformers import GenerationConfig

    prompt_ids = [prompt_token_ids(prompt, tokenizer) for prompt in prompts]
    end_ids = sorted({end_token_id(prompt, tokenizer) for prompt in prompts})
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=end_ids, pad_token_id=pad_id
    )
    device = next(model.parameters()).device
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompt_ids[i]), prompt_ids[i]))
    # The model inside a PEFT wrapper holds the adapters; the wrapper would only put its own settings back.
    base = inner_model(model)
    with _evaluating(base), _generation_settings(base, settings):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            input_ids = pad_left([prompt_ids[i] for i in rows], pad_id).to(device)
            mask = pad_left([[1] * len(prompt_ids[i]) for i in rows], 0).to(device)
            output = base.generate(input_ids=input_ids, attention_mask=mask)
            for i, ids in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                answers[i] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return answers


def _score_row(logits: torch.Tensor, labels: torch.Tensor, *, can_be_exact: bool) -> Score:
    # One row at a time, so that the float32 copy of the logits is that of one row. (answer, vocabulary), (answer,)
    logits, labels = logits[labels != IGNORED].float(), labels[labels != IGNORED]
    nll = F.cross_entropy(logits, labels, reduction="none").double().sum().item()
    is_exact = can_be_exact and bool((logits.argmax(dim=-1) == labels).all())
    return Score(nll, len(labels), 1, int(is_exact))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: a buffer which the model refreshes in passing would be unusable in the next training.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _generation_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    # Passed to generate(), settings would be filled up from the model's own; put in their place, they stand alone.
    previous = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = previous
