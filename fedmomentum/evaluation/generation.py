"""Greedy generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedmomentum.data.tokenization import answer_prefix, end_token_id, prompt_token_ids
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

    What the chat template inserts before the text of an answer (reasoning, a channel) is not part
    of it.

    Sampling, repetition penalties and the model's other generation settings are disabled: the
    answer is the sequence of most likely tokens, up to the end token or ``max_new_tokens``.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        max_new_tokens: The maximum number of tokens per answer.
        batch_size: Number of prompts per batch.

    Returns:
        The answers, in prompt order.

    Raises:
        DataError: If a prompt is a chat and the tokenizer has no chat template.
    """
    from transformers import GenerationConfig

    prompt_ids = [prompt_token_ids(prompt, tokenizer) for prompt in prompts]
    end_ids = sorted({end_token_id(prompt, tokenizer) for prompt in prompts})
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    # Decode greedily, whatever the model's own settings say.
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
    # Batch prompts of equal length; ties are broken by their ids, so that batches are reproducible.
    order = sorted(range(len(prompts)), key=lambda row: (len(prompt_ids[row]), prompt_ids[row]))
    # Use the model inside a PEFT wrapper, which has the adapters: the wrapper itself would restore
    # its own settings.
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
                prefix = answer_prefix(prompts[row], tokenizer)
                answers[row] = _answer_text(ids, prefix, tokenizer)
    return answers


def _answer_text(ids: list[int], prefix: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of an answer, without what the template inserts before it.

    Args:
        ids: The generated tokens.
        prefix: What the template inserts before an answer without reasoning.
        tokenizer: The model's tokenizer.
    """
    if not prefix.strip():
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    # The special tokens mark where the answer begins, so they are removed only afterward.
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    start = 0 if text.startswith(prefix) else text.rfind(prefix)
    if start < 0:
        # Non-empty reasoning ends the same way as empty reasoning.
        prefix = _last_mark(prefix, tokenizer)
        start = text.rfind(prefix) if prefix else -1
    if start >= 0:
        text = text[start + len(prefix) :]
    for token in _special_tokens(tokenizer):
        text = text.replace(token, "")
    return text


def _last_mark(prefix: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end of a prefix, starting at its last added token: `</think>` and the rest."""
    starts = [prefix.rfind(str(token)) for token in tokenizer.added_tokens_decoder.values()]
    start = max(starts, default=-1)
    return prefix[start:] if start >= 0 else ""


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts of the tokens that are not displayed, longest first."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return sorted(texts, key=len, reverse=True)


@contextmanager
def generation_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Temporarily replace a model's generation settings.

    Settings passed to `generate` would be merged with the model's own; replacing those avoids it.
    """
    previous = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = previous
