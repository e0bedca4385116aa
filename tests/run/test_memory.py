"""What a plan says of memory: as much as a run takes, and more only where there is more."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedmomentum import FederatedTrainer
from fedmomentum.base_model.loading import load_base
from fedmomentum.config.privacy import DPConfig, PrivacyConfig
from fedmomentum.config.toml import from_dict, to_toml
from fedmomentum.run import memory
from fedmomentum.run.outline import outline_model
from tests.runs import tiny_config
from tests.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parent.parent.parent
# Shapes of which the weights, the activations, and the logits take most.
SHAPES = {
    "weights": (dict(hidden_size=768, intermediate_size=3072, vocab_size=2000), 1, 32),
    "activations": (dict(hidden_size=256, intermediate_size=512, vocab_size=200), 8, 256),
    "logits": (dict(hidden_size=64, intermediate_size=128, vocab_size=32000), 8, 128),
}
LAYERS = {"weights": 4, "activations": 5, "logits": 2}


def write_model(directory, shape, layers, dtype=torch.float32):
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **shape,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's accounts")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("weights", marks=pytest.mark.long),
        pytest.param("activations", marks=pytest.mark.long),
        pytest.param("logits", marks=pytest.mark.long),
    ],
)
def test_a_run_uses_the_memory_that_the_plan_predicts(kind, tmp_path):
    shape, batch, length = SHAPES[kind]
    write_model(tmp_path / "base", shape, LAYERS[kind])
    rows = [
        json.dumps({"prompt": "p" * (length // 2), "completion": "c" * (length // 2)})
        for _ in range(2 * batch)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    config = from_dict(
        {
            "model": {"name": str(tmp_path / "base"), "dtype": "float32", "device": "cpu"},
            "lora": {"rank": 8, "target-modules": "all-linear"},
            "data": {
                "source": str(tmp_path / "rows.jsonl"),
                "num-clients": 2,
                "min-examples": 1,
                "test-fraction": 0.0,
                "max-length": length,
                "max-truncated-fraction": 1.0,
            },
            "training": {"batch-size": batch, "local-steps": 2},
            "federation": {"num-rounds": 1},
            "evaluation": {"every": 0, "batch-size": 1},
            "run": {"threads": 1},
        }
    )
    (tmp_path / "job.toml").write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, "-m", "tests.run.memory_of_a_run", "job.toml", "out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    planned = found["planned"] - memory.LIBRARIES
    assert found["measured"] == pytest.approx(planned, rel=0.15)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


def test_a_plan_needs_no_weights_and_no_gpu(base, tmp_path, monkeypatch):
    """Configuration and tokenizer are enough; nothing is loaded where weights are at hand."""

    def fail(*_, **__):
        raise AssertionError("weights were loaded")

    config = tiny_config(base)
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr("fedmomentum.client.loaded_base.load_base", fail)
    with_weights, examples = FederatedTrainer(config, tmp_path / "run").plan()
    assert examples[0].train.input_ids
    bare = replace(config, model=replace(config.model, name=str(tmp_path)))
    without, _ = FederatedTrainer(bare, tmp_path / "run").plan()
    assert replace(without, model="") == replace(with_weights, model="")
    assert with_weights.device_memory is None and with_weights.memory_bytes > memory.LIBRARIES

    dp = DPConfig(noise_multiplier=1.0, public_units=100)
    private = [replace(dp, max_rows=rows) for rows in (None, 2)]
    private_plans = []
    for settings in private:
        config = replace(bare, privacy=PrivacyConfig(dp=settings))
        private_plans.append(FederatedTrainer(config, tmp_path / "run").plan()[0].host_memory)
    # The gradient of each row of a pass is kept.
    assert private_plans[0].training > without.host_memory.training
    assert private_plans[0].training > private_plans[1].training
    assert private_plans[0].evaluating == without.host_memory.evaluating

    on_gpu = replace(bare, model=replace(bare.model, device="cuda:7"))
    plan, _ = FederatedTrainer(on_gpu, tmp_path / "run").plan()
    if not torch.cuda.is_available():
        assert plan.device == "cuda:7, float32, adapted modules float32"
        assert any("this machine has no cuda:7" in warning for warning in plan.warnings)
    assert plan.device_memory.training > plan.device_memory.at_rest > 0
    assert plan.host_memory.training < with_weights.host_memory.training


def test_the_plan_is_shown_before_weights_are_loaded(base, tmp_path, monkeypatch):
    order = []

    def load(*arguments, **options):
        order.append("weights")
        return load_base(*arguments, **options)

    monkeypatch.setattr("fedmomentum.client.loaded_base.load_base", load)
    trainer = FederatedTrainer(tiny_config(base), tmp_path / "run")
    prepared = trainer.prepare(lambda plan, _: order.append(plan))
    trainer.close()
    assert order == [prepared.plan, "weights"]


def test_the_plan_names_what_a_run_adapts(base, tmp_path):
    """The shapes without memory are those of the model with its adapter."""
    config = tiny_config(base)
    trainer = FederatedTrainer(config, tmp_path / "run")
    outline = outline_model(config, (), is_plan=True)
    local = trainer.prepare().local
    trainer.close()
    fresh = local.fresh.modules
    assert outline.adapter.modules.keys() == fresh.keys()
    assert all(outline.adapter.modules[name].shape == fresh[name].shape for name in fresh)
    assert outline.targets == local.targets
    assert outline.num_parameters == local.num_parameters


@pytest.mark.parametrize(
    ("change", "is_more"),
    [
        ({"training": {"arguments": {"gradient_checkpointing": True}}}, False),
        ({"training": {"batch_size": 64}}, True),
        ({"lora": {"target_modules": "all-linear"}}, True),
    ],
)
def test_settings_change_the_memory_of_training(base, tmp_path, change, is_more):
    config = tiny_config(base)
    changed = config
    for section, values in change.items():
        changed = replace(changed, **{section: replace(getattr(changed, section), **values)})
    before, _ = FederatedTrainer(config, tmp_path / "run").plan()
    after, _ = FederatedTrainer(changed, tmp_path / "run").plan()
    assert (after.host_memory.training > before.host_memory.training) is is_more


def test_weight_format_and_quantization_decide_the_memory_of_weights():
    """By element: float32 4 bytes, 16 bits 2, int8 1, nf4 a little more than half a byte."""
    sizes = memory.BaseSizes(adapted=64_000, linear=1000, other=10, trained=0, largest=100)
    place = memory.Placement(True, torch.bfloat16, torch.bfloat16, "as-loaded", "none")
    assert memory.weight_bytes(sizes, place) == 2 * 65_010
    assert (
        memory.weight_bytes(sizes, replace(place, weight_format="float32")) == 4 * 64_000 + 2 * 1010
    )
    assert memory.weight_bytes(sizes, replace(place, quantization="int8")) == 65_000 + 20
    nf4 = memory.weight_bytes(sizes, replace(place, quantization="nf4"))
    assert nf4 == pytest.approx(65_000 * 4.127 / 8 + 20, rel=1e-3)
    # Beside them: factors while they are small, then a byte an element.
    assert memory.branch_bytes(sizes, place, 4000) == 2000
    assert memory.branch_bytes(sizes, place, 10**9) == 64_000
    assert memory.branch_bytes(sizes, replace(place, weight_format="float32"), 10**9) == 0
