"""A custom training function gets the optimizer's moments, and its report is checked."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmomentum.aggregation.moments import Moments
from fedmomentum.config.training import LocalTraining
from fedmomentum.errors import ConfigError, ModelError, QuorumError
from fedmomentum.training import TrainReport
from fedmomentum.training.optimizer_state import read_moments, set_moments, trained_parameters
from fedmomentum.training.trainer import run_training
from tests.helpers import generator
from tests.runs import start, tiny_config
from tests.tiny import PAD_TOKEN_ID, tiny_llama
from tests.training.moments import bad_moments, random_moments
from tests.training.test_trainer import adapter_of, new_model, same_bits, tokens_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def run_own(function, model, tokens, moments):
    hyperparameters = LocalTraining(learning_rate=0.01, batch_size=4, local_steps=3)
    return run_training(
        function,
        model,
        tokens,
        hyperparameters,
        pad_token_id=PAD_TOKEN_ID,
        seed=1,
        on_step=lambda *_: None,
        moments=moments,
    )


def own_steps(model, examples, *, learning_rate, local_steps, moments=None, **_):
    """Steps along seeded gradients; the second half of the gradients follows the first."""
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate)
    set_moments(optimizer, parameters, moments or {})
    num_before = max([0, *(m.step for m in (moments or {}).values())])
    for step in range(num_before, num_before + local_steps):
        g = generator(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=g)
        optimizer.step()
    optimizer.zero_grad()
    state = None if moments is None else read_moments(optimizer, parameters)
    return TrainReport(1.0, 1.0, 1.0, local_steps, 7, moments=state)


def test_a_custom_function_gets_the_moments_and_returns_them(llama):
    uninterrupted, parts = new_model(llama), new_model(llama)
    tokens = tokens_of(llama)
    own_steps(uninterrupted, tokens, learning_rate=0.01, local_steps=6, moments={})
    first = run_own(own_steps, parts, tokens, {})
    second = run_own(own_steps, parts, tokens, first.moments)
    assert same_bits(adapter_of(uninterrupted), adapter_of(parts))
    assert {m.step for m in first.moments.values()} == {3}
    assert {m.step for m in second.moments.values()} == {6}
    assert second.learning_rate_sum == pytest.approx(0.03)


def test_a_custom_function_gets_the_keyword_only_where_moments_are_requested(llama):
    seen = []

    def function(model, examples, **keywords):
        seen.append("moments" in keywords)
        state = random_moments(model)
        return TrainReport(1.0, 1.0, 1.0, 2, 7, moments=state, learning_rate_sum=0.5)

    model, tokens = new_model(llama), tokens_of(llama)
    not_requested = run_own(function, model, tokens, None)
    wanted = run_own(function, model, tokens, {})
    assert seen == [False, True]
    assert not_requested.moments is None and wanted.moments
    assert not_requested.learning_rate_sum == wanted.learning_rate_sum == 0.5


def test_our_trainer_is_run_with_the_moments_too(llama):
    model, tokens = new_model(llama), tokens_of(llama)
    report = run_own(None, model, tokens, random_moments(model, step=5))
    assert {m.step for m in report.moments.values()} == {8}
    assert run_own(None, model, tokens, None).moments is None


@pytest.mark.parametrize("moments", [None, {}, "moments"])
def test_a_custom_function_that_reports_no_moments_is_refused(llama, moments):
    def function(model, examples, **_):
        return TrainReport(1.0, 1.0, 1.0, 2, 7, moments=moments)

    message = 'function .* reported no moments by parameter name; wanted .*read_moments.*optimizer-state = "fresh"'
    with pytest.raises(ConfigError, match=message):
        run_own(function, new_model(llama), tokens_of(llama), {})
    assert run_own(function, new_model(llama), tokens_of(llama), None).num_steps == 2


@pytest.mark.parametrize("number", range(len(bad_moments())))
def test_moments_of_a_custom_function_are_checked(llama, number):
    value, message = bad_moments()[number]

    def function(model, examples, **_):
        name = next(name for name in trained_parameters(model) if "q_proj.lora_A" in name)
        return TrainReport(1.0, 1.0, 1.0, 2, 7, moments={name: value})

    with pytest.raises(ConfigError, match=f"moments that cannot be used: .*{message}"):
        run_own(function, new_model(llama), tokens_of(llama), {})


def test_a_custom_function_is_not_called_with_moments_that_do_not_fit(llama):
    def function(model, examples, **_):
        raise AssertionError("called")

    value = Moments(torch.ones(2), torch.ones(2), 1)
    with pytest.raises(ModelError, match="moments of unknown: the model trains no parameter"):
        run_own(function, new_model(llama), tokens_of(llama), {"unknown": value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": -1}, "num_steps = -1"),
        ({"num_steps": "two"}, "num_steps = 'two'"),
        ({"num_tokens": 7.0}, "num_tokens = 7.0; wanted a whole number"),
        ({"num_tokens": torch.ones(2)}, "num_tokens = tensor"),
        ({"num_tokens": -7}, "num_tokens = -7"),
        ({"learning_rate_sum": math.inf}, "learning_rate_sum = inf"),
        ({"learning_rate_sum": "much"}, "learning_rate_sum = 'much'"),
    ],
)
def test_numbers_reported_by_a_custom_function_are_checked(llama, change, message):
    def function(model, examples, **_):
        return replace(TrainReport(1.0, 1.0, 1.0, 2, 7), **change)

    with pytest.raises(ConfigError, match=message):
        run_own(function, new_model(llama), tokens_of(llama), None)


def test_whole_numbers_of_any_library_may_be_reported(llama):
    def function(model, examples, **_):
        return TrainReport(1.0, 1.0, 1.0, np.int64(2), torch.tensor(7))

    report = run_own(function, new_model(llama), tokens_of(llama), None)
    assert (type(report.num_steps), type(report.num_tokens)) == (int, int)
    assert (report.num_steps, report.num_tokens) == (2, 7)


def test_an_exception_in_a_custom_function_names_the_users_own_line(llama):
    def function(model, examples, **_):
        torch.ones(2).view(3)

    with pytest.raises(RuntimeError) as caught:
        run_own(function, new_model(llama), tokens_of(llama), None)
    line = function.__code__.co_firstlineno + 1
    assert caught.value.__notes__ == [f"{__file__}, line {line}, in function"]


def test_a_client_that_a_run_goes_on_without_names_the_line_of_the_users_file(tmp_path):
    def function(model, examples, **_):
        raise KeyError("boom")

    config = tiny_config(tmp_path, federation={"num_rounds": 1})
    line = function.__code__.co_firstlineno + 1
    with pytest.raises(QuorumError, match=rf"KeyError: 'boom' \({__file__}, line {line}, in"):
        start(config, tmp_path / "run", function=function)
