"""Use a result: load it with its base model and tokenizer, and answer prompts with both."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmomentum.base_model.base_weights import choose_weight_format
from fedmomentum.base_model.devices import pick_dtype, set_up_device
from fedmomentum.base_model.identity import identify
from fedmomentum.base_model.library_errors import translate_out_of_memory
from fedmomentum.base_model.load_checks import check_token_ids, max_positions, vocabulary_size
from fedmomentum.base_model.loading import load_tokenizer
from fedmomentum.data.tokenization import prompt_token_ids
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.evaluation.generation import generate as generate_texts
from fedmomentum.formats.run_files import EnvironmentFile, read_facts
from fedmomentum.global_model.base_loading import is_classifier, load_base_for
from fedmomentum.global_model.tuned_model import TunedModel
from fedmomentum.run.saved_model import Result, choose_device, find_base, open_result
from fedmomentum.run.setup import set_up_process
from fedmomentum.run.tokenizers import tokenizer_of
from fedmomentum.utils.chat_date import DEFAULT_DATE, set_chat_date
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.data.examples import Prompt


LOG = logging.getLogger("fedmomentum")
DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class LoadSettings:
    """How to load a model for use; empty settings default to the run's.

    Attributes:
        base: The base model's directory, if it is not where the run found it.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu`, `cuda`, ...
    """

    base: str = ""
    dtype: str = ""
    device: str = ""


class ModelPair:
    """The base and the tuned model in one: the change is added to the base weights and removed.

    Args:
        result: The model.
        settings: How to load it.

    Raises:
        ModelError: If the base cannot be found or loaded, or is not the right one.
        ConfigError: If the model is a classifier with unknown labels.
    """

    def __init__(self, result: Result, settings: LoadSettings) -> None:
        model = result.model
        self.labels = model.base.labels
        if is_classifier(model.adapter) and not self.labels:
            raise ConfigError(
                f"{result.path} is of a sequence classifier and does not name its labels; evaluate "
                "the run that it comes from, or export it and use transformers' own pipeline"
            )
        # The base model is identified by its content before it is loaded.
        directory = find_base(result, settings.base)
        found = identify(
            settings.base or model.base.name, directory, quantization=model.base.quantization
        )
        model.base.check(found)
        dtype = _choose_dtype(result, settings.dtype)
        if result.config is not None:
            set_up_process(result.config.run)
        if model.base.tokenizer_sha256 and found.tokenizer_sha256 != model.base.tokenizer_sha256:
            LOG.warning(
                "the tokenizer or chat template in %s is not that of the run %s; scores and "
                "answers may differ",
                directory,
                result.path,
            )
        # Use the run's device and precision, unless others are requested.
        chosen = choose_device(result, settings.device)
        set_up_device(chosen, tf32=result.config is not None and result.config.model.tf32)
        setting = result.config.model.adapted_weights if result.config is not None else "auto"
        with translate_out_of_memory(f"{model.base.name} with what was trained does not fit"):
            self.model = load_base_for(model, directory, pick_dtype(dtype, chosen), chosen)
            weight_format = choose_weight_format(setting, self.model)
            self._tuned = TunedModel(self.model, directory, model, weight_format=weight_format)
        date = result.config.model.chat_date if result.config is not None else DEFAULT_DATE
        self._set_tokenizers(result, directory, date)
        self.tokenizer = self._tokenizers[0]

    def _set_tokenizers(self, result: Result, directory: Path, date: str) -> None:
        """Choose the tokenizers of both models: the same one, unless tokens were added."""
        # If tokens were added, the base model knows fewer than the tuned one.
        size = vocabulary_size(self.model)
        tuned = tokenizer_of(result, directory, size)
        base_tokenizer = tuned
        if (
            size is not None
            and len(tuned) > size
            and (directory / "tokenizer_config.json").is_file()
        ):
            base_tokenizer = load_tokenizer(directory, size, generates=not self.labels)
            if base_tokenizer.chat_template is None:
                # The base model is asked with the same text. It reads the template's added tokens
                # as ordinary text.
                base_tokenizer.chat_template = tuned.chat_template
        for tokenizer in (base_tokenizer, tuned):
            set_chat_date(tokenizer, date)
        self._tokenizers = base_tokenizer, tuned

    @property
    def longest(self) -> int | None:
        """The model's maximum context in tokens; None if it does not say."""
        return max_positions(self.model)[0]

    @contextmanager
    def tuned(self) -> Iterator[None]:
        """Apply the tuned weights and their tokenizer for the duration of the context."""
        with self._tuned.applied():
            self.tokenizer = self._tokenizers[1]
            try:
                yield
            finally:
                self.tokenizer = self._tokenizers[0]


def _choose_dtype(result: Result, dtype: str) -> str:
    """Return the requested dtype, else that of the run, else `auto`."""
    if dtype or result.config is None:
        return dtype or "auto"
    of_run = result.config.model.dtype
    if of_run == "auto":
        return _dtype_of_the_run(result.path) or of_run
    return of_run


def _dtype_of_the_run(path: Path) -> str | None:
    """Return the dtype that `auto` meant on the run's machine; None if unknown.

    Raises:
        ModelError: If environment.json is missing or damaged.
    """
    file = path / "environment.json"
    try:
        environment, _ = read_facts(file, EnvironmentFile)
    except FileNotFoundError:
        raise ModelError(
            f"{file} is missing; it says in which dtype the run was. Restore it, or give --dtype"
        ) from None
    except ModelError as error:
        raise ModelError(f"{error}. Restore it from a copy, or give --dtype") from error
    dtype = environment.get("dtype")
    return dtype if dtype in ("float32", "bfloat16", "float16") else None


# ── answers ───────────────────────────────────────────────────────────────────────────────────────


def answers(
    result: Result,
    prompts: Sequence[str],
    settings: LoadSettings,
    *,
    max_new_tokens: int,
    plain: bool,
) -> list[Answers]:
    """Answer every prompt greedily, with the base and the tuned model.

    Args:
        result: The model.
        prompts: Questions; wrapped as a user's message if the tokenizer has a chat template.
        settings: How to load the model.
        max_new_tokens: The maximum number of tokens in an answer.
        plain: Use the prompts as they are.

    Raises:
        ConfigError: If `max_new_tokens` is below 1, or the model is a classifier.
        DataError: If a prompt is empty, or leaves no room for an answer.
        FedMomentumError: See `ModelPair`.
    """
    refuse_generation(result)
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1; got {max_new_tokens}")
    for prompt in prompts:
        if not prompt.strip():
            raise DataError("a --prompt is empty; there is nothing to answer")
    pair = ModelPair(result, settings)
    chat = bool(pair.tokenizer.chat_template) and not plain
    asked: list[Any] = []
    for prompt in prompts:
        asked.append(({"role": "user", "content": prompt},) if chat else prompt)
    base_texts = _generated(pair, asked, max_new_tokens=max_new_tokens)
    with pair.tuned():
        tuned_texts = _generated(pair, asked, max_new_tokens=max_new_tokens)
    return [
        Answers(prompt, base, tuned)
        for prompt, base, tuned in zip(prompts, base_texts, tuned_texts, strict=True)
    ]


def refuse_generation(result: Result) -> None:
    """Refuse to generate text with a classifier.

    Raises:
        ConfigError: If the model is one.
    """
    if is_classifier(result.model.adapter):
        raise ConfigError(
            f"{result.path} is a sequence classifier: it gives labels and writes no text. Score it "
            "by `fedmomentum evaluate` (without --generate); for labels of new texts, `fedmomentum "
            'export --to merged` and transformers\' pipeline("text-classification", DIR)'
        )


@dataclass(frozen=True)
class Answers:
    """The base and the tuned model's answers to one prompt."""

    prompt: str
    base: str
    tuned: str


def generate(
    path: Path | str,
    prompts: Sequence[str],
    *,
    server_round: int | str = "last",
    client: str = "",
    settings: LoadSettings = LoadSettings(),  # noqa: B008 (frozen)
    max_new_tokens: int = 64,
    plain: bool = False,
) -> list[Answers]:
    """Answer prompts with the base and the tuned model of a run, a global model or an adapter.

    Args:
        path: The run's directory, or that of a global model or adapter.
        prompts: Questions; wrapped as a user's message if the tokenizer has a chat template.
        server_round: A round of the run, `last` or `best`.
        client: Whose model, if the method gives each client its own.
        settings: How to load the model.
        max_new_tokens: The maximum number of tokens in an answer.
        plain: Use the prompts as they are.

    Raises:
        FedMomentumError: See `answers`.
    """
    result = open_result(Path(path), server_round=str(server_round), client=client)
    return answers(result, prompts, settings, max_new_tokens=max_new_tokens, plain=plain)


def _generated(
    pair: ModelPair, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_size: int = 32
) -> list[str]:
    """Answer prompts with the model in its current state, base or tuned.

    Raises:
        DataError: If a prompt and its answer exceed the model's context.
        FedMomentumError: If a prompt has a token that the model does not know.
    """
    for prompt in prompts:
        ids = prompt_token_ids(prompt, pair.tokenizer)
        last = prompt if isinstance(prompt, str) else prompt[-1]
        text = last if isinstance(last, str) else last["content"]
        name = f"the prompt {printable(text, 40)!r}"
        check_token_ids(pair.model, [ids], name)
        if pair.longest is not None and len(ids) + max_new_tokens > pair.longest:
            raise DataError(
                f"{name} has {len(ids)} tokens, and with {max_new_tokens} more passes the "
                f"{pair.longest} that the model can see; shorten it, or lower --max-new-tokens"
            )
    return generate_texts(
        pair.model, pair.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
