"""An optimizer's moments set before training and read after it: split training equals uninterrupted training, bit for bit."""

import gc
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from fedmomentum.aggregation.moments import Moments
from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.training.arguments import check_optimizer
from fedmomentum.training.optimizer_state import (
    read_moments,
    set_moments,
    trained_parameters,
)
from tests.tiny import tiny_gpt2, tiny_llama
from tests.training.keywords import train
from tests.training.moments import bad_moments, copy_of, random_moments, same_moments
from tests.training.test_trainer import DEFAULTS, adapter_of, new_model, same_bits, tokens_of

TINY_MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
# 12 examples in batches of 4, in order: three steps are one pass, and each pass is the same.
ONE_PASS = DEFAULTS | {"local_steps": 3}
TWO_PASSES = DEFAULTS | {"local_steps": 6}
IN_ORDER = {"train_sampling_strategy": "sequential", "weight_decay": 0.1}
OPTIMIZERS = [
    {},
    {"optim": "adamw_torch", "adam_beta2": 0.95},
    {"optim": "adamw_torch_fused"},
    {"optim": "sgd", "optim_args": "momentum=0.9"},
    {"optim": "sgd", "optim_args": "momentum=0.5, dampening=0.2"},
    {"optim": "sgd", "optim_args": "nesterov=true, momentum=0.9"},
]


@pytest.fixture(scope="module", params=sorted(TINY_MODELS))
def folder(request, tmp_path_factory):
    return TINY_MODELS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


# ── training in parts ──


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_trainings_with_the_moments_between_are_one_training(folder, optimizer):
    tokens = tokens_of(folder)
    arguments = IN_ORDER | optimizer
    uninterrupted, parts, fresh = new_model(folder), new_model(folder), new_model(folder)
    wanted = train(uninterrupted, tokens, **TWO_PASSES, arguments=arguments, moments={})

    first = train(parts, tokens, **ONE_PASS, arguments=arguments, moments={})
    second = train(parts, tokens, **ONE_PASS, arguments=arguments, moments=first.moments)
    assert same_bits(adapter_of(uninterrupted), adapter_of(parts))
    assert same_moments(wanted.moments, second.moments)
    assert second.last_loss == wanted.last_loss

    assert first.moments.keys() == trained_parameters(parts).keys()
    assert {m.step for m in first.moments.values()} == {3}
    assert {m.step for m in second.moments.values()} == {6}
    assert all((m.second is None) == ("sgd" in optimizer.values()) for m in first.moments.values())

    # Without the moments it is another training, so that the equality above says something.
    train(fresh, tokens, **ONE_PASS, arguments=arguments, moments={})
    train(fresh, tokens, **ONE_PASS, arguments=arguments, moments={})
    assert not same_bits(adapter_of(uninterrupted), adapter_of(fresh))


def test_accumulated_batches_count_as_one_step(llama):
    tokens = tokens_of(llama)
    arguments = IN_ORDER | {"gradient_accumulation_steps": 3}
    uninterrupted, parts = new_model(llama), new_model(llama)
    train(uninterrupted, tokens, **DEFAULTS | {"local_steps": 2}, arguments=arguments)
    one = DEFAULTS | {"local_steps": 1}
    first = train(parts, tokens, **one, arguments=arguments, moments={})
    second = train(parts, tokens, **one, arguments=arguments, moments=first.moments)
    assert {m.step for m in second.moments.values()} == {2}
    assert same_bits(adapter_of(uninterrupted), adapter_of(parts))


@pytest.mark.parametrize("optimizer", OPTIMIZERS[:1] + OPTIMIZERS[3:4])
def test_a_fresh_start_is_not_changed_by_being_observed(folder, optimizer):
    """Random order and dropout: reading moments takes nothing from any generator."""
    results = []
    for moments in (None, {}):
        model = new_model(folder, dropout=0.3)
        report = train(model, tokens_of(folder), **DEFAULTS, arguments=optimizer, moments=moments)
        results.append((adapter_of(model), report))
    (plain, unobserved), (other, observed) = results
    assert same_bits(plain, other)
    assert unobserved.moments is None and observed.moments
    assert replace(observed, moments=None) == unobserved


def test_only_the_named_parameters_start_from_moments(llama):
    tokens = tokens_of(llama)
    half = {n: m for n, m in random_moments(new_model(llama)).items() if "lora_A" in n}
    model = new_model(llama)
    report = train(model, tokens, **DEFAULTS, moments=half)
    steps = {name: m.step for name, m in report.moments.items()}
    assert {steps[name] for name in half} == {9}
    assert {step for name, step in steps.items() if name not in half} == {4}
    assert len(steps) == 2 * len(half)


def test_sgd_continues_where_only_some_have_a_buffer(llama):
    half = {n: m for n, m in random_moments(new_model(llama), is_sgd=True).items() if "lora_A" in n}
    arguments = {"optim": "sgd", "optim_args": "momentum=0.9"}
    report = train(
        new_model(llama), tokens_of(llama), **DEFAULTS, arguments=arguments, moments=half
    )
    assert {m.step for n, m in report.moments.items() if n in half} == {9}
    assert {m.step for n, m in report.moments.items() if n not in half} == {4}


def test_moments_are_copied_in_and_out(llama):
    """One process trains many clients from the same tensors."""
    model, tokens = new_model(llama), tokens_of(llama)
    moments = random_moments(model)
    before = copy_of(moments)
    first = train(model, tokens, **DEFAULTS, moments=moments)
    assert same_moments(moments, before)
    kept = copy_of(first.moments)
    train(model, tokens, **DEFAULTS, moments=first.moments)
    assert same_moments(first.moments, kept)


# ── the optimizer ──


def one_parameter(optimizer_class, dtype=torch.float64, **options):
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=dtype))
    return parameter, optimizer_class([parameter], lr=0.1, **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_step_count_and_the_bias_correction_continue(fused, decoupled):
    """Against Adam's formulas: step 10 after moments of nine steps."""
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    parameter, optimizer = one_parameter(optimizer_class, fused=fused, weight_decay=0.01)
    start = parameter.detach().clone()
    first = torch.tensor([[0.1, -0.2], [0.3, 0.0]], dtype=torch.float64)
    second = torch.tensor([[0.04, 0.01], [0.5, 0.2]], dtype=torch.float64)
    set_moments(optimizer, {"w": parameter}, {"w": Moments(first, second, 9)})
    assert optimizer.state[parameter]["step"].dtype == torch.float32
    gradient = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    parameter.grad = gradient.clone()
    optimizer.step()

    decayed = start * (1 - 0.1 * 0.01) if decoupled else start
    slope = gradient if decoupled else gradient + 0.01 * start
    m = 0.9 * first + 0.1 * slope
    v = 0.999 * second + 0.001 * slope**2
    root = (v / (1 - 0.999**10)).sqrt()
    wanted = decayed - 0.1 * m / (1 - 0.9**10) / (root + 1e-8)
    torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-14)
    read = read_moments(optimizer, {"w": parameter})["w"]
    assert read.step == 10 and read.first.dtype == read.second.dtype == torch.float32
    torch.testing.assert_close(read.first, m.float())
    torch.testing.assert_close(read.second, v.float())


def test_sgd_continues_with_its_buffer():
    parameter, optimizer = one_parameter(torch.optim.SGD, momentum=0.9)
    start = parameter.detach().clone()
    set_moments(optimizer, {"w": parameter}, {"w": Moments(torch.full((2, 2), 2.0), None, 7)})
    set_moments(optimizer, {"w": parameter}, {})  # a second call must not count twice
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    # The buffer is 0.9 * 2 + 1 = 2.8, then 0.9 * 2.8 + 1 = 3.52.
    torch.testing.assert_close(parameter.detach(), start - 0.1 * (2.8 + 3.52))
    read = read_moments(optimizer, {"w": parameter})["w"]
    assert read.step == 9 and read.second is None
    torch.testing.assert_close(read.first, torch.full((2, 2), 3.52))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_the_state_is_in_the_parameters_dtype_and_layout_and_read_as_a_copy(fused, dtype):
    parameter = nn.Parameter(torch.randn(3, 5).t().to(dtype))
    optimizer = torch.optim.AdamW([parameter], fused=fused)
    value = Moments(torch.randn(5, 3), torch.rand(5, 3), 4)
    set_moments(optimizer, {"w": parameter}, {"w": value})
    state = optimizer.state[parameter]
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key].dtype == dtype and state[key].stride() == parameter.stride()
        assert not state[key].requires_grad
    read = read_moments(optimizer, {"w": parameter})["w"]
    assert torch.equal(read.first, value.first.to(dtype).float())
    read.first.zero_()
    assert state["exp_avg"].any()


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"fused": False}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_the_state_survives_being_saved_and_loaded(optimizer_class, options):
    """This is what accelerate does with an optimizer that it wraps."""
    parameter, optimizer = one_parameter(optimizer_class, dtype=torch.float32, **options)
    second = None if optimizer_class is torch.optim.SGD else torch.rand(2, 2)
    moments = {"w": Moments(torch.randn(2, 2), second, 4)}
    set_moments(optimizer, {"w": parameter}, moments)
    optimizer.load_state_dict(optimizer.state_dict())
    assert same_moments(read_moments(optimizer, {"w": parameter}), moments)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert read_moments(optimizer, {"w": parameter})["w"].step == 5


def test_a_parameter_that_had_no_gradient_has_no_moments():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    parameters = {"used": used, "unused": unused}
    for optimizer in (
        torch.optim.AdamW([used, unused]),
        torch.optim.SGD([used, unused], momentum=0.9),
    ):
        set_moments(optimizer, parameters, {})
        used.grad = torch.ones(2)
        optimizer.step()
        assert read_moments(optimizer, parameters).keys() == {"used"}


# ── refusals ──


@pytest.mark.parametrize(
    "optim",
    [
        "adafactor",
        "adagrad",
        "rmsprop",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "adamw_torch_8bit",
        "adamw_torch_xla",
        "lion_32bit",
        "schedule_free_adamw",
        "apollo_adamw",
    ],
)
def test_optimizers_without_moments_are_refused_by_name(llama, optim):
    message = f'the optimizer {optim} cannot be carried over; set training.optimizer-state = "fresh", or use adamw_torch'
    with pytest.raises(ConfigError, match=message):
        check_optimizer({"optim": optim})
    model = new_model(llama)
    before = adapter_of(model)
    with pytest.raises(ConfigError, match=message):
        train(model, tokens_of(llama), **DEFAULTS, arguments={"optim": optim}, moments={})
    assert same_bits(before, adapter_of(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "sgd"}, "sgd with momentum 0 has no state"),
        ({"optim": "sgd", "optim_args": "momentum=0.0"}, "sgd with momentum 0.0 has no state"),
        ({"optim": "sgd", "optim_args": "dampening=0.5"}, "sgd with momentum 0 has no state"),
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "sgd with momentum nan has no state"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "sgd with momentum much has no state"),
        ({"optim_args": "amsgrad=True"}, "adamw_torch_fused with amsgrad"),
        ({"optim": "adamw_torch", "optim_args": "amsgrad=True"}, "adamw_torch with amsgrad"),
        ({"optim": "adamw_torch_fused", "optim_args": "x=1, amsgrad = 1"}, "fused with amsgrad"),
    ],
)
def test_options_that_leave_no_moments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=f'{message}.* training.optimizer-state = "fresh"'):
        check_optimizer(arguments)


@pytest.mark.parametrize(
    "arguments", [*OPTIMIZERS, {"optim_args": "amsgrad=False"}, {"optim_args": None}]
)
def test_supported_optimizers_pass(arguments):
    check_optimizer(arguments)


def test_optimizers_without_moments_are_refused_when_they_are_there():
    weight = nn.Parameter(torch.ones(2))
    for optimizer, message in (
        (torch.optim.Adagrad([weight]), "state of the optimizer Adagrad cannot be set or read"),
        (torch.optim.NAdam([weight]), "state of the optimizer NAdam cannot"),
        (torch.optim.SGD([weight]), "SGD without momentum has no state"),
        (torch.optim.AdamW([weight], amsgrad=True), "AdamW with amsgrad has a third moment"),
    ):
        with pytest.raises(ConfigError, match=message):
            set_moments(optimizer, {"w": weight}, {})
        with pytest.raises(ConfigError, match=message):
            read_moments(optimizer, {"w": weight})


def test_steps_that_were_not_counted_are_refused():
    parameter, optimizer = one_parameter(torch.optim.SGD, momentum=0.9)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(ModelError, match="moments of w: .*not counted; call set_moments before"):
        read_moments(optimizer, {"w": parameter})


@pytest.mark.parametrize("number", range(len(bad_moments())))
def test_moments_that_cannot_be_used_are_refused_by_the_parameters_name(llama, number):
    value, message = bad_moments()[number]
    model = new_model(llama)
    before = adapter_of(model)
    name = next(name for name in before if "q_proj.lora_A" in name)
    with pytest.raises(ModelError, match=message):
        train(model, tokens_of(llama), **DEFAULTS, moments={name: value})
    assert same_bits(before, adapter_of(model))


def test_moments_of_another_optimizer_are_refused(llama):
    model, tokens = new_model(llama), tokens_of(llama)
    with pytest.raises(ModelError, match="they are SGD's, and the optimizer is AdamW"):
        train(model, tokens, **DEFAULTS, moments=random_moments(model, is_sgd=True))
    sgd = {"optim": "sgd", "optim_args": "momentum=0.9"}
    with pytest.raises(ModelError, match="they are Adam's, and the optimizer is SGD"):
        train(model, tokens, **DEFAULTS, arguments=sgd, moments=random_moments(model))


def test_unknown_and_frozen_names_are_refused(llama):
    model, tokens = new_model(llama), tokens_of(llama)
    moments = random_moments(model)
    name = next(name for name in moments if "lora_A" in name)
    with pytest.raises(
        ModelError, match="moments of no.such.weight: the model trains no parameter"
    ):
        train(model, tokens, **DEFAULTS, moments={"no.such.weight": moments[name]})
    for frozen, parameter in model.named_parameters():
        if "lora_A" in frozen:
            parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="moments of .*lora_A.*: the model trains no parameter"):
        train(model, tokens, **DEFAULTS, moments={name: moments[name]})
    parameter, optimizer = one_parameter(torch.optim.AdamW)
    other = {"w": parameter, "other": nn.Parameter(torch.ones(2, 2))}
    value = Moments(torch.ones(2, 2), torch.ones(2, 2), 1)
    with pytest.raises(ModelError, match="moments of other: the optimizer does not train"):
        set_moments(optimizer, other, dict.fromkeys(other, value))
    assert not optimizer.state  # nor is the first of the two set


def test_moments_that_overflow_in_training_are_refused():
    """A gradient whose square is beyond float32 leaves the weights finite."""
    parameter, optimizer = one_parameter(torch.optim.AdamW, dtype=torch.float32)
    parameter.grad = torch.full((2, 2), 1e25)
    optimizer.step()
    assert parameter.isfinite().all()
    with pytest.raises(ModelError, match="the second moment of w is not finite"):
        read_moments(optimizer, {"w": parameter})


# ── nothing is left ──


@pytest.mark.parametrize("fails", [False, True])
def test_training_from_moments_leaves_no_optimizer_and_no_global_state(llama, fails):
    model, tokens = new_model(llama).eval(), tokens_of(llama)
    moments = random_moments(model)
    if fails:
        moments["unknown"] = next(iter(moments.values()))
    gc.unfreeze()
    gc.collect()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    hooks = _global_optimizer_post_hooks.copy()
    methods = torch.optim.AdamW.step, torch.optim.SGD.step
    for arguments in ({}, {"optim": "sgd", "optim_args": "momentum=0.9"}):
        is_sgd = bool(arguments)
        start = {n: Moments(m.first, None if is_sgd else m.second, 3) for n, m in moments.items()}
        if fails:
            with pytest.raises(ModelError, match="unknown"):
                train(model, tokens, **DEFAULTS, arguments=arguments, moments=start)
            gc.collect()  # the traceback refers to the trainer
        else:
            train(model, tokens, **DEFAULTS, arguments=arguments, moments=start)
        assert not [x for x in gc.get_objects() if isinstance(x, torch.optim.Optimizer)]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert _global_optimizer_post_hooks == hooks
    assert (torch.optim.AdamW.step, torch.optim.SGD.step) == methods
    assert not model.training and gc.get_freeze_count() == 0
    assert all(parameter.grad is None for parameter in model.parameters())
