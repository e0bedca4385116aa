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
    # The same numbers repeated: drawing a billion takes longer than everything that is tested.
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


EXPORT = """
import json
import sys
import threading
import time
from pathlib import Path
import torch
torch.set_num_threads(1)
from fedmomentum.base_model.identity import identify
from fedmomentum.global_model.export import export_merged
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
import peft

base = Path(sys.argv[1])
SHAPES = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (8192, 2048),
    "mlp.up_proj": (8192, 2048),
    "mlp.down_proj": (2048, 8192),
}
noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0))

def factors(layer, rank, seed):
    for name, (out, size) in SHAPES.items():
        B = 1e-3 * noise[layer + seed :][: out * rank].view(out, rank)
        A = 1e-1 * noise[layer + 3 * seed :][: size * rank].view(rank, size)
        yield f"model.layers.{layer}.{name}", LowRank(B, A)

def part(rank, seed):
    return {name: matrix for layer in range(16) for name, matrix in factors(layer, rank, seed)}

modules = part(16, 1)
config = {
    "peft_type": "LORA", "r": 16, "lora_alpha": 48, "task_type": "CAUSAL_LM",
    "target_modules": sorted(name.rpartition(".")[2] for name in SHAPES),
}
adapter = Adapter(modules, dict.fromkeys(modules, 3.0), {}, config, "adapter")
update = (StoredObject.of(part(8, 2)), StoredObject.of(part(24, 3)))
model = GlobalModel(base=identify(str(base), base), adapter=adapter, base_update=update, method="m")

def own_memory():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

# Memory that is no copy of a file: the system takes pages of mapped files back when it needs them.
before = own_memory()
own = []
def watch():
    while True:
        own.append(own_memory())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
out = Path(sys.argv[2])
share = export_merged(model, out, base_directory=base, dtype=torch.bfloat16)
files = {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
print(json.dumps({"share": share, "own": max(own) - before, "files": files}))
"""
LARGEST_WEIGHT = 4 * 64128 * 2048


@pytest.mark.long
def test_a_merged_export_holds_a_weight_and_a_file_and_no_copy_of_the_model(tmp_path):
    num_parameters = write_random_llama(tmp_path / "base")
    command = [sys.executable, "-c", EXPORT, str(tmp_path / "base"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    print({"GB above the libraries": round(measured["own"] / 1e9, 2)})
    assert measured["share"] == pytest.approx(1, abs=0.01)
    # A copy of the model in float32 would take 4.9 GB, one in 16 bits 2.5 GB.
    assert measured["own"] < LARGEST_WEIGHT + 1.5e9 < 2 * num_parameters
    assert len(measured["files"]) > 1
    assert 2 * num_parameters < sum(measured["files"].values()) < 2.01 * num_parameters
    assert max(measured["files"].values()) < 1.01 * 2**29
