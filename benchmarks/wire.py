"""Bytes on the wire per client and round, by method, for Llama-2-7B and Llama-3-8B.

    python benchmarks/wire.py [--rank 64] [--clients 10,100] [--json FILE]

Counted from what the methods declare (`num_uplink_parameters`, `num_downlink_parameters`), and the
count is compared with encoded payloads at a small scale. Nothing is timed. What an energy below 1
saves depends on the data: experiments/energy.py.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import Target, finish
from rich.console import Console
from rich.table import Table

from fedmomentum import LowRank
from fedmomentum.aggregation import Method
from fedmomentum.aggregation.aggregate import AggregationResult, RoundContext, aggregate_updates
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.formats.manifest import as_manifest
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.lora.adapter import Adapter, to_tensors
from fedmomentum.protocol.adapter_terms import ClientLora
from fedmomentum.protocol.codec import encode_reply, encode_task
from fedmomentum.protocol.messages import Reply, Task, TrainRequest, TrainResult
from fedmomentum.utils.tensors import safetensors_bytes

MODELS = {
    "Llama-2-7B": (32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]),
    "Llama-3-8B": (
        32,
        [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)],
    ),
}  # all linear layers of a decoder layer


def train_task(model: GlobalModel, objects: dict[str, bytes]) -> Task:
    """Return a task to train this model."""
    request = TrainRequest(
        manifest=as_manifest(model.manifest(), "the model"),
        lora=ClientLora(rank=8, lora_alpha=16.0, target_modules=[], mixed=False),
        learning_rate=1e-3,
        local_steps=10,
        local_epochs=None,
        batch_size=8,
        arguments={},
        seed=0,
        probe_seed=0,
        uplink_dtype="float32",
        optimizer_state="fresh",
    )
    return Task("run", "client", 2, request, objects)


def residual_rank(method: Method, clients: int, rank: int, shape: tuple[int, int]) -> int:
    """Return the most that `method.residual_rank` allows, no more than the matrix has."""
    # Half of `q = r`'s 2 r is an object that clients have cached.
    words = {
        "q <= (n-1) r": (clients - 1) * rank,
        "q = n r": clients * rank,
        "q <= n r": clients * rank,
        "q = r": 2 * rank,
        "": 0,
    }
    return min(words[method.residual_rank], min(shape))


def traffic(
    method: Method, clients: int, rank: int, shapes: list[tuple[int, int]], layers: int
) -> tuple[int, int]:
    """Count parameters up and down, a client and round; a residual is dense if that is smaller."""
    up = 0
    down = 0
    for out_size, in_size in shapes:
        up += method.num_uplink_parameters(out_size, in_size, rank, 1)
        q = residual_rank(method, clients, rank, (out_size, in_size))
        without = method.num_downlink_parameters(
            out_size, in_size, rank, rank if method.reads_base else 0, 1
        )
        factored = method.num_downlink_parameters(out_size, in_size, rank, q, 1) - without
        down += without + min(factored, out_size * in_size)
    return up * layers, down * layers


def in_16_bits(
    clients: int, rank: int, shapes: list[tuple[int, int]], layers: int
) -> dict[str, int]:
    """Count FedMomentum's bytes with 16-bit factors.

    What rounding removes from the adapter, of rank 2 r, is added to the residual in float32.
    """
    up = sum(2 * rank * (d + k) for d, k in shapes)
    down = up + sum(4 * min(min((clients + 1) * rank, d, k) * (d + k), d * k) for d, k in shapes)
    return {"up_bytes": up * layers, "down_bytes": down * layers}


# ── one round, encoded ──

SHAPE = (1600, 1200)
NUM_CLIENTS = 3
RANK = 4
SCALING = 2.0


def encoded_over_counted(method: Method) -> tuple[float, float]:
    """Return encoded bytes over counted bytes, up and down, of one module of `SHAPE`."""
    generator = torch.Generator().manual_seed(0)
    start = Adapter({"m": _drawn(generator)}, {"m": SCALING})
    kinds = method.uploaded_factors(1)
    updates = []
    for _ in range(NUM_CLIENTS):
        # For a factor that stays with its client, the server continues with what it sent.
        update = _mixed(_drawn(generator), start.modules["m"], kinds)
        updates.append(Adapter({"m": update}, {"m": SCALING}))
    aggregate = aggregate_updates(
        updates,
        [1.0] * NUM_CLIENTS,
        method,
        RoundContext(ranks={"m": RANK}, scalings={"m": SCALING}, reference=start, server_round=1),
    )
    q = sum(
        matrix.rank if isinstance(matrix, LowRank) else 0 for matrix in aggregate.residual.values()
    )
    counted_up = 4 * method.num_uplink_parameters(*SHAPE, RANK, 1)
    counted_down = 4 * method.num_downlink_parameters(*SHAPE, RANK, q, 1)
    up = _uploaded_bytes(updates[0], kinds)
    down = _downloaded_bytes(method, start, aggregate)
    return up / counted_up, down / counted_down if counted_down else float(down == 0)


def _drawn(generator: torch.Generator) -> LowRank:
    B = torch.randn(SHAPE[0], RANK, generator=generator)
    A = torch.randn(RANK, SHAPE[1], generator=generator)
    return LowRank(B, A)


def _mixed(trained: LowRank, start: LowRank, kinds: str) -> LowRank:
    return LowRank(trained.B if "B" in kinds else start.B, trained.A if "A" in kinds else start.A)


def _uploaded_bytes(update: Adapter, kinds: str) -> int:
    """Return the bytes of a reply that has an update's factors of these kinds."""
    retained = [f".lora_{factor}." for factor in "BA" if factor not in kinds]
    tensors = {
        name: tensor
        for name, tensor in to_tensors(update).items()
        if not any(kind in name for kind in retained)
    }
    result = TrainResult(
        loss=1.0, first_loss=1.0, last_loss=1.0, num_steps=1, num_tokens=1, rounding=0.0
    )
    reply = Reply("run", "client", 1, "", [], 1, "0" * 64, result, tensors)
    return len(encode_reply(reply)) - len(safetensors_bytes({}))


def _downloaded_bytes(method: Method, start: Adapter, aggregate: AggregationResult) -> int:
    """Return the bytes of the objects that a client which missed nothing is sent."""
    base_update: tuple[StoredObject, ...] = ()
    if method.reads_base:  # such a run begins with what the base gives up for the adapter
        base_update = (StoredObject.of({"m": start.modules["m"].scaled(-SCALING)}),)
    before = GlobalModel(BaseIdentity("b"), start, base_update)
    after = before.advance(aggregate, "method", exact=method.exact)
    not_sent = set(before.objects())
    if method.fresh:  # clients draw the adapter themselves
        not_sent |= {stored.name for stored in after.adapter_objects.values()}
    if after.carried:
        not_sent.add(after.manifest()["carried"])
    objects = {name: data for name, data in after.objects().items() if name not in not_sent}
    return len(encode_task(train_task(after, objects))) - len(encode_task(train_task(after, {})))


def main() -> None:
    """Print the tables of both models, and compare the count with encoded payloads."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--clients", default="10,100")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    sizes = [int(number) for number in chosen.clients.split(",")]
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        rows += report(model, sizes, chosen.rank)
    errors = []
    for name, kind in METHODS.items():
        up, down = encoded_over_counted(kind())
        errors += [abs(up - 1), abs(down - 1)]
        print(f"{name}: encoded over counted, up {up:.4f}, down {down:.4f}")
    targets = [
        Target.at_most(
            "encoded bytes against the counted, largest relative difference", 0.1, max(errors)
        )
    ]
    finish(targets, chosen.json, Console(), rank=chosen.rank, traffic=rows)


def report(model: str, sizes: list[int], rank: int) -> list[dict[str, Any]]:
    """Print the table of one model; return a row for each method and number of clients."""
    layers, shapes = MODELS[model]
    dense = 4 * layers * sum(d * k for d, k in shapes)
    table = Table(
        "method",
        "up",
        *(f"down, {n} clients" for n in sizes),
        title=f"{model}, all linear layers, rank {rank}: GB a client and round, "
        f"float32 (dense: {dense / 1e9:.1f})",
    )
    rows: list[dict[str, Any]] = []
    for name, kind in METHODS.items():
        method = kind()
        counts = [traffic(method, n, rank, shapes, layers) for n in sizes]
        in_bytes = [{"up_bytes": 4 * up, "down_bytes": 4 * down} for up, down in counts]
        table.add_row(method.title, *_gigabytes(in_bytes))
        for n, row in zip(sizes, in_bytes, strict=True):
            rows.append({"model": model, "method": name, "clients": n, **row})
    in_bytes = [in_16_bits(n, rank, shapes, layers) for n in sizes]
    table.add_row("FedMomentum, 16 bits both ways", *_gigabytes(in_bytes))
    for n, row in zip(sizes, in_bytes, strict=True):
        rows.append({"model": model, "method": "fedmomentum, 16 bits", "clients": n, **row})
    Console().print(table)
    return rows


def _gigabytes(rows: list[dict[str, int]]) -> list[str]:
    """Return the cells of a method: up, and down for each number of clients."""
    downs = [f"{row['down_bytes'] / 1e9:.2f}" for row in rows]
    return [f"{rows[0]['up_bytes'] / 1e9:.2f}", *downs]


if __name__ == "__main__":
    main()
