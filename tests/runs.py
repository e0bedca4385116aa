"""A full run on a tiny model in a second: real rounds, payloads and checkpoints, a stand-in for training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from fedmomentum.aggregation import FedMomentum
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import from_dict
from fedmomentum.formats.manifest import as_manifest
from fedmomentum.protocol.adapter_terms import ClientLora
from fedmomentum.protocol.codec import decode_reply, decode_task
from fedmomentum.protocol.messages import PROTOCOL, DescribeRequest, Reply, Task, TrainRequest
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.run.prepared_run import PreparedRun
from fedmomentum.server.callbacks import Callback
from fedmomentum.training import TrainReport
from fedmomentum.utils.records import with_checksum
from fedmomentum.utils.tensors import safetensors_bytes
from tests.tiny import tiny_llama

WORDS = ("ab", "cd", "ef", "gh")


def write_data(folder: Path, num_clients: int = 3, num_examples: int = 12) -> dict[str, str]:
    """One JSONL file a client; returns client to file."""
    files = {}
    for client in range(num_clients):
        rows = [
            {
                "question": f"{client} {WORDS[i % 4]} {i}",
                "answer": WORDS[(i + client) % 4],
                "kind": WORDS[i % 2],
            }
            for i in range(num_examples * (client + 1))
        ]
        file = folder / f"site{client}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[f"site{client}"] = str(file)
    return files


def patch_default_split(patch: pytest.MonkeyPatch, split: str) -> None:
    """FedMomentum as in a release with another default."""
    fields = [("split", str, field(default=split))]
    method = make_dataclass("FedMomentum", fields, bases=(FedMomentum,), frozen=True)
    patch.setitem(METHODS, "fedmomentum", method)


def tiny_config(folder: Path, *, num_clients: int = 3, **sections) -> Config:
    """A configuration over a tiny Llama and one file a client, made in `folder` when it is not there yet."""
    base = folder / "base"
    if not base.exists():
        tiny_llama(base)
    tables = {
        "model": {"name": str(base), "dtype": "float32", "device": "cpu"},
        "lora": {"rank": 2, "lora-alpha": 6.0, "target-modules": ["q_proj", "v_proj"]},
        "data": {
            "client-files": write_data(folder, num_clients),
            "category-column": "kind",
            "test-fraction": 0.25,
            "max-length": 128,
        },
        "training": {
            "local-steps": 2,
            "batch-size": 4,
            "learning-rate": 0.01,
            "optimizer-state": "fresh",  # stand-ins for training return no moments
        },
        "federation": {"num-rounds": 3},
        "evaluation": {"num-examples": 2, "final-num-examples": 4},
        "run": {"threads": 1, "keep-checkpoints": 2},
    }
    for name, table in sections.items():
        tables[name] = {
            **tables.get(name, {}),
            **{key.replace("_", "-"): value for key, value in table.items()},
        }
    return from_dict(tables)


def nudge(model, examples, *, learning_rate, seed, on_step, **_) -> TrainReport:
    """Instead of training: every LoRA factor moves by a seeded step; what it moves by depends on its value too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _name, tensor in sorted(model.named_parameters()):
            if tensor.requires_grad:
                step = torch.randn(tensor.shape, generator=generator) - 0.1 * tensor.float()
                tensor += learning_rate * step.to(tensor.dtype)
    on_step(1, 1, 1.0)
    return TrainReport(
        loss=1.0, first_loss=1.0, last_loss=1.0, num_steps=1, num_tokens=len(examples)
    )


class Events(Callback):
    """Calls `function(event, facts)` for the events of the round, so that a test can stop anywhere."""

    def __init__(self, function: Callable[[str, dict[str, Any]], None]) -> None:
        self.function = function

    def on_plan(self, plan):
        self.function("plan", asdict(plan))

    def on_round_begin(self, server_round, clients):
        self.function("round", {"round": server_round, "participants": list(clients)})

    def on_aggregate(self, num_done, num_modules):
        self.function("aggregate", {"done": num_done, "total": num_modules})

    def on_evaluate(self, clients):
        self.function("evaluate", {"clients": list(clients)})

    def on_task_sent(self, client, num_bytes, timeout):
        self.function("sent", {"client": client, "bytes": num_bytes, "seconds": timeout})

    def on_reply(self, client, num_bytes):
        self.function("answered", {"client": client, "bytes": num_bytes})

    def on_failure(self, client, reason):
        self.function("failed", {"client": client, "reason": reason})

    def on_late_reply(self, client):
        self.function("late", {"client": client})

    def on_nodes(self, registered, online):
        self.function("nodes", {"registered": list(registered), "online": list(online)})

    def on_waiting(self, missing, seconds):
        self.function("waiting", {"for": list(missing), "seconds": seconds})

    def on_round_end(self, record):
        self.function("row", record.to_json())


class TestRun:
    """A prepared run under a test's control: its parts are attributes, `start` trains it."""

    __test__ = False

    def __init__(self, trainer: FederatedTrainer) -> None:
        self.trainer = trainer
        self.prepared: PreparedRun = trainer.prepare()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.prepared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        owner = self if name in ("trainer", "prepared") else self.prepared
        object.__setattr__(owner, name, value)

    def start(self, observer: Callable[[str, dict[str, Any]], None] | None = None):
        if observer is not None:
            self.trainer._callbacks.callbacks.append(Events(observer))
        return self.trainer.train()

    def close(self) -> None:
        self.trainer.close()


def prepare(config: Config, out: Path, **settings: Any) -> TestRun:
    """Load everything and open the directory, without training."""
    return TestRun(FederatedTrainer(config, out, **settings))


def start(
    config: Config,
    out: Path,
    *,
    function=nudge,
    resume: bool = False,
    server_round=None,
    observer=None,
    callbacks=(),
) -> TestRun:
    """Prepare and run; returns the closed run."""
    run = prepare(config, out, resume=resume, server_round=server_round, callbacks=callbacks)
    try:
        for client in run.clients:
            client.training_function = function or client.training_function
        run.start(observer)
    finally:
        run.close()
    return run


MANIFEST = {
    "format": "fedmomentum global model",
    "format_version": 3,
    "base": {"name": "x", "revision": None, "sha256": "1" * 64, "tokenizer_sha256": "2" * 64},
    "base_update": [],
    "version": "3" * 64,
    "adapter": {"A": "4" * 64, "B": "5" * 64},
    "adapter_config": {},
    "scalings": {"q": 3.0},
    "carried": None,
    "round": 0,
    "method": "FedMomentum()",
    "personal": "",
}
"""A manifest of the right form, of no model that there is."""


def train_task(
    client_id: str = "site0",
    *,
    server_round: int = 1,
    manifest: dict[str, Any] | None = None,
    objects: dict[str, bytes] | None = None,
    **fields: Any,
) -> Task:
    """A task to train, of the run "run"; fields of the request as given."""
    request = {
        "manifest": MANIFEST | manifest if manifest else as_manifest(MANIFEST, "a test's manifest"),
        "lora": ClientLora(
            rank=2, lora_alpha=6.0, target_modules=["q_proj", "v_proj"], mixed=False
        ),
        "learning_rate": 0.1,
        "local_steps": 1,
        "local_epochs": None,
        "batch_size": 1,
        "arguments": {},
        "seed": 0,
        "probe_seed": 0,
        "uplink_dtype": "float32",
        "optimizer_state": "fresh",
    }
    return Task("run", client_id, server_round, TrainRequest(**request | fields), objects or {})


def describe_task(client_id: str = "site0", *, adapter: bool = False) -> Task:
    """A task for a client to describe itself, of the run "run"."""
    return Task("run", client_id, 0, DescribeRequest(adapter=adapter))


def altered(change: Callable[[dict[str, Any]], None], kind: str = "") -> Callable[..., bytes]:
    """A false answer, `(payload, honest) -> bytes`: the honest answer with fields altered, to tasks of that kind or to all.

    The fields are those of a reply, as JSON values; those of its answer are under `metrics`.
    """

    def lie(payload: bytes, honest: Callable[[bytes], bytes]) -> bytes:
        task, answer = decode_task(payload), honest(payload)
        if kind not in ("", task.kind):
            return answer
        fields = reply_fields(answer, task)
        change(fields)
        return raw_reply(fields)

    return lie


def reply_fields(answer: bytes, task: Task) -> dict[str, Any]:
    """A reply's fields as JSON values, the answer's under `metrics`, and its tensors."""
    reply = decode_reply(answer, task, 2**40)
    fields = {name: getattr(reply, name) for name in Reply.HEAD if name != "answer"}
    return fields | {"metrics": msgspec.to_builtins(reply.answer), "tensors": dict(reply.tensors)}


def raw_reply(fields: dict[str, Any]) -> bytes:
    """The bytes of a reply with these fields, whether they are right or not."""
    head = {key: value for key, value in fields.items() if key not in ("metrics", "tensors")}
    text = json.dumps({"protocol": PROTOCOL, **head, "answer": fields["metrics"]})
    return safetensors_bytes(fields["tensors"], ("reply", text))


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a record as its writer would: with a matching checksum."""
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(with_checksum(table)))


def timeless(out: Path) -> list[dict]:
    """The rows of a run without what differs from run to run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def chain(out: Path) -> dict[str, dict]:
    """The kept rounds' manifests without the run's random name, settings and data, and hashes of what depends on time."""
    found = {}
    for file in sorted((out / "rounds").glob("*.json")):
        manifest = json.loads(file.read_text())
        manifest["run"].pop("run_id")
        manifest["run"].pop("settings")
        manifest["run"].pop("splits")  # keyed with the random name
        manifest["run"].pop("data")
        manifest["run"]["metrics"].pop("sha256")
        manifest.pop("sha256")
        found[file.name] = manifest
    return found


def objects(out: Path) -> set[str]:
    return {file.name for file in (out / "objects").iterdir()}
