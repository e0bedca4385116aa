"""Whole runs whose adapted modules are held as they were loaded, and what a run measures of its weights."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmomentum.base_model.as_loaded import AsLoadedWeights
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.client.loaded_base import LoadedBase
from fedmomentum.client.local_model import LocalModel
from fedmomentum.config.toml import from_dict, to_dict
from fedmomentum.errors import ConfigError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.evaluate import evaluate
from fedmomentum.run.networked import run_federation
from tests.runs import chain, nudge, prepare, start, timeless, tiny_config
from tests.tiny import tiny_gpt2, tiny_llama, tiny_moe

Q_PROJ = "model.layers.0.self_attn.q_proj"
AS_LOADED = {"dtype": "bfloat16", "adapted-weights": "as-loaded"}
UNEQUAL = {
    "rank": 4,
    "lora-alpha": 12.0,
    "clients": {"site0": {"rank": 1, "lora-alpha": 5.0}, "site1": {"rank": 3}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base whose checkpoint is in bfloat16, as large ones are."""
    folder = tmp_path_factory.mktemp("data")
    tiny_llama(folder / "base")
    in_16_bits(folder / "base")
    return folder


def in_16_bits(base):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)


def config_of(folder, *, num_rounds=4, model=AS_LOADED, **sections):
    return tiny_config(folder, model=model, federation={"num_rounds": num_rounds}, **sections)


def assert_everything_arrives(out, largest_error=0.05):
    """The error of int8 is measured against one round's change, so it is larger than 1 % of what was merged."""
    rows = timeless(out)
    assert any(row["applied_share"] is not None for row in rows[1:])
    for row in rows[1:]:
        assert row["failures"] == {}
        assert row["applied_share"] is None or row["applied_share"] == pytest.approx(1, abs=0.01)
        assert row["exactness_error"] is None or row["exactness_error"] < largest_error


def test_a_run_of_real_training_resumes_to_the_same_bits_and_is_evaluated_as_it_was(
    folder, tmp_path
):
    config = config_of(folder, num_rounds=6, lora={"target-modules": "all-linear"})
    run = start(config, tmp_path / "run", function=None)
    assert isinstance(run.local.base_weights, AsLoadedWeights)
    assert_everything_arrives(tmp_path / "run")
    # Some modules have come to int8, as the sum of ranks outgrew them.
    branches = [forward.branch for forward in run.local.base_weights._forwards.values()]
    assert any(branch.dense is not None for branch in branches)

    once = replace(config, federation=replace(config.federation, num_rounds=3))
    start(once, tmp_path / "again", function=None)
    start(config, tmp_path / "again", function=None, resume=True)
    assert chain(tmp_path / "again") == chain(tmp_path / "run")
    resumed, rows = timeless(tmp_path / "again"), timeless(tmp_path / "run")
    # Round 3 was the last one for a while, and so evaluated on more.
    assert resumed[:3] + resumed[4:] == rows[:3] + rows[4:]

    scored = evaluate(tmp_path / "run").tuned.all.total
    last = rows[-1]["evaluation"]["total"]
    # Here the adapter is added in float32 with the rest; in training PEFT adds it to a rounded output.
    assert scored.loss == pytest.approx(last["loss"], rel=0.01)


@pytest.mark.parametrize("name", ["fedmomentum", "flora", "frlora", "fedexlora", "hetlora"])
@pytest.mark.parametrize("lora", [{}, UNEQUAL])
def test_methods_with_equal_and_unequal_ranks(folder, tmp_path, name, lora):
    from fedmomentum.aggregation.registry import METHODS

    if lora and not METHODS[name].unequal_ranks:
        pytest.skip(f"{name} needs equal ranks")
    start(config_of(folder, lora=lora, method={"name": name}), tmp_path / "run")
    rows = timeless(tmp_path / "run")
    shares = [row["applied_share"] for row in rows[1:] if row["applied_share"] is not None]
    assert all(share == pytest.approx(1, abs=0.01) for share in shares)
    assert bool(shares) == bool(GlobalModel.load(tmp_path / "run").base_update)
    if METHODS[name]().exact:
        assert all(row["exactness_error"] < 0.05 for row in rows[1:])


@pytest.mark.parametrize("family", ["gpt2", "embeddings", "mixtral", "parameters"])
def test_other_kinds_of_modules(tmp_path, family):
    lora = {"target-modules": "all-linear"}
    if family == "gpt2":
        tiny_gpt2(tmp_path / "base")
    elif family == "embeddings":
        tiny_llama(tmp_path / "base")
        lora = {"target-modules": ["embed_tokens", "lm_head", "q_proj"]}
    elif family == "parameters":  # PEFT adds to these weights themselves
        tiny_llama(tmp_path / "base")
        lora = {"target-modules": ["q_proj"], "target-parameters": ["v_proj.weight"]}
    else:  # experts have no forward of their own, so they are held in float32
        tiny_moe(tmp_path / "base", family)
        lora = {"target-modules": ["q_proj"], "target-parameters": ["experts.down_proj"]}
    run = start(config_of(tmp_path, lora=lora), tmp_path / "run", function=None)
    assert_everything_arrives(tmp_path / "run")
    held = run.local.base_weights
    in_float32 = {name for name in held.layers if name in held._float32_weights.layers}
    without_branch = {"mixtral": "experts", "parameters": "v_proj"}.get(family, "none")
    assert in_float32 == {name for name in held.layers if without_branch in name}
    # What is measured is what there is: all of it, and without anything merged nothing.
    model = GlobalModel.load(tmp_path / "run")
    run.local.load_global_model(model)
    assert run.local.applied_fraction(model, 3) == pytest.approx(1, abs=0.01)
    held.apply([])
    assert run.local.applied_fraction(model, 3) == pytest.approx(0, abs=1e-6)


def test_gradient_checkpointing_changes_no_bits(folder, tmp_path):
    for out, arguments in (("plain", {}), ("again", {"gradient_checkpointing": True})):
        config = config_of(folder, num_rounds=2, training={"arguments": arguments})
        start(config, tmp_path / out, function=None)
    assert chain(tmp_path / "plain") == chain(tmp_path / "again")


def test_clients_may_hold_their_weights_in_different_ways(folder, tmp_path):
    """It is up to each machine: the resulting version is the same, and the run continues."""
    config = config_of(folder)
    steps = {}
    for name, setting in zip(
        config.data.client_files, ("as-loaded", "float32", "auto"), strict=True
    ):
        own = replace(config, model=replace(config.model, adapted_weights=setting))
        client = prepare_client(own, name, tmp_path / name)
        client.training_function = nudge
        steps[name] = client.handle
        kind = AsLoadedWeights if setting == "as-loaded" else Float32Weights
        assert isinstance(client.model.base_weights, kind)
    run_federation(InProcessTransport(steps), config, tmp_path / "run")
    assert_everything_arrives(tmp_path / "run")


def test_it_may_change_on_resume_and_is_recorded(folder, tmp_path):
    config = config_of(folder, num_rounds=2)
    start(config, tmp_path / "run")
    assert '"adapted_weights": "as-loaded"' in (tmp_path / "run" / "environment.json").read_text()
    other = replace(config, model=replace(config.model, adapted_weights="float32"))
    other = replace(other, federation=replace(other.federation, num_rounds=3))
    start(other, tmp_path / "run", resume=True)
    assert len(timeless(tmp_path / "run")) == 4
    with pytest.raises(ConfigError, match="model.adapted-weights"):
        from_dict({**to_dict(config), "model": {"adapted-weights": "bfloat16"}})


class _TF32(torch.autograd.Function):
    """A product of matrices rounded to ten bits, as a GPU makes it where TF32 is allowed."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        rounded = [
            (t.contiguous().view(torch.int32) + 0x1000).bitwise_and(-0x2000).view(torch.float32)
            for t in (x.float(), weight.float())
        ]
        ctx.save_for_backward(weight)
        return nn.functional.linear(rounded[0], rounded[1], bias).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0].to(gradient.dtype), None, None


def test_the_rounding_of_products_shows_in_the_applied_share(folder, tmp_path, monkeypatch):
    """Float32 weights under TF32 lose small residuals though they hold them; weights as loaded do not."""

    def forward(self, x):
        if self.weight.requires_grad:
            return nn.functional.linear(x, self.weight, self.bias)
        return _TF32.apply(x, self.weight, self.bias)

    training = {"learning-rate": 0.003}
    shares = {}
    for setting in ("float32", "as-loaded"):
        model = {"dtype": "bfloat16", "adapted-weights": setting}
        config = config_of(folder, num_rounds=1, model=model, training=training)
        run = prepare(config, tmp_path / setting)
        for client in run.clients:
            client.training_function = nudge
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", forward)
            run.start()
        run.close()
        shares[setting] = timeless(tmp_path / setting)[-1]["applied_share"]
    assert shares["float32"] < 0.9 and shares["as-loaded"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("weight_format", ["float32", "as-loaded"])
def test_no_weight_of_an_unshared_base_is_in_memory_twice(folder, weight_format):
    config = config_of(folder, model={"dtype": "bfloat16", "adapted-weights": weight_format})
    for takes in (True, False):
        loaded = LoadedBase.from_config(config.model)
        weight = weakref.ref(loaded.model.get_submodule(Q_PROJ).weight)
        local = LocalModel(config.model, config.lora, seed=0, loaded=loaded, takes_loaded=takes)
        gc.collect()
        # In float32 it has been replaced; where others share the base, they still have it.
        assert (weight() is None) == (takes and weight_format == "float32")
        own = local.base_weights.layers[Q_PROJ].weight
        assert own.dtype == (torch.float32 if weight_format == "float32" else torch.bfloat16)
        assert (own is weight()) == (weight_format == "as-loaded")


def test_what_is_not_measured_is_empty(folder, tmp_path):
    config = config_of(folder, evaluation={"probes": False})
    start(config, tmp_path / "run")
    start(config_of(folder), tmp_path / "measured")
    assert chain(tmp_path / "run") == chain(tmp_path / "measured")
    for row in timeless(tmp_path / "run"):
        assert row["exactness_error"] is None and row["applied_share"] is None
        assert row["evaluation"]["total"]["num_examples"] > 0
