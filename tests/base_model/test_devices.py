"""The device and dtype of a model, with what torch would say of GPUs."""

from contextlib import nullcontext

import pytest
import torch

from fedmomentum.base_model import devices
from fedmomentum.base_model.devices import (
    generator_devices,
    pick_device,
    pick_dtype,
    rounds_to_tf32,
    set_attention,
    set_up_device,
)
from fedmomentum.base_model.loading import load_base
from fedmomentum.errors import ModelError
from tests.tiny import tiny_llama


def test_auto_is_the_cpu_where_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "xyz", "meta"])
def test_a_device_that_cannot_hold_weights_is_refused(name):
    with pytest.raises(ModelError, match=f"device '{name}'"):
        pick_device(name)


@pytest.mark.parametrize("has_hardware", [True, False])
def test_emulated_bfloat16_does_not_count(monkeypatch, has_hardware):
    """The device that is asked about is the model's, not the first one."""
    asked = []

    def on(device):
        asked.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or has_hardware,
    )
    chosen = pick_dtype("auto", torch.device("cuda:1"))
    assert chosen is (torch.bfloat16 if has_hardware else torch.float32)
    assert asked == [torch.device("cuda:1")]


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_as_the_configuration_says(monkeypatch, tf32):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    before = torch.get_float32_matmul_precision()
    gpu = torch.device("cuda:1")
    try:
        torch.set_float32_matmul_precision("highest" if tf32 else "high")
        set_up_device(torch.device("cpu"), tf32=tf32)
        assert rounds_to_tf32(gpu) is not tf32  # a model on the CPU changes nothing
        set_up_device(gpu, tf32=tf32)
        assert rounds_to_tf32(gpu) is tf32
        assert not rounds_to_tf32(torch.device("cpu"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert current == [gpu]


def test_only_the_generator_of_the_models_gpu_is_touched(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert generator_devices(torch.device("cpu")) == []
    assert generator_devices(torch.device("cuda:1")) == [1]
    assert generator_devices(torch.device("cuda")) == [3]
    assert devices.DTYPES.keys() == {"float32", "bfloat16", "float16"}


# ── attention ──


def test_attention_is_computed_as_asked(tmp_path):
    """Both ways give the same logits, so that one is really another way."""
    directory = tiny_llama(tmp_path)
    model = load_base(directory, torch.float32, torch.device("cpu"))
    tokens = torch.arange(10)[None] + 5
    before = model.config._attn_implementation
    set_attention(model, "auto")
    assert model.config._attn_implementation == before
    logits = {}
    for attention in ("eager", "sdpa"):
        set_attention(model, attention)
        assert model.config._attn_implementation == attention
        logits[attention] = model(tokens).logits
    assert torch.allclose(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-6)


def test_flash_attention_on_a_cpu_is_refused(tmp_path):
    model = load_base(tiny_llama(tmp_path), torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ModelError, match="flash_attention_2.*needs a GPU and 16 bits; this is cpu"):
        set_attention(model, "flash_attention_2")
