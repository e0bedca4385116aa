"""Greedy generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedmomentum.data.tokenization import end_token_id, prompt_token_ids
from fedmomentum.evaluation.teacher_forcing import evaluation_mode
from fedmomentum.objectives.collation import pad_left
from fedmomentum.utils.modules import inner_model

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fedmomentum.data.examples import Prompt


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """Return the model's greedy answer to each prompt, without special tokens.

    Sampling, repetition penalties and the model's other generation settings are switched off: the
    answer is the sequence of most likely tokens, up to the end token or ``max_new_tokens``.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        max_new_tokens: The most tokens of an answer.
        batch_size: Prompts that are answered together.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        DataError: If a prompt is a chat and the tokenizer has no chat template.
    """
    from transformers import GenerationConfig

    prompt_ids = [prompt_token_ids(prompt, tokenizer) for prompt in prompts]
    end_ids = sorted({end_token_id(prompt, tokenizer) for prompt in prompts})
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    # Greedy, whatever the model's own settings say.
    config_class: Any = GenerationConfig
    config = config_class(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=end_ids,
        pad_token_id=pad_id,
    )
    device = next(model.parameters()).device
    answers = [""] * len(prompts)
    # Prompts of equal length together; their ids break ties, so that batches are the same.
    order = sorted(range(len(prompts)), key=lambda row: (len(prompt_ids[row]), prompt_ids[row]))
    # The model inside a PEFT wrapper holds the adapters; the wrapper would only restore its own
    # settings.
    inner = inner_model(model)
    with evaluation_mode(inner), generation_settings(inner, config):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prompt_ids[row] for row in rows]
            input_ids = pad_left(batch, pad_id).to(device)
            mask = pad_left([[1] * len(ids) for ids in batch], 0).to(device)
            output = inner.generate(input_ids=input_ids, attention_mask=mask)
            new_ids = output[:, input_ids.shape[1] :].tolist()
            for row, ids in zip(rows, new_ids, strict=True):
                answers[row] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return answers


@contextmanager
def generation_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace a model's generation settings for a while.

    Passed to `generate`, settings would be completed by the model's own; in their place they stand
    alone.
    """
    previous = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = previous
