"""A client at real size on a device: speed and memory against plain PEFT, and a round's costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Target, alternate
from gpu_merged import measure_merged, merged_targets
from gpu_models import (
    LINEAR,
    Budget,
    Grown,
    Size,
    float32_products,
    free_memory,
    synchronize,
    watch_memory,
    write_model,
)
from gpu_plan import plan_targets, planned_memory
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from training_speed import new_optimizer, padded_loss, step
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedmomentum import FedMomentum, LowRank
from fedmomentum.client.client import Client
from fedmomentum.client.local_model import LocalModel
from fedmomentum.client.store import ClientStore
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import from_dict
from fedmomentum.config.training import LocalTraining
from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.formats.manifest import as_manifest
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.objectives.collation import completion_batch
from fedmomentum.protocol.adapter_terms import ClientLora
from fedmomentum.protocol.codec import encode_task
from fedmomentum.protocol.messages import EvaluateRequest, Task
from fedmomentum.server.round_data import train_request
from fedmomentum.training.function import OnStep, TrainReport
from fedmomentum.training.trainer import train

RANK = 16
PLAIN = "plain PEFT, plain loop"
PLAIN_TRAIN = "plain PEFT, train()"
CLIENT = "client, train()"
CLIENT_TF32 = "client, train(), TF32 allowed"


def settings_of(size: Size, folder: Path, device: torch.device) -> Config:
    """Return the settings of a client that trains LoRA on all linear modules of a bfloat16 base."""
    tables = {
        "model": {
            "name": str(folder),
            "dtype": "bfloat16",
            "device": str(device),
            "quantization": size.quantization,
        },
        "lora": {"rank": RANK, "lora-alpha": 2.0 * RANK, "target-modules": LINEAR},
        "training": {
            "optimizer-state": "fresh",
            "local-steps": size.local_steps,
            "batch-size": size.batch,
            "learning-rate": 1e-4,
            "arguments": size.training_arguments(),
        },
    }
    return from_dict(tables)


def random_examples(size: Size, vocabulary: int) -> TokenizedExamples:
    """Draw one batch of full rows; the loss is taken on the last three quarters of each."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(4, vocabulary, (size.batch, size.length), generator=generator)
    rows = tuple(tuple(row) for row in drawn.tolist())
    return TokenizedExamples(
        rows, (size.length // 4,) * size.batch, ("",) * size.batch, (False,) * size.batch, 0
    )


def plain_peft(size: Size, folder: Path, device: torch.device) -> Any:
    """Load the base in bfloat16 and put a LoRA adapter on it, as PEFT's documentation has it.

    In 4 bits it is QLoRA: NF4 with its scales quantized, and products in bfloat16.
    """
    quantized: dict[str, Any] = {}
    if size.quantization == "nf4":
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        quantized["device_map"] = {"": device}
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **quantized)
    config = PeftLoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=LINEAR, task_type="CAUSAL_LM"
    )
    return get_peft_model(base if quantized else base.to(device), config)


def plain_training(
    model: PeftModel, examples: TokenizedExamples, size: Size, device: torch.device
) -> None:
    """Train in a plain loop with the batches, loss, optimizer and clipping of `train`."""
    model.train()
    if size.is_checkpointed:
        # `train` turns it off again, so that every training has to turn it on.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adamw = new_optimizer(model)
    for _ in range(size.steps):
        batch = completion_batch(examples.input_ids, examples.num_prompt_tokens, 0)
        on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        step(model, adamw, partial(padded_loss, batch=on_device))


# ── one size ──────────────────────────────────────────────────────────────────────────────────────


def measure_size(
    size: Size, folder: Path, device: torch.device, budget: Budget
) -> tuple[dict[str, Any], list[Target]]:
    """Make the model, load it both ways, train both in turn, answer one round's task, free all."""
    numbers: dict[str, Any] = {"size": size.name, "rank": RANK, "training": asdict(size)}
    started = time.perf_counter()
    write_model(size.llama(), folder, device, torch.bfloat16)
    free_memory(device)
    numbers["make_seconds"] = time.perf_counter() - started

    # Each is loaded and trained while the other does not train, so that its peaks are its own.
    config = settings_of(size, folder, device)
    examples = random_examples(size, size.config["vocab_size"])
    ours, memory = _load_and_train(
        lambda: LocalModel(config.model, config.lora, seed=0),
        lambda local: _train(local.peft, examples, size),
        device,
    )
    numbers["client"] = memory
    numbers["planned"] = planned_memory(config, size)
    plain, memory = _load_and_train(
        lambda: plain_peft(size, folder, device),
        lambda model: plain_training(model, examples, size, device),
        device,
    )
    numbers["plain"] = memory
    numbers["parameters"] = ours.num_parameters
    numbers["adapted"] = sum(
        math.prod(ours.base_weights.shape(module)) for module in ours.base_weights.layers
    )

    numbers["speed"] = compare_speed(plain, ours, examples, size, device)
    numbers["merged"] = measure_merged(
        partial(plain_training, plain, examples, size, device),
        partial(_train, ours.peft, examples, size),
        ours,
        numbers["client"],
        size.repeats,
        device,
    )
    del plain
    free_memory(device)
    numbers["round"] = measure_round(ours, config, examples, folder / "store", device, budget)
    return numbers, targets_of(numbers)


def _load_and_train(
    load: Callable[[], Any], train_once: Callable[[Any], Any], device: torch.device
) -> tuple[Any, dict[str, float]]:
    """Load a model and train it once.

    Returns:
        The model, and what it took: bytes at rest, at most while it was loaded and while it was
        trained, and seconds.
    """
    started = time.perf_counter()
    with watch_memory(device) as loading:
        model = load()
        free_memory(device)
    seconds = time.perf_counter() - started
    with watch_memory(device) as training:
        train_once(model)
    return model, _bytes(loading, training) | {"load_seconds": seconds}


def _bytes(loading: Grown, training: Grown) -> dict[str, float]:
    return {
        "rest": loading.after,
        "loading": loading.peak,
        "training": loading.after + training.peak,
    }


def _train_by_keywords(
    model: nn.Module,
    examples: TokenizedExamples,
    *,
    pad_token_id: int,
    seed: int,
    on_step: OnStep,
    **hyperparameters: Any,
) -> TrainReport:
    """Train as a client without a function of its own does; as a function, to be timed."""
    return train(
        model,
        examples,
        LocalTraining(**hyperparameters),
        pad_token_id=pad_token_id,
        seed=seed,
        on_step=on_step,
    )


def _train(model: nn.Module, examples: TokenizedExamples, size: Size) -> None:
    train(
        model,
        examples,
        LocalTraining(
            learning_rate=1e-4,
            batch_size=size.batch,
            local_steps=size.steps,
            arguments=size.training_arguments(),
        ),
        pad_token_id=0,
        seed=0,
    )


def compare_speed(
    plain: Any, ours: LocalModel, examples: TokenizedExamples, size: Size, device: torch.device
) -> list[dict[str, Any]]:
    """Time trainings of the same batches in turn; ratios are of paired runs, to the plain loop."""

    def in_tf32() -> None:
        with float32_products("high"):
            _train(ours.peft, examples, size)

    # further ways of holding the base are further sides
    sides: dict[str, Callable[[], None]] = {
        PLAIN: partial(plain_training, plain, examples, size, device),
        PLAIN_TRAIN: partial(_train, plain, examples, size),
        CLIENT: partial(_train, ours.peft, examples, size),
        CLIENT_TF32: in_tf32,
    }
    synchronize(device)
    seconds = alternate(sides, size.repeats)
    tokens = size.steps * size.batch * size.length
    rows = []
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(seconds[PLAIN], times, strict=True)]
        rate = tokens / statistics.median(times)
        rows.append(
            {
                "side": name,
                "seconds": times,
                "tokens_per_second": rate,
                "ratio": statistics.median(ratios),
            }
        )
    return rows


# ── a round ───────────────────────────────────────────────────────────────────────────────────────


class Stopwatch:
    """Seconds spent in some functions, the device's work that they begin included."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, its calls counted under `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(self._device)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(self._device)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return call


def measure_round(
    local: LocalModel,
    config: Config,
    examples: TokenizedExamples,
    store: Path,
    device: torch.device,
    budget: Budget,
) -> dict[str, Any]:
    """Answer a training task of a second round, and say what the answer's time was for.

    The model that the task names has a residual of rank `RANK` in every module, which has to be
    merged first. Where time is left, an evaluation of one batch is answered too, which probes the
    weights on disk as well.
    """
    method = FedMomentum()
    model = _second_round(local, method)
    watch = Stopwatch(device)
    for name in ("load_global_model", "probes", "applied_fraction"):
        setattr(local, name, watch.timed(name, getattr(local, name)))
    client = Client(
        client_id="client",
        train=examples,
        test=examples,
        method=method,
        model=local,
        store=ClientStore(store),
        training_function=watch.timed("train", _train_by_keywords),
    )
    lora = ClientLora.of(local.client_lora, local.is_mixed)
    manifest = as_manifest(model.manifest(), "the model")
    hyperparameters = config.training.hyperparameters(2, config.federation.num_rounds)
    request = train_request(config, 2, "client", hyperparameters, lora, manifest)
    task = Task("benchmark", "client", 2, request, model.objects())
    numbers: dict[str, Any] = {"steps": config.training.local_steps}
    numbers["train_task"] = _answer(encode_task(task), client, watch, device)

    # the weights on disk are read and probed too: about as long again as the live ones, and once
    # more for the residual
    if budget.left() < 30 + 4 * numbers["train_task"]["probes"]:
        numbers["evaluate_task"] = None
        return numbers
    evaluation = EvaluateRequest(
        manifest=manifest,
        lora=lora,
        num_examples=len(examples),
        num_compared=len(examples),
        batch_size=len(examples),
        probe_seed=request.probe_seed,
    )
    task = Task("benchmark", "client", 2, evaluation)
    numbers["evaluate_task"] = _answer(encode_task(task), client, watch, device)
    return numbers


def _second_round(local: LocalModel, method: FedMomentum) -> GlobalModel:
    initial = local.initial_global_model(method)
    generator = torch.Generator().manual_seed(0)
    residual = {}
    for module, matrix in initial.adapter.modules.items():
        out_size, in_size = matrix.shape
        B = torch.randn(out_size, RANK, generator=generator) * 1e-5
        residual[module] = LowRank(B, torch.randn(RANK, in_size, generator=generator))
    return replace(initial, base_update=(StoredObject.of(residual),), server_round=1)


def _answer(
    payload: bytes, client: Client, watch: Stopwatch, device: torch.device
) -> dict[str, float]:
    watch.seconds = {}
    synchronize(device)
    started = time.perf_counter()
    reply = client.handle(payload)
    synchronize(device)
    whole = time.perf_counter() - started
    probes = watch.seconds.get("probes", 0.0) + watch.seconds.get("applied_fraction", 0.0)
    return {
        "whole": whole,
        "merging": watch.seconds["load_global_model"],
        "training": watch.seconds.get("train", 0.0),
        "probes": probes,
        "probes_share": probes / whole,
        "task_bytes": len(payload),
        "reply_bytes": len(reply),
    }


def targets_of(numbers: dict[str, Any]) -> list[Target]:
    """Return what is wanted of one size's numbers; memory only where it was measured."""
    name = numbers["size"]
    ratios = {row["side"]: row["ratio"] for row in numbers["speed"]}
    targets = [
        Target.at_least(f"{name}: a client's tokens/s against plain PEFT", 0.95, ratios[CLIENT]),
        Target.at_most(
            f"{name}: share of probes in a client's round",
            0.02,
            numbers["round"]["train_task"]["probes_share"],
        ),
    ]
    targets += plan_targets(name, numbers["planned"], numbers["client"])
    targets += merged_targets(name, numbers["merged"], numbers["plain"])
    for when in ("rest", "loading", "training"):
        times = numbers["client"][when] / numbers["plain"][when]
        if math.isfinite(times):
            targets.append(
                Target.at_most(
                    f"{name}: memory of a client, {when}, times plain PEFT's", 1.15, times
                )
            )
    return targets
