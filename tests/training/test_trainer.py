"""Training is a function of model, data and seed; it scores completions only and leaves no trace around it."""

import gc
import math
import os
import random

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import tokenize
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.errors import ConfigError, DataError, FedMomentumError, ModelError
from fedmomentum.training.arguments import ALLOWED_ARGUMENTS, CONFIGURED_ARGUMENTS, check_arguments
from fedmomentum.training.function import TrainReport
from fedmomentum.training.hf_trainer import (
    LengthGroupedSampler,
    LocalTrainingArguments,
    TrainableView,
)
from fedmomentum.training.isolation import MAX_MATH_SDPA_TOKENS
from tests.tiny import PAD_TOKEN_ID, tiny_gpt2, tiny_llama
from tests.training.keywords import train

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
TINY_MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
DEFAULTS = dict(
    pad_token_id=PAD_TOKEN_ID,
    learning_rate=1e-2,
    local_steps=4,
    local_epochs=None,
    batch_size=4,
    seed=1,
)


@pytest.fixture(scope="module", params=sorted(TINY_MODELS))
def folder(request, tmp_path_factory):
    return TINY_MODELS[request.param](tmp_path_factory.mktemp(request.param))


def new_model(folder, dropout=0.0):
    model = AutoModelForCausalLM.from_pretrained(folder)
    targets = TARGETS[model.config.model_type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, target_modules=targets, lora_dropout=dropout, fan_in_fan_out=targets == ["c_attn"]
        )
        model = get_peft_model(model, config)
        for (
            name,
            parameter,
        ) in model.named_parameters():  # B starts at zero, which hides A's gradient.
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens_of(folder, count=12):
    examples = [Example("ab"[: 1 + i % 2] + str(i * 7), "xyz"[: 1 + i % 3]) for i in range(count)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenize(examples, tokenizer, max_length=32, max_truncated_fraction=0.0, owner="test")


def adapter_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same_bits(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def rows(tokens, indices):
    pick = [
        tuple(column[i] for i in indices)
        for column in (
            tokens.input_ids,
            tokens.num_prompt_tokens,
            tokens.categories,
            tokens.is_truncated,
        )
    ]
    return TokenizedExamples(*pick, 0)


def test_same_seed_same_bits_with_dropout_whatever_the_global_generators_hold(folder):
    results = []
    for outside_seed, seed in ((0, 1), (99, 1), (0, 2)):
        random.seed(outside_seed), np.random.seed(outside_seed), torch.manual_seed(outside_seed)
        model = new_model(folder, dropout=0.3)
        report = train(model, tokens_of(folder), **DEFAULTS | {"seed": seed, "local_steps": 8})
        results.append((adapter_of(model), report))
    assert same_bits(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not same_bits(results[0][0], results[2][0])


def test_optimizer_starts_fresh_in_each_call(folder):
    """Training, returning to the start and training again gives the same bits: no moments are carried over."""
    model, tokens = new_model(folder), tokens_of(folder)
    start = adapter_of(model)
    train(model, tokens, **DEFAULTS)
    first = adapter_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    train(model, tokens, **DEFAULTS)
    assert same_bits(first, adapter_of(model))


def test_one_step_is_plain_adamw_on_the_completion_loss(folder):
    """Compared to a few lines of torch, one row at a time: padding, positions and prompts must not matter."""
    tokens = tokens_of(folder, 6)
    model, reference = new_model(folder), new_model(folder)
    settings = DEFAULTS | {"local_steps": 1, "batch_size": 6}
    report = train(model, tokens, **settings, arguments={"max_grad_norm": 0.0})

    optimizer = torch.optim.AdamW(
        [p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    nll, num_tokens = torch.tensor(0.0), 0
    for ids, num_prompt in zip(tokens.input_ids, tokens.num_prompt_tokens, strict=True):
        logits = reference(input_ids=torch.tensor([ids])).logits[0]
        nll = nll + F.cross_entropy(
            logits[num_prompt - 1 : -1], torch.tensor(ids[num_prompt:]), reduction="sum"
        )
        num_tokens += len(ids) - num_prompt
    (nll / num_tokens).backward()
    optimizer.step()

    assert report == TrainReport(
        *[pytest.approx(nll.item() / num_tokens, rel=1e-5)] * 3,
        1,
        num_tokens,
        learning_rate_sum=1e-2,
    )
    for name, value in adapter_of(reference).items():
        # Adam's first step is lr * sign(gradient) where the gradient is well above epsilon.
        torch.testing.assert_close(adapter_of(model)[name], value, atol=2e-5, rtol=1e-3)


def test_accumulated_micro_batches_are_one_batch(folder):
    """Completions of unequal length: the mean of the micro-batches' means would differ."""
    tokens = rows(tokens_of(folder), [0, 3, 2, 5])
    assert {
        len(ids) - n for ids, n in zip(tokens.input_ids, tokens.num_prompt_tokens, strict=True)
    } == {2, 4}
    full_batch, parts = new_model(folder), new_model(folder)
    settings = DEFAULTS | {"local_steps": 2}
    order = {"train_sampling_strategy": "sequential", "adam_epsilon": 1e-3}
    first = train(full_batch, tokens, **settings | {"batch_size": 4}, arguments=order)
    second = train(
        parts,
        tokens,
        **settings | {"batch_size": 2},
        arguments=order | {"gradient_accumulation_steps": 2},
    )
    assert second.num_steps == first.num_steps == 2 and second.num_tokens == first.num_tokens == 24
    assert second.first_loss == pytest.approx(first.first_loss, rel=1e-5)
    for name, value in adapter_of(full_batch).items():
        torch.testing.assert_close(adapter_of(parts)[name], value, atol=1e-6, rtol=1e-4)


def test_only_what_is_trainable_changes_and_it_learns(folder):
    model, tokens = new_model(folder), tokens_of(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = train(model, tokens, **DEFAULTS | {"local_steps": 30})
    assert report.last_loss < 0.8 * report.first_loss
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_epochs_are_rounded_up_to_steps_and_each_step_is_reported(folder):
    tokens, seen = tokens_of(folder, 10), []
    settings = DEFAULTS | {"local_steps": None, "local_epochs": 1.5}
    report = train(new_model(folder), tokens, **settings, on_step=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [
        (i, 5) for i in range(1, 6)
    ]  # 3 batches a pass, 4.5 rounded up
    assert (report.first_loss, report.last_loss, report.num_steps) == (seen[0][2], seen[-1][2], 5)
    assert min(step[2] for step in seen) <= report.loss <= max(step[2] for step in seen)


@pytest.mark.parametrize("steps", [2, 3])
def test_grouping_by_length_pads_less_and_trains_on_what_a_random_order_would_draw(steps):
    """With few steps a sampler that sorts the longest to the front would train on them alone."""
    lengths = torch.randint(1, 100, (43,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(3)
    drawn = torch.randperm(43).tolist()
    torch.manual_seed(3)
    order = list(LengthGroupedSampler(lengths, batch_size=4, num_batches=steps))
    assert sorted(order) == list(range(43))

    def padding(rows):
        batches = [rows[i : i + 4] for i in range(0, 43, 4)]
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches) - sum(lengths)

    for start in range(0, 43, 4 * steps):
        assert set(order[start : start + 4 * steps]) == set(drawn[start : start + 4 * steps])
    assert padding(order) < 0.8 * padding(drawn)


def test_grouping_by_length_is_a_function_of_the_seed(folder):
    results = []
    for seed in (1, 1, 2):
        model = new_model(folder)
        report = train(
            model,
            tokens_of(folder),
            **DEFAULTS | {"seed": seed},
            arguments={"train_sampling_strategy": "group_by_length"},
        )
        results.append((adapter_of(model), report.num_tokens))
    assert same_bits(results[0][0], results[1][0]) and not same_bits(results[0][0], results[2][0])


def test_learning_rate_is_constant_by_default(folder, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(new_model(folder), tokens_of(folder), **DEFAULTS)
    train(new_model(folder), tokens_of(folder), **DEFAULTS, arguments={"warmup_steps": 2})
    train(
        new_model(folder), tokens_of(folder), **DEFAULTS, arguments={"lr_scheduler_type": "linear"}
    )
    assert rates[:4] == [1e-2] * 4
    assert rates[4:8] == pytest.approx([0, 5e-3, 1e-2, 1e-2])
    assert rates[8:] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])


@pytest.mark.parametrize(
    ("dtype", "longest", "flash"),
    [
        (torch.bfloat16, MAX_MATH_SDPA_TOKENS, False),
        (torch.bfloat16, MAX_MATH_SDPA_TOKENS + 1, True),
        (torch.float32, MAX_MATH_SDPA_TOKENS, True),
    ],
)
def test_short_rows_in_16_bits_take_the_plain_attention_for_the_call(folder, dtype, longest, flash):
    model, seen = new_model(folder).to(dtype), []
    examples = TokenizedExamples(
        ((5,) * longest, (6,) * 8), (longest - 1, 4), ("", ""), (False, False), 0
    )
    for checkpointing in (False, True):
        train(
            model,
            examples,
            **DEFAULTS
            | {
                "on_step": lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled()),
                "arguments": {"gradient_checkpointing": checkpointing},
            },
        )
    assert seen == [flash] * 8 and torch.backends.cuda.flash_sdp_enabled()


def test_gradient_checkpointing_changes_nothing_and_ends_with_the_call(folder):
    plain, checkpointed = new_model(folder, dropout=0.3), new_model(folder, dropout=0.3)
    train(plain, tokens_of(folder), **DEFAULTS)
    train(checkpointed, tokens_of(folder), **DEFAULTS, arguments={"gradient_checkpointing": True})
    assert not checkpointed.get_base_model().is_gradient_checkpointing
    for name, value in adapter_of(plain).items():
        torch.testing.assert_close(adapter_of(checkpointed)[name], value, atol=1e-6, rtol=1e-5)


def test_training_leaves_no_files_output_or_global_state(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    model, tokens = new_model(folder).eval(), tokens_of(folder)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    use_cache = model.config.use_cache
    train(model, tokens, **DEFAULTS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert not model.training and model.config.use_cache == use_cache
    assert all(parameter.grad is None for parameter in model.parameters())
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr().out == ""


def test_memory_does_not_grow_with_calls(folder):
    """A kept optimizer state would add its tensors at each call; a kept trainer, thousands of objects."""
    model, tokens = new_model(folder), tokens_of(folder)

    def num_tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    for _ in range(3):
        train(model, tokens, **DEFAULTS | {"local_steps": 1})
    tensors, memory = num_tensors(), psutil.Process().memory_info().rss
    for _ in range(6):
        train(model, tokens, **DEFAULTS | {"local_steps": 1})
    assert num_tensors() == tensors
    assert psutil.Process().memory_info().rss - memory < 16 * 2**20


def test_training_runs_no_garbage_collection_and_leaves_nothing_of_the_trainer(folder, monkeypatch):
    """A collection visits every object of the process; the optimizer is gone at once without one."""
    model, tokens = new_model(folder), tokens_of(folder)
    collect, calls = gc.collect, []
    monkeypatch.setattr(gc, "collect", lambda *args: calls.append(args) or collect(*args))
    train(model, tokens, **DEFAULTS | {"local_steps": 1})
    assert not calls and gc.isenabled()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, torch.optim.AdamW)]


def test_loss_that_is_not_finite_is_refused_before_it_reaches_the_weights(folder):
    model, tokens = new_model(folder), tokens_of(folder)
    with torch.no_grad():
        model.get_base_model().get_output_embeddings().weight[5] = math.nan
    start = adapter_of(model)
    with pytest.raises(
        FedMomentumError, match="training loss is nan at step 1: lower the learning rate"
    ):
        train(model, tokens, **DEFAULTS)
    assert same_bits(start, adapter_of(model))


def test_weights_that_are_not_finite_are_refused(folder):
    with pytest.raises(
        FedMomentumError, match="(trained weight is no longer finite|training loss is (nan|inf))"
    ):
        train(
            new_model(folder),
            tokens_of(folder),
            **DEFAULTS | {"learning_rate": 1e38, "local_steps": 1},
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_steps": 0}, "local-steps must be above 0; got 0"),
        ({"local_steps": None, "local_epochs": 0.0}, "local-epochs must be above 0; got 0"),
        ({"local_steps": None}, "exactly one of local-steps and local-epochs .*got None and None"),
        ({"local_epochs": 1.0}, "exactly one of local-steps and local-epochs"),
        ({"learning_rate": math.nan}, "learning-rate must be above 0; got nan"),
        ({"batch_size": 0}, "batch-size must be above 0; got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        train(new_model(folder), tokens_of(folder), **DEFAULTS | change)


def test_empty_data_and_frozen_model_are_refused(folder):
    with pytest.raises(DataError, match="no examples"):
        train(new_model(folder), TokenizedExamples((), (), (), (), 0), **DEFAULTS)
    with pytest.raises(ModelError, match="no parameter of the model is trainable"):
        train(new_model(folder).requires_grad_(False), tokens_of(folder), **DEFAULTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "weight_decey",
            "unknown training argument weight_decey; the nearest known is weight_decay",
        ),
        ("learning_rate", "set training.learning-rate instead"),
        ("max_steps", "set training.local-steps instead"),
        ("per_device_train_batch_size", "set training.batch-size instead"),
        ("push_to_hub", "cannot be set here.*warmup_steps"),
    ],
)
def test_arguments_that_cannot_be_set_are_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        check_arguments({name: 1})


def test_tables_of_arguments_name_real_fields():
    names = set(TrainingArguments.__dataclass_fields__)
    assert names >= ALLOWED_ARGUMENTS | set(CONFIGURED_ARGUMENTS)
    assert not ALLOWED_ARGUMENTS & set(CONFIGURED_ARGUMENTS)


def test_arguments_reach_the_trainer(folder):
    results = []
    for arguments in (
        {},
        {"weight_decay": 0.5},
        {"adam_beta1": 0.5},
        {"optim": "sgd"},
        {"max_grad_norm": 1e-6, "adam_epsilon": 1.0},
        {"label_smoothing_factor": 0.3},
    ):
        model = new_model(folder)
        train(model, tokens_of(folder), **DEFAULTS, arguments=arguments)
        results.append(adapter_of(model))
    for i, first in enumerate(results):
        assert not any(same_bits(first, second) for second in results[:i])


# ── what the trainer sees ──


def test_the_trainer_sees_what_is_trained_and_asks_the_model_for_the_rest(folder):
    model = new_model(folder)
    seen = TrainableView(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [id(parameter) for parameter in seen.parameters()] == [
        id(parameter) for parameter in trained
    ]
    assert (
        len(list(seen.modules())) == 1
        and seen.config is model.config
        and seen.to(torch.device("cpu")) is seen
    )
    assert (
        seen.train().training
        and model.training
        and not seen.train(False).training
        and not model.training
    )


def test_a_parameter_of_the_model_itself_can_be_trained(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    model.loss = torch.nn.Parameter(torch.ones(2))
    assert [parameter.shape for parameter in TrainableView(model).parameters()] == [(2,)]


def test_weight_decay_leaves_biases_and_norms_alone(folder):
    """As transformers does, by the parameters' own names. The learning rate is so small that only decay acts."""
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if list(layer.parameters(recurse=False))
    }
    norm = next(layer for name, layer in layers.items() if "norm" in name or "ln_" in name)
    matrix = next(
        layer
        for layer in layers.values()
        if layer.weight.ndim == 2 and layer not in (model.lm_head, norm)
    )
    for layer in (norm, matrix):
        layer.weight.requires_grad_(True)
    before = norm.weight.clone(), matrix.weight.clone()
    train(
        model,
        tokens_of(folder),
        **DEFAULTS | {"learning_rate": 1e-9},
        arguments={"weight_decay": 1e8},
    )
    assert torch.allclose(norm.weight, before[0], atol=1e-7)
    assert matrix.weight.norm() < 0.9 * before[1].norm()


def test_training_on_the_cpu_touches_no_gpu(folder, monkeypatch):
    """`fork_rng` without a list makes a context on every GPU."""
    forked = []
    real = torch.random.fork_rng

    def fork_rng(devices=None, **options):
        forked.append(devices)
        return real(devices, **options)

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    model = new_model(folder)
    forked.clear()
    train(model, tokens_of(folder), **DEFAULTS | {"local_steps": 1})
    assert forked == [[]]


def test_the_trainer_uses_the_device_that_the_model_is_on(tmp_path, monkeypatch):
    """transformers takes the first GPU; what it says of this machine does not matter."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    made_current = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    arguments = LocalTrainingArguments(
        output_dir=str(tmp_path), model_device="cuda:1", report_to="none"
    )
    assert arguments.device == torch.device("cuda:1")
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 8
    trainer = Trainer(nn.Linear(2, 2), arguments, train_dataset=[{"x": torch.zeros(2)}])
    assert trainer.accelerator.device == torch.device("cuda:1")
    assert trainer.get_train_dataloader().device == torch.device("cuda:1")
    assert not made_current
    arguments = LocalTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert arguments.device == torch.device("cpu") and arguments.n_gpu == 0


def test_layers_that_are_computed_again_give_the_same_bits(folder):
    """Gradient checkpointing saves memory and changes nothing, with carried moments too."""
    tokens = tokens_of(folder)
    results = []
    for arguments in ({}, {"gradient_checkpointing": True, "optim": "adamw_torch_fused"}):
        arguments = {"optim": "adamw_torch_fused"} | arguments
        model = new_model(folder)
        first = train(model, tokens, **DEFAULTS, arguments=arguments, moments={})
        train(model, tokens, **DEFAULTS, arguments=arguments, moments=first.moments)
        results.append((adapter_of(model), first.loss))
        assert not model.get_base_model().is_gradient_checkpointing
    assert same_bits(results[0][0], results[1][0]) and results[0][1] == results[1][1]
