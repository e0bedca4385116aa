"""Synthetic run folders in the format that a run writes."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmomentum.formats.metrics_file import parse_record_line
from fedmomentum.formats.round_record import RoundRecord
from fedmomentum.formats.scores import Score
from fedmomentum.utils.records import with_checksum

PHASES = ("train", "encode", "aggregate", "merge", "evaluate")


def score(num_exact: int, num_examples: int, loss: float) -> dict[str, Any]:
    """A score as an evaluation writes it, ten tokens an item."""
    return Score(10 * num_examples * loss, 10 * num_examples, num_examples, num_exact).to_json()


def row(
    server_round: int,
    clients: Sequence[str],
    categories: Sequence[str],
    *,
    failures: dict[str, str] | None = None,
    items: int = 60,
    seed: int = 0,
) -> dict[str, Any]:
    """One row of metrics.jsonl; learning shows as a growing share of exact answers."""
    draw = random.Random(1000 * seed + server_round)
    failures = failures or {}
    accepted = [client_id for client_id in clients if client_id not in failures]
    level = 0.1 + 0.6 * (1 - 0.6**server_round)

    def scores(names: Sequence[str], num: int) -> dict[str, Any]:
        levels = {name: min(0.98, max(0.0, level + draw.uniform(-0.1, 0.1))) for name in names}
        return {
            name: score(round(num * share), num, 2.4 - 1.8 * share)
            for name, share in levels.items()
        }

    trained = server_round > 0
    per_client, per_category = (
        scores(clients, items),
        scores(categories, max(1, items * len(clients) // len(categories))),
    )
    num_exact = sum(value["num_exact"] for value in per_client.values())
    num_examples = sum(value["num_examples"] for value in per_client.values())
    return {
        "round": server_round,
        "participants": list(clients) if trained else [],
        "accepted": accepted if trained else [],
        "failures": failures,
        "weights": {client_id: 1 / len(accepted) for client_id in accepted} if trained else {},
        "num_examples": {client_id: 120 + k for k, client_id in enumerate(accepted)}
        if trained
        else {},
        "learning_rate": 1e-3,
        "train_loss": 2.0 * 0.8**server_round if trained else None,
        "clients": {
            client_id: {
                "loss": 2.0 * 0.8**server_round + draw.uniform(-0.2, 0.2),
                "first_loss": 2.2 * 0.8**server_round,
                "last_loss": 1.8 * 0.8**server_round,
                "num_steps": 20,
                "num_tokens": 5120,
            }
            for client_id in (accepted if trained else [])
        },
        "screening": {
            client_id: {
                "norm": 1.0,
                "ratio": 1.1,
                "is_left_out": "outlier-norm-ratio" in failures.get(client_id, ""),
            }
            for client_id in (clients if trained else [])
        },
        "evaluation": {
            "total": score(num_exact, num_examples, 2.4 - 1.8 * num_exact / num_examples),
            "by_client": per_client,
            "by_category": per_category,
        },
        "retained_energy": 1 - 0.05 * 0.8**server_round if trained else None,
        "residual_rank": 24.0 + server_round if trained else None,
        "residual_norm": 0.21 - 0.01 * server_round if trained else None,
        "carried_norm": 0.0 if trained else None,
        "exactness_error": draw.uniform(1e-8, 9e-8) if trained else None,
        "applied_share": 1 - 1e-4 * draw.random() if trained else None,
        "diagnostics": {
            "update_norm": 3.0 * 0.8**server_round,
            "update_cosine": draw.uniform(0.2, 0.8) if server_round > 1 else None,
            "client_cosine": {"min": 0.3, "mean": 0.5 + 0.01 * server_round, "max": 0.8},
            "client_drift": 1.2 - 0.05 * server_round,
            "subspace_angle": dict.fromkeys(
                "AB", 60 * 0.8**server_round if server_round > 1 else None
            ),
            "factor_norms": {
                "before": {"A": 9.0, "B": 2.0},
                "after": {"A": 4.0, "B": 4.0 + server_round},
            },
        }
        if trained
        else None,
        "is_best": server_round % 2 == 0,
        "version": f"{server_round:064x}",
        "uplink_bytes": {client_id: 1_234_567 + k for k, client_id in enumerate(accepted)}
        if trained
        else {},
        "downlink_bytes": {client_id: 1_240_000 + 310_000 * server_round for client_id in clients}
        if trained
        else {},
        "seconds": {
            phase: (scale if trained or phase == "evaluate" else 0.0) * draw.uniform(0.9, 1.1)
            for phase, scale in zip(PHASES, (22.0, 0.4, 1.3, 0.6, 6.0), strict=True)
        },
    }


def records(rows: Sequence[dict[str, Any]]) -> list[RoundRecord]:
    """The rows as they are read back."""
    return [parse_record_line(json.dumps(one), "a row") for one in rows]


def write_record(file: Path, table: dict[str, Any]) -> None:
    """A file as a run writes it: with its checksum."""
    file.write_text(json.dumps(with_checksum(table)))


def write_run(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    clients: Sequence[str] = ("client-0", "client-1"),
    categories: Sequence[str] = ("a", "b"),
    **plan: Any,
) -> Path:
    """A run folder with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    partition = {
        client_id: {
            split: {c: draw.randrange(1, most) for c in categories if draw.random() < 0.8}
            for split, most in (("train", 90), ("test", 15))
        }
        for client_id in clients
    }
    settings = {
        "model": "lab/small-lm-135m-instruct",
        "num_parameters": 134_515_008,
        "num_trained": 921_600,
        "num_clients": len(clients),
        "num_rounds": max((one["round"] for one in rows), default=0),
        "method": "FedMomentum(split='balanced', energy=1.0)",
        "uplink_bytes": 1_234_567,
        "downlink_bytes": 2_400_000,
        "memory_bytes": 1_900_000_000,
        "disk_bytes": 480_000_000,
    }
    environment = {
        "versions": {"fedmomentum": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu"},
        "threads": 2,
        "device": "cpu",
        "dtype": "float32",
        "platform": "Linux-6.1-x86_64",
    }
    (folder / "config.toml").write_text(
        '[run]\nseed = 1\nrounds = 5\n\n[method]\nname = "fedmomentum"\n'
    )
    write_record(folder / "plan.json", settings | plan)
    write_record(folder / "environment.json", environment)
    write_record(folder / "partition.json", {"clients": partition})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder
