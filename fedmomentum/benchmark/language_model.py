"""Adapts a loaded model to lm-evaluation-harness, and reports what that silently ignores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fedmomentum.base_model.load_checks import check_token_ids, max_positions
from fedmomentum.errors import DataError, ModelError
from fedmomentum.evaluation.generation import generation_settings
from fedmomentum.formats.benchmark_file import MetricScore

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNLIMITED = 2**31
"""The context length of a model whose configuration does not specify it."""


@dataclass(frozen=True)
class PromptSettings:
    """How prompts are presented to a model.

    Attributes:
        limit: How many examples to use, from the first; None for all.
        chat: Whether to wrap prompts in the tokenizer's chat template.
        batch_size: Number of prompts per forward pass.
    """

    limit: int | None = None
    chat: bool = False
    batch_size: int = 8


@dataclass(frozen=True)
class Outcome:
    """A model's scores on one task.

    Attributes:
        scores: One for each combination of metric and answer extraction.
        num_unfinished: Number of answers truncated at the maximum length.
    """

    scores: list[MetricScore]
    num_unfinished: int


class BenchmarkModel(HFLM):  # type: ignore[misc]
    """A model for lm-eval to score in its current state, base or federated.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        prompt_settings: How prompts are presented to it.
        on_prompts: Called with the number of newly answered prompts.

    Raises:
        DataError: If chat prompts are requested and the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_settings: PromptSettings,
        on_prompts: Callable[[int], None],
    ) -> None:
        if prompt_settings.chat and not tokenizer.chat_template:
            raise DataError("--chat: the tokenizer has no chat template; leave it out")
        self._prompt_settings = prompt_settings
        self._on_prompts = on_prompts
        self._num_unfinished = 0
        # lm-eval ties weights again, which would undo a separately trained head.
        model.tie_weights = lambda *_, **__: None  # type: ignore[method-assign]
        try:
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                max_length=max_positions(model)[0] or UNLIMITED,
                batch_size=prompt_settings.batch_size,
                # in 16 bits, sums over a choice's tokens are too coarse to distinguish choices
                softmax_dtype="float32",
            )
        finally:
            del model.tie_weights

    # ── a task ──

    def count_truncated(self, task: ConfigurableTask) -> int:
        """Return how many prompts exceed the context length, before any computation.

        Raises:
            DataError: If an answer is too long for the model, or has no tokens.
            ModelError: If the tokenizer produces a token that the model does not know.
        """
        task.build_all_requests(
            limit=self._prompt_settings.limit,
            apply_chat_template=self._prompt_settings.chat,
            fewshot_as_multiturn=self._prompt_settings.chat,
            chat_template=self.apply_chat_template if self._prompt_settings.chat else None,
        )
        truncated = set()
        for request in task.instances:
            where = f"{task.task_name}: row {request.doc_id + 1}"
            if request.request_type == "generate_until":
                is_cut = self._is_cut_before_an_answer(request, where)
            else:
                is_cut = self._is_cut_before_a_choice(request, where)
            if is_cut:
                truncated.add(request.doc_id)
        return len(truncated)

    def _is_cut_before_an_answer(self, request: Instance, where: str) -> bool:
        """Return whether a prompt leaves too little room for the longest possible answer."""
        prompt, settings = request.args
        room = self.max_length - settings["max_gen_toks"]
        if room < 1:
            raise DataError(
                f"{where}: the model can see {self.max_length} tokens, and the answer alone may "
                f"have {settings['max_gen_toks']}; lower max_gen_toks in the task file"
            )
        ids = self.tok_encode(prompt)
        check_token_ids(self.model, [ids], where)
        return bool(len(ids) > room)

    def _is_cut_before_a_choice(self, request: Instance, where: str) -> bool:
        """Return whether a prompt and a choice together exceed the context length."""
        prompt, choice = request.args
        prompt_ids, choice_ids = self._encode_pair(prompt, choice)
        check_token_ids(self.model, [prompt_ids, choice_ids], where)
        if not prompt_ids or not 0 < len(choice_ids) <= self.max_length:
            raise DataError(
                f"{where}: a choice has {len(choice_ids)} tokens after a prompt of "
                f"{len(prompt_ids)}; both must have some, and the model can see {self.max_length}"
            )
        # The last token is only predicted and not an input.
        return bool(len(prompt_ids) + len(choice_ids) > self.max_length + 1)

    def score(self, task: ConfigurableTask) -> Outcome:
        """Run all prompts of a task and score the answers.

        Raises:
            ModelError: If the model produces NaN.
            DataError: If a metric is not 0 or 1 for each example.
        """
        self._num_unfinished = 0
        results: Any = evaluate(
            lm=self,
            task_dict={"tasks": {task.task_name: task}, "groups": {}},
            limit=self._prompt_settings.limit,
            # not used for means, but lm-eval gives no standard error without it
            bootstrap_iters=1,
            apply_chat_template=self._prompt_settings.chat,
            fewshot_as_multiturn=self._prompt_settings.chat,
            confirm_run_unsafe_code=True,  # programs run in our sandbox or were rejected before
        )
        scores = _scores(task.task_name, results["samples"][task.task_name])
        _check_means(task.task_name, scores, results["results"][task.task_name])
        return Outcome(scores, self._num_unfinished)

    # ── what lm-eval calls ──

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Return the log-likelihood of each choice; see HFLM."""
        answers = super().loglikelihood(requests, disable_tqdm=True)
        for request, (value, _) in zip(requests, answers, strict=True):
            if not math.isfinite(value):
                raise ModelError(
                    f"row {request.doc_id + 1}: the log-likelihood of a choice is {value}; the "
                    "model overflows in this dtype. Try --dtype float32"
                )
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Return the greedy answer to each prompt; see HFLM."""
        return super().generate_until(requests, disable_tqdm=True)

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *arguments, **keywords)
        self._on_prompts(len(inps))
        return logits

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any
    ) -> torch.Tensor:
        """Generate greedily, and count the answers that the maximum length truncates."""
        # Decode greedily without the model's own penalties, but keep its end tokens.
        ends = self.model.generation_config.eos_token_id
        end_ids = {self.eot_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        config_class: Any = GenerationConfig
        config = config_class(
            eos_token_id=sorted(end_ids), pad_token_id=self.tokenizer.pad_token_id, do_sample=False
        )
        with generation_settings(self.model, config):
            tokens: torch.Tensor = super()._model_generate(
                context,
                max_length,
                stop,
                logits_processor=LogitsProcessorList([_RefuseNaN()]),
                **settings,
            )
        # Rows that neither ended nor reached a stop text were truncated.
        new_tokens = tokens[:, context.shape[1] :].tolist()
        for row in new_tokens:
            text = self.tok_decode(row)
            ended = not end_ids.isdisjoint(row) or any(words in text for words in stop)
            self._num_unfinished += int(not ended)
        self._on_prompts(len(new_tokens))
        return tokens


class _RefuseNaN(LogitsProcessor):
    """Stops a generation whose logits are NaN, since the chosen token would be arbitrary."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(scores.isnan().any()):
            raise ModelError("the model gives NaN; it overflows in this dtype. Try --dtype float32")
        return scores


# ── scores ────────────────────────────────────────────────────────────────────────────────────────


def _scores(task: str, samples: list[dict[str, Any]]) -> list[MetricScore]:
    """Return each metric's outcomes in example order."""
    # There is one sample for each example and extraction, with a value for each metric.
    outcomes: dict[tuple[Any, str], dict[int, str]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = float(sample[metric])
            if value not in (0.0, 1.0):
                raise DataError(f"{task}: {metric} is {value}; it should be 0 or 1")
            by_row = outcomes.setdefault((metric, sample["filter"]), {})
            by_row[sample["doc_id"]] = "1" if value else "0"
    # lm-eval calls the default extraction "none".
    scores = []
    for (metric, extraction), by_row in outcomes.items():
        correct = "".join(by_row[row] for row in sorted(by_row))
        name = "" if extraction == "none" else extraction
        scores.append(MetricScore(metric=metric, extraction=name, correct=correct))
    return scores


def _check_means(task: str, scores: list[MetricScore], results: dict[str, Any]) -> None:
    """Raise an error if scores differ from lm-eval's own."""
    for score in scores:
        own = results[f"{score.metric},{score.extraction or 'none'}"]
        if not math.isclose(own, score.fraction, abs_tol=1e-12):
            raise DataError(
                f"{task}: {score.metric} is {score.fraction}, and {own} by lm-eval; this release "
                "of lm-eval is not supported"
            )
