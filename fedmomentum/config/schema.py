"""A run's configuration: every key, its default and its meaning, one dataclass a section.

Keys are kebab-case in the file and on the command line (`key=value`) and snake_case in code; they
are converted in `toml.py` and nowhere else. These classes are the source of
`docs/configuration.md`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fedmomentum.config.data import DataConfig
from fedmomentum.config.fields import (
    check_modules,
    check_numbers,
    option,
    require,
    require_at_least,
    require_choice,
    require_fraction,
)
from fedmomentum.config.privacy import PrivacyConfig
from fedmomentum.config.training import TrainingConfig
from fedmomentum.utils.chat_date import DEFAULT_DATE, parse_date
from fedmomentum.utils.names import check_client_name
from fedmomentum.utils.schema import MAX_LABELS

WIRE_DTYPES = ("float32", "float16", "bfloat16")
CAUSAL_LM = "causal-lm"
CLASSIFICATION = "sequence-classification"
TASKS = (CAUSAL_LM, CLASSIFICATION)
QUANTIZATIONS = ("none", "nf4", "int8", "torchao-int8")
ATTENTIONS = (
    "auto",
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)
ADAPTED_WEIGHTS = ("auto", "float32", "as-loaded")
MAX_THREADS = 4096
"""More CPU threads than any machine has: a larger number is a typing error."""


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    name: str = option(
        "smollm2-135m-instruct",
        "the bundled model, a model directory, or a name on the Hugging Face hub",
    )
    task: str = option(
        CAUSAL_LM,
        "causal-lm (answers to prompts), or sequence-classification (labels of texts); see "
        "docs/classification.md",
    )
    labels: list[str] = option(
        [],
        "for a classifier: its labels in the order of the head's outputs; empty: those of the "
        "data, sorted. Over a network they must be given, the same at server and clients",
    )
    revision: str | None = option(None, "hub revision (commit, tag or branch)")
    dtype: str = option(
        "auto",
        "auto (bfloat16 if the processor supports it, else float32), float32, bfloat16, float16",
    )
    quantization: str = option(
        "none",
        "applied on loading, the same for all parties: none, nf4, int8, torchao-int8; see "
        "docs/quantization.md",
    )
    attention: str = option(
        "auto",
        "how attention is computed: auto (the model's own choice, usually sdpa), eager, sdpa, "
        "flash_attention_2 or flash_attention_3 (on a GPU, in 16 bits, with its package "
        "installed), flex_attention",
    )
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    tf32: bool = option(
        False,
        "on a GPU, multiply float32 matrices in TF32: several times faster, but inputs of products "
        "are rounded to 10 bits, in training and evaluation alike; see docs/training.md",
    )
    adapted_weights: str = option(
        "auto",
        "how this process holds the adapted modules: float32 (what is merged is added to a float32 "
        "copy), as-loaded (16-bit or quantized, with what is merged beside them, as factors or "
        "int8), auto (as-loaded for quantized weights, and for 16-bit ones on a GPU; else float32)",
    )
    chat_date: str = option(
        DEFAULT_DATE,
        "the date (YYYY-MM-DD) that chat templates use as today's, in training, evaluation and "
        "generation alike; the same for all clients. The default is the date that Llama's "
        "templates show if they are given none",
    )

    def __post_init__(self) -> None:
        parse_date(self.chat_date)
        require_choice("model.task", self.task, TASKS)
        require_choice("model.quantization", self.quantization, QUANTIZATIONS)
        require_choice("model.attention", self.attention, ATTENTIONS)
        require_choice("model.adapted-weights", self.adapted_weights, ADAPTED_WEIGHTS)
        if self.quantization != "none":
            key = "model.adapted-weights with model.quantization"
            require_choice(key, self.adapted_weights, ("auto", "as-loaded"))
        if self.labels:
            wanted = f'left out with task = "{self.task}"'
            require(self.task == CLASSIFICATION, "model.labels", self.labels, wanted)
            are_names = all(label.strip() for label in self.labels)
            wanted = f"two to {MAX_LABELS} different names"
            are_different = 2 <= len(set(self.labels)) == len(self.labels) <= MAX_LABELS
            require(are_names and are_different, "model.labels", self.labels, wanted)


CLIENT_LORA_KEYS = ("rank", "lora-alpha", "target-modules", "target-parameters")
"""The keys that `[lora.clients.NAME]` may hold."""


@dataclass(frozen=True)
class LoraConfig:
    """The adapter that every client trains."""

    rank: int = option(8, "rank of the global adapter; it never changes")
    lora_alpha: float = option(16.0, "numerator of the scaling: lora-alpha / rank")
    target_modules: list[str] | str = option(
        [],
        "the adapted linear modules: a list of names, `all-linear`, `attention`, or a regular "
        "expression that matches entire paths; empty: PEFT's choice for the architecture, and "
        "where PEFT has none, the projections of the decoder layers",
    )
    target_parameters: list[str] = option(
        [],
        "endings of the paths of parameters to adapt: 3-D ones that hold the experts of a layer, "
        'such as "experts.down_proj". Each expert gets an adapter of its own; without '
        "target-modules nothing else is adapted",
    )
    dropout: float = option(0.0, "LoRA dropout in local training")
    use_rslora: bool = option(False, "scale by lora-alpha / sqrt(rank)")
    modules_to_save: list[str] = option(
        [],
        "modules trained in full, in float32, and averaged by the clients' weights; names as above",
    )
    start_from: str | None = option(
        None,
        "PEFT adapter to start from: a directory on the server (or the machine of the run), or a "
        "hub name, OWNER/NAME[@REVISION]; its rank and scaling may differ",
    )
    clients: dict[str, Any] = option(
        {},
        "clients that train less: `[lora.clients.NAME]` with their own rank (up to lora.rank), "
        "lora-alpha, target-modules or target-parameters",
    )

    def __post_init__(self) -> None:
        require_at_least("lora.rank", self.rank, 1)
        require(self.lora_alpha > 0, "lora.lora-alpha", self.lora_alpha, "above 0")
        check_modules("lora.target-modules", self.target_modules)
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        # The tables of clients: their keys here, their values where they are applied.
        for client, table in self.clients.items():
            check_client_name(client, "lora.clients")
            section = f"lora.clients.{client}"
            require(isinstance(table, dict), section, table, "a table")
            for key, value in table.items():
                wanted = f"one of {', '.join(CLIENT_LORA_KEYS)}"
                require(key in CLIENT_LORA_KEYS, f"{section}.{key}", value, wanted)
            self.for_client(client)

    def for_client(self, client: str) -> LoraConfig:
        """Return what a client trains; it downloads the complete adapter all the same.

        Raises:
            ConfigError: If a value of the client's own is out of range.
        """
        # What a client's table leaves out is as for all clients.
        table = self.clients.get(client, {})
        section = f"lora.clients.{client}"
        rank = table.get("rank", self.rank)
        alpha = table.get("lora-alpha", self.lora_alpha)
        modules = table.get("target-modules") or self.target_modules
        parameters = table.get("target-parameters", self.target_parameters)
        require(
            type(rank) is int and 1 <= rank <= self.rank,
            f"{section}.rank",
            rank,
            f"a whole number from 1 to lora.rank, {self.rank}",
        )
        # The table is free-form, so the types of its values are checked here.
        is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        require(is_number and alpha > 0, f"{section}.lora-alpha", alpha, "a number above 0")
        check_modules(f"{section}.target-modules", modules)
        are_names = isinstance(parameters, list) and all(isinstance(n, str) for n in parameters)
        require(are_names, f"{section}.target-parameters", parameters, "a list of names")
        return dataclasses.replace(
            self,
            rank=rank,
            lora_alpha=float(alpha),
            target_modules=modules,
            target_parameters=parameters,
            clients={},
        )

    def with_rank(self, rank: int) -> LoraConfig:
        """Return the same settings with another rank and the same scaling."""
        if rank == self.rank:
            return self
        # The scaling is lora_alpha / rank, or lora_alpha / sqrt(rank).
        ratio = rank / self.rank
        factor = math.sqrt(ratio) if self.use_rslora else ratio
        return dataclasses.replace(self, rank=rank, lora_alpha=self.lora_alpha * factor)

    @property
    def is_mixed(self) -> bool:
        """Whether clients have different ranks."""
        return any(self.for_client(client).rank != self.rank for client in self.clients)

    @property
    def scaling(self) -> float:
        """The factor of BA: `lora_alpha / rank`, with rsLoRA `lora_alpha / sqrt(rank)`."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class MethodConfig:
    """How the server aggregates the adapters."""

    name: str = option("fedmomentum", "see `fedmomentum methods`; or your own, as module:Class")
    settings: dict[str, Any] = option(
        {}, 'the method\'s settings, e.g. split = "aligned", energy = 0.999 (fedmomentum)'
    )

    def __post_init__(self) -> None:
        check_numbers(self.settings, "method.settings")


@dataclass(frozen=True)
class FederationConfig:
    """The rounds."""

    num_rounds: int = option(5, "number of rounds")
    client_fraction: float = option(1.0, "fraction of the clients sampled each round, in (0, 1]")
    min_valid_fraction: float = option(
        0.5,
        "fraction of the sampled clients that must reply with a valid update, else the run stops",
    )
    max_client_weight: float = option(0.9, "largest weight of one client if there are several")
    outlier_norm_ratio: float = option(
        20.0,
        "how many times farther than the others, for the same work, a client may move the model; "
        "one that goes farther, and farther than its own steps can take it, is left out of the "
        "round",
    )
    uplink_dtype: str = option(
        "float32", "dtype of the factors that clients send: float32, float16 or bfloat16"
    )
    downlink_dtype: str = option(
        "float32",
        "dtype of the adapter's factors sent to clients; what rounding removes goes into the "
        "residual",
    )
    round_timeout: float = option(3600.0, "over a network: seconds that a client has to reply")
    join_timeout: float = option(
        600.0,
        "over a network: seconds to wait for all registered clients at the start (at most a minute "
        "when resuming), and in each round for min-valid-fraction of them",
    )

    def __post_init__(self) -> None:
        # Who takes part.
        require_at_least("federation.num-rounds", self.num_rounds, 1)
        require_fraction("federation.client-fraction", self.client_fraction)
        require_fraction("federation.min-valid-fraction", self.min_valid_fraction)
        require_fraction("federation.max-client-weight", self.max_client_weight)
        require(
            self.outlier_norm_ratio > 1,
            "federation.outlier-norm-ratio",
            self.outlier_norm_ratio,
            "above 1",
        )
        # What travels, and how long it may take.
        require_choice("federation.uplink-dtype", self.uplink_dtype, WIRE_DTYPES)
        require_choice("federation.downlink-dtype", self.downlink_dtype, WIRE_DTYPES)
        require(self.round_timeout > 0, "federation.round-timeout", self.round_timeout, "above 0")
        require_at_least("federation.join-timeout", self.join_timeout, 0)


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out evaluation: loss, perplexity and greedy exact match, global and per client."""

    every: int = option(
        1, "evaluate every N rounds (and before the first and after the last); 0: never"
    )
    num_examples: int = option(
        16,
        "held-out examples of each of the round's clients, between the first and last evaluation",
    )
    final_num_examples: int = option(
        100, "held-out examples of every client, before the first and after the last round"
    )
    batch_size: int = option(32, "examples in a forward pass")
    probes: bool = option(
        True,
        "measure on the clients' live weights whether a round was exact and whether everything "
        "merged takes effect; if false, exactness_error and applied_share are left empty",
    )

    def __post_init__(self) -> None:
        require_at_least("evaluation.every", self.every, 0)
        require_at_least("evaluation.num-examples", self.num_examples, 1)
        require_at_least("evaluation.final-num-examples", self.final_num_examples, 1)
        require_at_least("evaluation.batch-size", self.batch_size, 1)


@dataclass(frozen=True)
class RunConfig:
    """Seed, threads and devices of the run, and what it keeps and reports."""

    seed: int = option(
        0,
        "seed of everything that is random: data, sampled clients, initialization, batches. What "
        "training with [privacy.dp] draws does not depend on it",
    )
    threads: int = option(
        0,
        "CPU threads of a process; 0: one for each core that the process may use, with run.devices "
        "divided among the workers. The number affects the last bits of the result",
    )
    deterministic: bool = option(
        False,
        "on a GPU, use only kernels that give the same bits every time, and stop if there is none; "
        "see docs/training.md",
    )
    devices: list[str] = option(
        [],
        'devices of one kind, e.g. ["cuda:0", "cuda:1"]: one process for each, with the clients '
        "divided among them. Empty: all clients in this process, on model.device; see "
        "docs/big-models.md",
    )
    keep_checkpoints: int = option(3, "number of checkpoints to keep, besides the best")
    report_to: list[str] = option(
        [],
        'trackers that every round is reported to, e.g. ["tensorboard"]; see docs/metrics.md. '
        "Empty: none",
    )

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "from 0 to 2**63 - 1")
        require(
            0 <= self.threads <= MAX_THREADS,
            "run.threads",
            self.threads,
            f"from 0 to {MAX_THREADS}",
        )
        require_at_least("run.keep-checkpoints", self.keep_checkpoints, 1)
        kinds = {device.partition(":")[0] for device in self.devices}
        wanted = 'devices of one kind by their names, such as ["cuda:0", "cuda:1"]'
        require(len(kinds) <= 1 and not kinds & {"", "auto"}, "run.devices", self.devices, wanted)


@dataclass(frozen=True)
class Config:
    """A run's configuration, made by `load_config` or `from_dict`."""

    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    training: TrainingConfig
    method: MethodConfig
    federation: FederationConfig
    evaluation: EvaluationConfig
    privacy: PrivacyConfig
    run: RunConfig

    def __post_init__(self) -> None:
        # The workers' devices are the models' devices.
        wanted = 'left out, or "auto", where run.devices lists devices'
        is_only = self.model.device == "auto" or not self.run.devices
        require(is_only, "model.device", self.model.device, wanted)
