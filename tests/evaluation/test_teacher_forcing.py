"""The teacher-forced score is that of real greedy generation, in any order, and leaves the model as it was."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import tokenize
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.errors import DataError
from fedmomentum.evaluation.generation import generate
from fedmomentum.evaluation.teacher_forcing import evaluate
from fedmomentum.formats.scores import MAX_EXPONENT, NO_EXAMPLES, Score
from tests.tiny import PAD_TOKEN_ID, tiny_gpt2, tiny_llama
from tests.training.keywords import train

TINY_MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
SCORES = st.builds(
    lambda nll, tokens, exact, others: Score(nll, tokens, exact + others, exact),
    st.floats(0, 1e6),
    *[st.integers(0, 1000)] * 3,
)


def chat(text):
    return ({"role": "user", "content": text},)


def letters(count):
    """Questions of unequal length; the answer is the first letter, once or twice: partly learnable in seconds."""
    rows = []
    for i in range(count):
        first = "abcdefghij"[i % 10]
        text = first + "xyz"[: i % 4] + str(i)
        rows.append(
            Example(
                chat(text) if i % 2 else f"{text}=", first * (1 + (i // 10) % 2), category=first
            )
        )
    return rows


@pytest.fixture(scope="module", params=sorted(TINY_MODELS))
def trained(request, tmp_path_factory):
    """Return (model, tokenizer, examples): a model which has learned some answers and not others."""
    folder = TINY_MODELS[request.param](tmp_path_factory.mktemp(request.param))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    examples = letters(50)
    tokens = tokenize(examples, tokenizer, max_length=64, max_truncated_fraction=0.0, owner="test")
    train(
        model,
        tokens,
        pad_token_id=PAD_TOKEN_ID,
        learning_rate=1e-2,
        local_steps=30,
        local_epochs=None,
        batch_size=16,
        seed=0,
    )
    return model, tokenizer, examples, tokens


def test_exact_match_is_that_of_greedy_generation(trained):
    model, tokenizer, examples, tokens = trained
    answers = generate(
        model, tokenizer, [e.prompt for e in examples], max_new_tokens=6, batch_size=7
    )
    is_exact = [
        answer == example.completion for answer, example in zip(answers, examples, strict=True)
    ]
    assert 5 < sum(is_exact) < 45, "the test needs hits and misses"
    for i, expected in enumerate(is_exact):
        one = TokenizedExamples(
            tokens.input_ids[i : i + 1], tokens.num_prompt_tokens[i : i + 1], ("",), (False,), 0
        )
        assert evaluate(model, one, pad_token_id=PAD_TOKEN_ID).total.num_exact == expected
    assert evaluate(model, tokens, pad_token_id=PAD_TOKEN_ID).total.num_exact == sum(is_exact)


def test_loss_is_that_of_each_example_alone_without_padding(trained):
    model, _, _, tokens = trained
    nll, num_tokens = 0.0, 0
    for ids, num_prompt in zip(tokens.input_ids, tokens.num_prompt_tokens, strict=True):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        nll -= sum(log_p[t - 1, ids[t]].item() for t in range(num_prompt, len(ids)))
        num_tokens += len(ids) - num_prompt
    total = evaluate(model, tokens, pad_token_id=PAD_TOKEN_ID, batch_size=16).total
    assert total.num_tokens == num_tokens and total.num_examples == 50
    assert total.nll == pytest.approx(nll, rel=1e-5)


def test_order_of_examples_does_not_change_a_bit(trained):
    model, _, _, tokens = trained
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = TokenizedExamples(
        *(
            tuple(getattr(tokens, name)[i] for i in order)
            for name in ("input_ids", "num_prompt_tokens", "categories", "is_truncated")
        ),
        0,
    )
    first, second = (
        evaluate(model, t, pad_token_id=PAD_TOKEN_ID, batch_size=8) for t in (tokens, shuffled)
    )
    assert first == second
    assert list(first.by_category) == list(second.by_category) == sorted(set(tokens.categories))
    assert (
        sum(score.num_examples for score in first.by_category.values()) == first.total.num_examples
    )


def test_truncated_items_are_never_exact(trained):
    model, _, _, tokens = trained
    cut = TokenizedExamples(
        tokens.input_ids, tokens.num_prompt_tokens, tokens.categories, (True,) * len(tokens), 0
    )
    full_total, cut_total = (
        evaluate(model, t, pad_token_id=PAD_TOKEN_ID).total for t in (tokens, cut)
    )
    assert full_total.num_exact > 0 == cut_total.num_exact
    assert full_total.nll == cut_total.nll


def test_modes_and_settings_are_left_as_they_were(trained):
    model, tokenizer, examples, tokens = trained
    inner = next(model.children())
    model.train()
    inner.eval()
    model.generation_config.repetition_penalty = 5.0
    try:
        evaluate(model, tokens, pad_token_id=PAD_TOKEN_ID)
        penalised = generate(model, tokenizer, [examples[0].prompt], max_new_tokens=6)
        assert model.training and not inner.training
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.generation_config.repetition_penalty = None
        model.eval()
    assert penalised == generate(model, tokenizer, [examples[0].prompt], max_new_tokens=6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generation_ignores_a_penalty_that_would_change_the_answer(trained):
    model, tokenizer, examples, _ = trained
    prompts = [example.prompt for example in examples]
    plain = generate(model, tokenizer, prompts, max_new_tokens=6)
    model.generation_config.repetition_penalty = 50.0
    try:
        assert generate(model, tokenizer, prompts, max_new_tokens=6) == plain
    finally:
        model.generation_config.repetition_penalty = None


@given(SCORES, SCORES)
def test_scores_add_up(a, b):
    both = a + b
    assert both.num_examples == a.num_examples + b.num_examples
    if a.num_tokens and b.num_tokens:
        mean = (a.loss * a.num_tokens + b.loss * b.num_tokens) / both.num_tokens
        assert both.loss == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize(
    ("num_exact", "num_examples", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_wilson_interval(num_exact, num_examples, low, high):
    assert Score(0.0, 0, num_examples, num_exact).interval == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_solves_its_defining_equation(counts):
    num_exact, n = counts
    score = Score(0.0, 0, n, num_exact)
    low, high = score.interval
    assert 0 <= low <= score.exact_match <= high <= 1
    for bound in (
        low,
        high,
    ):  # (share - bound)^2 = z^2 bound (1 - bound) / n, which defines Wilson's interval
        left, right = (
            (score.exact_match - bound) ** 2,
            1.959963984540054**2 * bound * (1 - bound) / n,
        )
        assert left == pytest.approx(right, abs=1e-9)


def test_empty_scores_are_undefined_not_perfect():
    assert (
        math.isnan(NO_EXAMPLES.loss)
        and math.isnan(NO_EXAMPLES.perplexity)
        and math.isnan(NO_EXAMPLES.exact_match)
    )
    assert NO_EXAMPLES.interval == (0.0, 1.0)
    assert Score(1e6, 1, 0, 0).perplexity == math.exp(MAX_EXPONENT)  # a number that JSON has


def test_nothing_to_evaluate_is_refused(trained):
    with pytest.raises(DataError, match="no examples"):
        evaluate(trained[0], TokenizedExamples((), (), (), (), 0), pad_token_id=PAD_TOKEN_ID)
