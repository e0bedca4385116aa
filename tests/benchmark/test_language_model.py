"""lm-eval scores our models as transformers does, and nothing is skipped silently."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmomentum.benchmark.language_model import BenchmarkModel, PromptSettings
from fedmomentum.benchmark.task_files import read_task
from fedmomentum.benchmark.tasks import make_task
from fedmomentum.errors import DataError, ModelError
from tests.benchmark.files import QUESTIONS, SUMS, write_choices, write_rows, write_sums
from tests.tiny import tiny_gpt2, tiny_llama


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def loaded(request, tmp_path_factory):
    folder = request.param(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def asked(loaded, **settings):
    return BenchmarkModel(*loaded, PromptSettings(**settings), lambda number: None)


def log_likelihood(model, tokenizer, prompt, choice):
    """The sum over the choice's tokens, one forward pass alone, without padding."""
    ids = tokenizer(prompt + choice, return_tensors="pt").input_ids
    start = tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        logs = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
    return sum(logs[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))


def test_choices_are_scored_as_transformers_does_directly(tmp_path, loaded):
    task = make_task(read_task(write_choices(tmp_path), "choices"))
    model = asked(loaded, batch_size=4)
    assert model.count_truncated(task) == 0
    answers = model.loglikelihood(task.instances)
    scores = {score.name: score for score in model.score(task).scores}
    acc, acc_norm = "", ""
    for row in QUESTIONS:
        prompt = f"Question: {row['question']}\nAnswer:"
        own = [log_likelihood(*loaded, prompt, f" {choice}") for choice in row["choices"]]
        for value in own:
            assert answers.pop(0)[0] == pytest.approx(value, abs=1e-4)
        lengths = [len(choice) for choice in row["choices"]]
        normed = [value / length for value, length in zip(own, lengths, strict=True)]
        acc += str(int(own.index(max(own)) == row["answer"]))
        acc_norm += str(int(normed.index(max(normed)) == row["answer"]))
    assert scores["acc"].correct == acc and scores["acc_norm"].correct == acc_norm
    assert "0" in acc_norm and "1" in acc_norm  # the test can tell


def test_the_limit_takes_the_first_examples_and_batches_change_nothing(tmp_path, loaded):
    data = read_task(write_choices(tmp_path), "choices")
    full = asked(loaded, batch_size=32).score(make_task(data)).scores
    part = asked(loaded, batch_size=1, limit=4).score(make_task(data)).scores
    assert [score.correct[:4] for score in full] == [score.correct for score in part]


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("They are 2.\n#### 2", 1, 1),
        ("The answer is 2", 0, 1),
        ("#### 2. Of these 5 are left", 1, 0),
        ("#### $2", 0, 1),
        ("2 and 3", 0, 0),
        ("#### 3", 0, 0),
        ("#### two", 0, 0),
        ("", 0, 0),
        ("#### 2.", 1, 1),
        ("#### -2", 0, 0),
    ],
)
def test_strict_and_flexible_extraction(tmp_path, loaded, monkeypatch, answer, strict, flexible):
    task = make_task(read_task(write_sums(tmp_path), "gsm8k"))
    model = asked(loaded, limit=1)
    monkeypatch.setattr(model, "generate_until", lambda requests: [answer] * len(requests))
    scores = {score.name: score.correct for score in model.score(task).scores}
    assert scores == {
        "exact_match, strict-match": str(strict),
        "exact_match, flexible-extract": str(flexible),
    }


def test_numbers_with_commas_are_the_same_number(tmp_path, loaded, monkeypatch):
    write_sums(tmp_path)
    write_rows(tmp_path / "gsm8k_test.jsonl", [{"question": "?", "answer": "So.\n#### 1,018"}])
    model = asked(loaded)
    monkeypatch.setattr(model, "generate_until", lambda requests: ["It is 1018.\n#### 1018"])
    scores = model.score(make_task(read_task(tmp_path, "gsm8k"))).scores
    assert [score.correct for score in scores] == ["1", "1"]


def test_answers_are_greedy_and_counted_where_they_are_cut(tmp_path, loaded):
    data = read_task(write_sums(tmp_path, max_gen_toks=16), "gsm8k")
    model = asked(loaded, batch_size=3)
    # the model's generation settings would change what is generated
    loaded[0].generation_config.repetition_penalty = 50.0
    try:
        task = make_task(data, 1)
        assert model.count_truncated(task) == 0
        texts = model.generate_until(task.instances)
        own = []
        ended = 0
        for request in task.instances:
            ids = loaded[1](request.args[0], return_tensors="pt").input_ids
            length = ids.shape[1]
            while ids.shape[1] < length + 16 and ids[0, -1] != loaded[1].eos_token_id:
                with torch.no_grad():
                    ids = torch.cat([ids, loaded[0](ids).logits[:, -1:].argmax(-1)], 1)
            own.append(loaded[1].decode(ids[0, length:], skip_special_tokens=True))
            ended += int(ids[0, -1] == loaded[1].eos_token_id)
        assert [text.partition("Question:")[0] for text in own] == texts
        outcome = model.score(make_task(data, 1))
        assert outcome.num_unfinished == len(SUMS) - ended > 0
    finally:
        loaded[0].generation_config.repetition_penalty = None


def test_prompts_that_the_model_cannot_see_are_counted_before_anything_is_computed(
    tmp_path, loaded, monkeypatch
):
    model = asked(loaded)
    monkeypatch.setattr(model, "_model_call", lambda *_: pytest.fail("computed"))
    rows = [
        {**row, "question": row["question"] * size}
        for row, size in zip(QUESTIONS, range(10, 300, 29))
    ]
    task = make_task(read_task(write_choices(tmp_path, rows=rows), "choices"))
    own = 0
    for row in rows:
        longest = max(row["choices"], key=len)
        own += len(f"Question: {row['question']}\nAnswer: {longest}") > 257
    assert 0 < model.count_truncated(task) == own < 10
    task = make_task(read_task(write_sums(tmp_path), "gsm8k"), 4)
    prompts = [request.args[0] for request in task_requests(task)]
    assert model.count_truncated(task) == sum(len(prompt) > 240 for prompt in prompts)
    task = make_task(read_task(write_sums(tmp_path, max_gen_toks=256), "gsm8k"), 0)
    with pytest.raises(
        DataError, match="row 1: the model can see 256 tokens, and the answer alone"
    ):
        model.count_truncated(task)
    rows = [{**QUESTIONS[0], "choices": ["a", "b" * 300], "answer": 0}]
    task = make_task(read_task(write_choices(tmp_path, rows=rows), "choices"))
    with pytest.raises(DataError, match="row 1: a choice has 301 tokens"):
        model.count_truncated(task)


def task_requests(task):
    task.build_all_requests()
    return task.instances


def test_nan_is_not_a_score(tmp_path, loaded):
    write_sums(write_choices(tmp_path))
    model = asked(loaded)
    weight = loaded[0].get_input_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    try:
        for name in ("choices", "gsm8k"):
            with pytest.raises(ModelError, match="overflows in this dtype. Try --dtype float32"):
                model.score(make_task(read_task(tmp_path, name), 0))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_chat_needs_a_template(tmp_path, loaded):
    task = make_task(read_task(write_choices(tmp_path), "choices"))
    model = asked(loaded, chat=True)
    model.count_truncated(task)
    assert (
        task.instances[0].args[0].startswith("<|im_start|>user\nQuestion: ab 0\nAnswer:<|im_end|>")
    )
    template = loaded[1].chat_template
    loaded[1].chat_template = None
    try:
        with pytest.raises(DataError, match="--chat: the tokenizer has no chat template"):
            asked(loaded, chat=True)
    finally:
        loaded[1].chat_template = template


def test_a_16_bit_model_is_scored_in_float32_from_its_logits(tmp_path, loaded):
    task = make_task(read_task(write_choices(tmp_path), "choices"))
    kept = {name: tensor.detach().clone() for name, tensor in loaded[0].state_dict().items()}
    loaded[0].to(torch.bfloat16)
    try:
        model = asked(loaded, batch_size=1)
        model.count_truncated(task)
        answers = [value for value, _ in model.loglikelihood(task.instances)]
        own = [log_likelihood(*loaded, *request.args) for request in task.instances]
    finally:
        loaded[0].to(torch.float32)
        loaded[0].load_state_dict(kept)
    # rounded to bfloat16, sums of about -50 would be a quarter off
    assert answers == pytest.approx(own, abs=1e-3)


def test_loading_into_lm_eval_ties_no_weights(loaded):
    """It calls `tie_weights`, which would replace a head that was trained on its own."""
    model, tokenizer = loaded
    head = model.get_output_embeddings()
    kept = head.weight
    own = torch.nn.Parameter(torch.zeros_like(kept))
    head.weight = own
    try:
        asked(loaded)
        assert head.weight is own
        assert "tie_weights" not in vars(model)
    finally:
        head.weight = kept
