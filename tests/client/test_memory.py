"""A model of 1.2 billion parameters on a machine of 8 GB: load, merge, train and measure, all linear modules adapted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tiny import tiny_tokenizer

GIB = 2**30
MEMORY = 8 * GIB


def write_random_llama(folder: Path) -> int:
    """Write a checkpoint of random bfloat16 weights, tensor by tensor; return its number of parameters."""
    config = LlamaConfig(
        vocab_size=64128,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # The same numbers again and again: drawing a billion takes longer than all that is tested.
    noise = (0.02 * torch.randn(2**20 + 3, generator=torch.Generator().manual_seed(0))).bfloat16()
    tensors = {}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            tensors[name] = torch.ones(parameter.shape, dtype=torch.bfloat16)
        else:
            repeated = noise.repeat(1 + parameter.numel() // len(noise))
            tensors[name] = repeated[: parameter.numel()].clone().view(parameter.shape)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return sum(tensor.numel() for tensor in tensors.values())


WORK = """
import json
import sys
import threading
import time
from dataclasses import replace
import torch
torch.set_num_threads(1)
from fedmomentum import FedMomentum, LowRank
from fedmomentum.client.local_model import LocalModel
from fedmomentum.config.schema import LoraConfig, ModelConfig
from fedmomentum.global_model.objects import StoredObject

def status(key):
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(key))

def peak():
    return status("VmHWM")

# Memory that is no copy of a file: pages of the checkpoint count twice in the peak while it is read again.
own = []
def watch():
    while True:
        own.append(status("RssAnon"))
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
measured = {"imported": peak(), "own_before": status("RssAnon")}
config = ModelConfig(name=sys.argv[1], dtype="bfloat16", device="cpu", adapted_weights="as-loaded")
local = LocalModel(config, LoraConfig(rank=16, target_modules="all-linear"), seed=0)
measured["loaded"] = peak()
measured["own_while_loading"] = max(own)

# Two rounds, whose factors together outgrow one byte a weight: D is in 8 bits.
initial = local.initial_global_model(FedMomentum())
noise = torch.randn(2**23, generator=torch.Generator().manual_seed(0))
parts = []
for start in (0, 7):
    factors = {}
    for module, matrix in initial.adapter.modules.items():
        out, size = matrix.shape
        rank = 1 + out * size // (4 * (out + size))
        B = 1e-5 * noise[start : start + out * rank].view(out, rank)
        A = noise[start + 5 :][: rank * size].clone().view(rank, size)
        factors[module] = LowRank(B, A)
    parts.append(StoredObject.of(factors))
    del factors
model = replace(initial, base_update=tuple(parts), server_round=2)
local.load_global_model(model)
measured["merged"] = peak()
branches = [forward.branch for forward in local.base_weights._forwards.values()]
assert all(branch.dense is not None for branch in branches)

tokens = torch.randint(3, 90, (1, 64))
local.peft.train()
local.peft(input_ids=tokens, labels=tokens).loss.backward()
assert all(layer.B.grad is not None for layer in local.live_factors())
measured["trained"] = peak()
measured["share"] = local.applied_fraction(model, 0)
local.probes(0)
measured["probed"] = peak()
print(json.dumps(measured))
"""


@pytest.mark.long
def test_all_linear_modules_of_a_model_of_a_billion_parameters_in_8_gb(tmp_path):
    num_parameters = write_random_llama(tmp_path / "base")
    assert 1.2e9 < num_parameters < 1.3e9
    command = [sys.executable, "-c", WORK, str(tmp_path / "base")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    print({name: round(value / GIB, 2) for name, value in measured.items() if name != "share"})
    assert measured.pop("share") == pytest.approx(1, abs=0.01)
    assert max(measured.values()) < MEMORY
    # While it is loaded: the mapped checkpoint, the adapter, and no copy of the base.
    assert measured["own_while_loading"] - measured["own_before"] < 0.5 * GIB
