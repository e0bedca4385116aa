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
    set_up_device,
)
from fedmomentum.errors import ModelError


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
