"""Correctness on a device: rounds of a small model, its exports, and merged parts in a forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Target, alternate, medians
from gpu_models import LINEAR, PRECISIONS, float32_products, write_tokenizer
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fedmomentum import FedMomentum, GlobalModel, LowRank
from fedmomentum.base_model.as_loaded import AsLoadedWeights
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.client.client import Client
from fedmomentum.client.local_model import LocalModel
from fedmomentum.client.store import ClientStore
from fedmomentum.config.schema import Config, ModelConfig
from fedmomentum.config.toml import from_dict
from fedmomentum.config.training import LocalTraining
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.linalg.matrix import to_dense
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.server.checkpoint import RunDirectory
from fedmomentum.server.server import Server
from fedmomentum.server.state import ServerState
from fedmomentum.training.trainer import train
from fedmomentum.utils.tensors import safetensors_bytes

MODULUS = 61
FIRST_ID = 3
ANSWER = 6
RESIDUAL = 3e-4
"""The norm of a round's residual over that of the weight, as measured in real runs."""


# ── a small trained model ─────────────────────────────────────────────────────────────────────────


def progressions(differences: Sequence[int], count: int, seed: int) -> TokenizedExamples:
    """Make examples of one task: continue an arithmetic progression modulo `MODULUS`.

    Args:
        differences: The differences of successive numbers that occur.
        count: How many examples.
        seed: Of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        start = int(torch.randint(MODULUS, (1,), generator=generator))
        difference = differences[index % len(differences)]
        numbers = [FIRST_ID + (start + place * difference) % MODULUS for place in range(2 + ANSWER)]
        rows.append((1, *numbers, 2))
    return TokenizedExamples(
        tuple(rows), (3,) * count, ("progressions",) * count, (False,) * count, 0
    )


def write_trained_model(folder: Path, device: torch.device, *, tiny: bool) -> dict[str, float]:
    """Train a small Llama from scratch and save it as `folder/float32` and `folder/bfloat16`.

    Returns:
        The first and the last loss.
    """
    hidden = 32 if tiny else 256
    config = LlamaConfig(
        vocab_size=FIRST_ID + MODULUS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1 if tiny else 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    report = train(
        model,
        progressions(range(1, 30), 2048, seed=0),
        LocalTraining(learning_rate=2e-3, batch_size=64, local_steps=20 if tiny else 300),
        pad_token_id=0,
        seed=0,
    )
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        model.to(dtype=dtype).save_pretrained(folder / name)
        write_tokenizer(folder / name)
    return {"first_loss": report.first_loss, "last_loss": report.last_loss}


@dataclass(frozen=True)
class Way:
    """How the small model is held, and how float32 products are made.

    Attributes:
        dtype: Of the base.
        holding: `model.adapted-weights`.
        products: One of `PRECISIONS`.
    """

    dtype: str
    holding: str
    products: str

    @property
    def name(self) -> str:
        """The name of its part, which is also that of its directory."""
        return f"rounds-{self.dtype}-{self.holding}-{self.products}"


def ways(*, tiny: bool) -> list[Way]:
    """Return the ways to measure: all of them, or on tiny shapes every kind of holding once."""
    held = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "as-loaded"))
    precisions: tuple[tuple[str, ...], ...] = (PRECISIONS,) * len(held)
    if tiny:
        # TF32 with the adapted modules in float32, where it would show on a GPU.
        precisions = (("highest",), ("high",), ("highest",))
    found = []
    for (dtype, holding), wanted in zip(held, precisions, strict=True):
        found += [Way(dtype, holding, precision) for precision in wanted]
    return found


def federation(base: Path, way: Way, device: torch.device, *, tiny: bool) -> Config:
    """Return the settings of the rounds that are run on the small model."""
    tables = {
        "model": {
            "name": str(base),
            "dtype": way.dtype,
            "device": str(device),
            "adapted-weights": way.holding,
            # Loading a model sets the precision of this process.
            "tf32": way.products != "highest",
        },
        "lora": {"rank": 4 if tiny else 8, "lora-alpha": 16.0, "target-modules": LINEAR},
        "training": {
            "local-steps": 2 if tiny else 10,
            "batch-size": 16,
            "learning-rate": 5e-3,
            "optimizer-state": "fresh",
        },
        "federation": {"num-rounds": 2 if tiny else 4},
        "evaluation": {"num-examples": 16, "final-num-examples": 32},
        "run": {"keep-checkpoints": 1},
    }
    return from_dict(tables)


def run_federation(
    config: Config, out: Path, num_clients: int
) -> tuple[GlobalModel, LocalModel, list[dict[str, Any]]]:
    """Run all rounds in this process; every client has differences of its own.

    Returns:
        The global model, the model of the process that played the clients, and the rows of
        `metrics.jsonl`.
    """
    method = FedMomentum()
    local = LocalModel(config.model, config.lora, seed=0)
    store = ClientStore(out / "store")
    steps = {}
    for index in range(num_clients):
        differences = range(30 + 5 * index, 35 + 5 * index)
        examples = progressions(differences, 256, seed=index)
        held_out = progressions(differences, 64, seed=100 + index)
        client = Client(
            client_id=f"client-{index}",
            train=examples,
            test=held_out,
            method=method,
            model=local,
            store=store,
        )
        steps[client.client_id] = client.handle
    folder = RunDirectory(out, keep=config.run.keep_checkpoints)
    try:
        model = Server(
            InProcessTransport(steps),
            method=method,
            model=local.initial_global_model(method),
            state=ServerState("benchmark"),
            config=config,
            directory=folder,
        ).run()
        return model, local, [record.to_json() for record in folder.records]
    finally:
        folder.close()


# ── what a layer's forward gives ──────────────────────────────────────────────────────────────────


def share_and_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, float]:
    """Return `<got, wanted> / <wanted, wanted>` and the relative error over all outputs."""
    product = square = apart = 0.0
    for one, other in zip(got, wanted, strict=True):
        product += float((one * other).sum())
        square += float(other.square().sum())
        apart += float((one - other).square().sum())
    return product / square, math.sqrt(apart / square)


def forward_share(local: LocalModel, model: GlobalModel, *, rows: int = 256) -> tuple[float, float]:
    """Measure what `base_update` adds to the outputs of the live layers, against what it should.

    Every adapted layer is given the same random inputs with everything merged and with nothing
    merged. Its outputs are in the model's dtype, whose rounding is in the error; it has mean zero,
    and leaves the share as it is.

    Returns:
        Share and error, as `share_and_error` has them.
    """
    layers = dict(local.base_weights.layers)
    device = next(local.peft.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    inputs = {}
    for module in layers:
        size = local.base_weights.shape(module)[1]
        inputs[module] = torch.randn(rows, size, generator=generator, device=device).to(local.dtype)
    with torch.no_grad():
        local.load_global_model(model)
        merged = {module: layer(inputs[module]) for module, layer in layers.items()}
        local.base_weights.apply([])
        got = [
            merged[module].double() - layer(inputs[module]).double()
            for module, layer in layers.items()
        ]
        local.load_global_model(model)
        wanted = [
            inputs[module].double() @ to_dense(model.merged(module)).to(device).mT
            for module in layers
        ]
    return share_and_error(got, wanted)


# ── exports ───────────────────────────────────────────────────────────────────────────────────────


def compare_exports(
    local: LocalModel, model: GlobalModel, out: Path, device: torch.device
) -> dict[str, float]:
    """Compare logits of the live model, the merged export and the adapter export on the device.

    The exports, and a live model of the same base, are loaded in float32. Differences are relative
    to the norm of the logits; `change` is how far the untouched base is from them.
    """
    applied_share = export_merged(model, out / "merged", base_directory=local.directory)
    export_adapter(model, out / "adapter", base_directory=local.directory)
    rows = progressions(range(30, 45), 32, seed=7).input_ids
    input_ids = torch.tensor(rows, device=device)

    def logits(wanted: Any) -> Tensor:
        with torch.no_grad():
            output: Tensor = wanted.eval()(input_ids=input_ids).logits
        return output.double()

    def load(folder: Path) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(device)

    lora = local.client_lora
    in_float32 = ModelConfig(
        str(local.directory), dtype="float32", device=str(device), adapted_weights="float32"
    )
    wide = LocalModel(in_float32, lora, seed=0)
    wide.load_global_model(model)
    local.load_global_model(model)
    live = logits(wide.peft)
    adapter = PeftModel.from_pretrained(load(local.directory), str(out / "adapter"))
    return {
        "merged_difference": _apart(logits(load(out / "merged")), live),
        "adapter_difference": _apart(logits(adapter), live),
        "live_difference": _apart(logits(local.peft), live),
        "change": _apart(logits(load(local.directory)), live),
        "merged_applied_share": applied_share,
    }


def _apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def measure_rounds(
    folder: Path, way: Way, device: torch.device, *, tiny: bool
) -> tuple[dict[str, Any], list[Target]]:
    """Run the small federation in one way, on the model that `write_trained_model` wrote there."""
    config = federation(folder / "base" / way.dtype, way, device, tiny=tiny)
    out = folder / way.name
    with float32_products(way.products):
        model, local, metrics = run_federation(config, out, 2 if tiny else 3)
        share, error = forward_share(local, model)
    with float32_products("highest"):
        exports = compare_exports(local, model, out, device)
    done = [row for row in metrics if row["round"]]
    row = {
        **asdict(way),
        "rounds": len(done),
        "clients": len(done[-1]["accepted"]),
        "loss": [done[0]["train_loss"], done[-1]["train_loss"]],
        "exactness_error": max(row["exactness_error"] for row in done),
        "applied_share": min(row["applied_share"] for row in done),
        "forward_share": share,
        "forward_error": error,
        **exports,
    }
    # TF32 has no target.
    return row, _targets_of(row) if way.products == "highest" else []


def _targets_of(row: Mapping[str, Any]) -> list[Target]:
    what = f"small model, {row['dtype']}, modules in {row['holding']}"
    # The 8 bits of what was merged before are measured against one round's change.
    exactness = 1e-5 if row["holding"] == "float32" else 0.05
    return [
        Target.at_most(f"{what}: exactness error", exactness, row["exactness_error"]),
        Target.at_least(f"{what}: applied share", 0.99, row["applied_share"]),
        Target.at_least(f"{what}: applied share in the forward", 0.99, row["forward_share"]),
        Target.at_most(f"{what}: merged export against live", 1e-4, row["merged_difference"]),
        Target.at_most(f"{what}: adapter export against live", 1e-4, row["adapter_difference"]),
    ]


# ── many small residuals in one layer of real size ────────────────────────────────────────────────


def measure_residuals(
    folder: Path, device: torch.device, *, tiny: bool
) -> tuple[dict[str, Any], list[Target]]:
    """Merge 1, 10 and 50 residuals of `RESIDUAL` into one bfloat16 weight, and measure its forward.

    The weight is in float32, and its products are made in float32, in TF32, and under bfloat16
    autocast; or it is as it was loaded, with a branch. Outputs stay as the product gives them; a
    client's layer rounds them to bfloat16 afterwards. What would be left of a branch that is added
    to rounded outputs is computed, too.
    """
    size = 64 if tiny else 4096
    generator = torch.Generator().manual_seed(0)
    stored = (torch.randn(size, size, generator=generator) / math.sqrt(size)).bfloat16()
    checkpoint = folder / "layer"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(safetensors_bytes({"layer.weight": stored}))
    layer = _layer(size, torch.float32, device)
    narrow, on_client, branched = (_layer(size, torch.bfloat16, device) for _ in range(3))
    for loaded in (layer, narrow, on_client, branched):
        loaded.weight.data.copy_(stored)
    merged = Float32Weights({"layer": layer}, checkpoint)
    # For the time that a client's layer takes, casts included.
    Float32Weights({"layer": on_client}, checkpoint)
    beside = AsLoadedWeights({"layer": branched}, checkpoint)
    blobs = _residuals(size, 50, float(stored.float().norm()), generator)
    x = torch.randn(64 if tiny else 1024, size, generator=generator).bfloat16().float().to(device)

    before = {name: _forward(layer, x, way).double() for name, way in _products(device).items()}
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    total = torch.zeros(size, size, dtype=torch.float64, device=device)
    for count, blob in enumerate(blobs, start=1):
        total += to_dense(blob.matrices["layer"]).to(device, torch.float64)
        if count not in (1, 10, 50):
            continue
        merged.apply(blobs[:count])
        wanted = x.double() @ total.mT
        for name, way in _products(device).items():
            share, error = share_and_error(
                [_forward(layer, x, way).double() - before[name]], [wanted]
            )
            rows.append({"products": name, "residuals": count, "share": share, "error": error})
            if name == "float32":  # what clients do; the others show what they would lose
                targets.append(
                    Target.at_least(f"{count} residuals merged: share in the forward", 0.99, share)
                )
        beside.apply(blobs[:count])
        X = beside.inputs("layer", x.mT)
        got = beside.outputs("layer", X) - beside.pretrained_outputs({"layer": X})["layer"]
        share, error = share_and_error([got.double()], [wanted.mT])
        rows.append({"products": BESIDE, "residuals": count, "share": share, "error": error})
        targets += [
            Target.at_least(f"{count} residuals as loaded: share in the forward", 0.99, share),
            Target.at_most(f"{count} residuals as loaded: error in the forward", 0.01, error),
        ]
        rounded = _forward(narrow, x.bfloat16(), nullcontext)
        got = (rounded + wanted.bfloat16()).double() - rounded.double()
        share, error = share_and_error([got], [wanted])
        rows.append({"products": AFTERWARDS, "residuals": count, "share": share, "error": error})

    tokens = torch.randn(64 if tiny else 4096, size, generator=generator).to(device, torch.bfloat16)
    sides: dict[str, Callable[[], Any]] = {
        name: partial(_forward, on_client, tokens, way) for name, way in _products(device).items()
    }
    sides[BESIDE] = partial(_forward, branched, tokens, nullcontext)
    sides[NOTHING_MERGED] = partial(_forward, narrow, tokens, nullcontext)
    seconds = medians(alternate(sides, 3 if tiny else 20, warmups=2))
    return {"size": size, "tokens": len(tokens), "rows": rows, "seconds": seconds}, targets


NOTHING_MERGED = "bfloat16 weight, nothing merged"
BESIDE = "as loaded, with a branch"
AFTERWARDS = "a branch added to bfloat16 outputs"
Products = Callable[[], AbstractContextManager[Any]]


def _layer(size: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    return nn.Linear(size, size, bias=False, device=device, dtype=dtype).requires_grad_(False)


def _products(device: torch.device) -> dict[str, Products]:
    return {
        "float32": nullcontext,
        "TF32": partial(float32_products, "high"),
        "bfloat16 autocast": partial(torch.autocast, device.type, dtype=torch.bfloat16),
    }


def _forward(layer: nn.Module, x: Tensor, way: Products) -> Tensor:
    with torch.no_grad(), way():
        output: Tensor = layer(x)
    return output


def _residuals(
    size: int, count: int, norm: float, generator: torch.Generator
) -> list[StoredObject]:
    """Draw residuals of rank 16, each of norm `RESIDUAL * norm`."""
    rank = min(16, size // 4)
    blobs = []
    for _ in range(count):
        drawn = LowRank(
            torch.randn(size, rank, generator=generator),
            torch.randn(rank, size, generator=generator),
        )
        blobs.append(StoredObject.of({"layer": drawn.scaled(RESIDUAL * norm / drawn.norm())}))
    return blobs
