"""The measured memory of a step: repeated only for a model, modules or a step of another kind."""

from dataclasses import replace

import pytest
import torch

from fedmomentum.base_model.skeleton import load_skeleton
from fedmomentum.training import step_memory
from fedmomentum.training.step_memory import StepShape, step_bytes
from tests.tiny import tiny_llama

SHAPE = StepShape(
    rows=2, length=8, positions=4, dtype=torch.float32, in_float32=False, rank=3, dropout=0.0
)
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture
def measured(monkeypatch):
    """The steps that are run, in their order."""
    steps = []

    def record(skeleton, modules, shape):
        steps.append(shape)
        return real(skeleton, modules, shape)

    real = step_memory._measure
    monkeypatch.setattr(step_memory, "_measure", record)
    monkeypatch.setattr(step_memory, "_MEASURED", {})
    return steps


def test_the_same_step_of_the_same_model_is_measured_once(tmp_path, measured):
    sizes = []
    for name in ("one", "two"):
        skeleton = load_skeleton(tiny_llama(tmp_path / name))
        sizes.append(step_bytes(skeleton, MODULES, SHAPE))
    assert sizes[0] == sizes[1] > 0
    assert measured == [SHAPE]


@pytest.mark.parametrize(
    "change", ["model", "attention", "modules", "rows", "rank", "dtype", "evaluation"]
)
def test_what_changes_a_step_is_measured(change, tmp_path, measured):
    directory = tiny_llama(tmp_path / "base")
    skeleton = load_skeleton(directory)
    modules = MODULES
    shape = SHAPE
    before = step_bytes(skeleton, modules, shape)
    if change == "model":
        skeleton = load_skeleton(tiny_llama(tmp_path / "other", width=48))
    elif change == "attention":
        skeleton = load_skeleton(directory, attention="eager")
    elif change == "modules":
        modules = MODULES[:1]
    elif change == "rows":
        shape = replace(SHAPE, rows=4)
    elif change == "rank":
        shape = replace(SHAPE, rank=6)
    elif change == "dtype":
        shape = replace(SHAPE, dtype=torch.bfloat16)
    else:
        shape = replace(SHAPE, is_training=False)
    after = step_bytes(skeleton, modules, shape)
    assert len(measured) == 2
    assert after != before
    assert after == step_memory._measure(skeleton, modules, shape)
