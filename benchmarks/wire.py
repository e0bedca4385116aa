"""Bytes on the wire per client and round, by method, for Llama-2-7B and Llama-3-8B.

    python benchmarks/wire.py [--rank 64] [--clients 10,100] [--json FILE]

Counted from what the methods declare (`num_uplink_parameters`, `num_downlink_parameters`), and the
count is compared with encoded payloads at a small scale. Nothing is timed. What an energy below 1
saves depends on the data: experiments/energy.py.
"""

import argparse
from pathlib import Path

import torch
from common import Target, finish
from rich.console import Console
from rich.table import Table

from fedmomentum import LowRank
from fedmomentum.aggregation import Method
from fedmomentum.aggregation.aggregate import RoundContext, aggregate_updates
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.formats.manifest import as_manifest
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.lora.adapter import Adapter, to_tensors
from fedmomentum.protocol.codec import encode_reply, encode_task
from fedmomentum.protocol.messages import ClientLora, Reply, Task, TrainRequest, TrainResult
from fedmomentum.utils.tensors import safetensors_bytes

MODELS = {
    "Llama-2-7B": (32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]),
    "Llama-3-8B": (
        32,
        [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)],
    ),
}  # all linear layers of a decoder layer


def train_task(model: GlobalModel, objects: dict[str, bytes]) -> Task:
    """A task to train this model."""
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
    )
    return Task("run", "client", 2, request, objects)


def residual_rank(method: Method, clients: int, rank: int, shape: tuple[int, int]) -> int:
    """The most that `method.residual_rank` says, as a number; no more than the matrix has."""
    words = {
        "q <= (n-1) r": (clients - 1) * rank,
        "q = n r": clients * rank,
        "q <= n r": clients * rank,
        "q = r": 2 * rank,
        "": 0,
    }
    return min(
        words[method.residual_rank], min(shape)
    )  # of `q = r` the half is an object that clients hold


def traffic(
    method: Method, clients: int, rank: int, shapes: list[tuple[int, int]], layers: int
) -> tuple[int, int]:
    """Parameters up and down, a client and round; a residual is dense where that is smaller."""
    up = down = 0
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
    """FedMomentum's bytes with 16-bit factors; the float32 residual has what rounding removed."""
    up = sum(2 * rank * (d + k) for d, k in shapes)
    down = up + sum(4 * min(min((clients + 1) * rank, d, k) * (d + k), d * k) for d, k in shapes)
    return {"up_bytes": up * layers, "down_bytes": down * layers}


def measured(method: Method, clients: int = 3, rank: int = 4) -> tuple[float, float]:
    """Encoded bytes over counted bytes, up and down, of one module of 1600 x 1200."""
    shape, generator = (1600, 1200), torch.Generator().manual_seed(0)

    def draw() -> LowRank:
        return LowRank(
            torch.randn(shape[0], rank, generator=generator),
            torch.randn(rank, shape[1], generator=generator),
        )

    start = Adapter({"m": draw()}, {"m": 2.0})
    kinds = method.uploaded_factors(
        1
    )  # of what stays with its client, the server goes on with what it sent
    sent = [
        Adapter({"m": _mixed(draw(), start.modules["m"], kinds)}, {"m": 2.0})
        for _ in range(clients)
    ]
    result = aggregate_updates(
        sent,
        [1.0] * clients,
        method,
        RoundContext(ranks={"m": rank}, scalings={"m": 2.0}, reference=start, server_round=1),
    )
    given_up = start.modules["m"].scaled(-2.0)
    before = GlobalModel(BaseIdentity("b"), start)
    if method.reads_base:  # such a run begins with what the base gave up
        from fedmomentum.global_model.objects import StoredObject

        before = GlobalModel(BaseIdentity("b"), start, (StoredObject.of({"m": given_up}),))
    after = before.advance(result, "method", exact=method.exact)
    held = set(before.objects())
    drawn = {blob.name for blob in after.adapter_objects.values()} if method.fresh else set()
    objects = {name: data for name, data in after.objects().items() if name not in held | drawn}
    if after.carried:
        objects = {
            name: data for name, data in objects.items() if name != after.manifest()["carried"]
        }
    task = train_task(after, objects)
    empty = train_task(after, {})
    down = len(encode_task(task)) - len(encode_task(empty))
    kept = [f".lora_{factor}." for factor in "BA" if factor not in method.uploaded_factors(1)]
    tensors = {
        name: t for name, t in to_tensors(sent[0]).items() if not any(kind in name for kind in kept)
    }
    result = TrainResult(
        loss=1.0, first_loss=1.0, last_loss=1.0, num_steps=1, num_tokens=1, rounding=0.0
    )
    up = len(encode_reply(Reply("run", "client", 1, "", [], 1, "0" * 64, result, tensors))) - len(
        safetensors_bytes({})
    )
    q = sum(
        matrix.rank if isinstance(matrix, LowRank) else 0 for matrix in result.residual.values()
    )
    wanted_up = 4 * method.num_uplink_parameters(*shape, rank, 1)
    wanted_down = 4 * method.num_downlink_parameters(*shape, rank, q, 1)
    return up / wanted_up, down / wanted_down if wanted_down else float(down == 0)


def _mixed(trained: LowRank, start: LowRank, kinds: str) -> LowRank:
    return LowRank(trained.B if "B" in kinds else start.B, trained.A if "A" in kinds else start.A)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--clients", default="10,100")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    sizes, found, off = list(map(int, chosen.clients.split(","))), [], []
    for model, (layers, shapes) in MODELS.items():
        dense = 4 * layers * sum(d * k for d, k in shapes)
        title = f"{model}, all linear layers, rank {chosen.rank}: GB a client and round, "
        title += f"float32 (dense: {dense / 1e9:.1f})"
        table = Table("method", "up", *(f"down, {n} clients" for n in sizes), title=title)
        for name, kind in METHODS.items():
            method = kind()
            counts = [traffic(method, n, chosen.rank, shapes, layers) for n in sizes]
            found += [
                {
                    "model": model,
                    "method": name,
                    "clients": n,
                    "up_bytes": 4 * up,
                    "down_bytes": 4 * down,
                }
                for n, (up, down) in zip(sizes, counts, strict=True)
            ]
            table.add_row(
                method.title,
                f"{4 * counts[0][0] / 1e9:.2f}",
                *(f"{4 * d / 1e9:.2f}" for _, d in counts),
            )
        for n in (
            sizes
        ):  # what rounding takes from the adapter, of rank 2 r, goes into the residual in float32
            half = in_16_bits(n, chosen.rank, shapes, layers)
            found.append({"model": model, "method": "fedmomentum, 16 bits", "clients": n, **half})
        halves = found[-len(sizes) :]
        table.add_row(
            "FedMomentum, 16 bits both ways",
            f"{halves[0]['up_bytes'] / 1e9:.2f}",
            *(f"{half['down_bytes'] / 1e9:.2f}" for half in halves),
        )
        Console().print(table)
    for name, kind in METHODS.items():
        ratios = measured(kind())
        off.append(max(abs(ratio - 1) for ratio in ratios))
        print(f"{name}: encoded over counted, up {ratios[0]:.4f}, down {ratios[1]:.4f}")
    targets = [
        Target.at_most("encoded bytes beside the counted, largest relative distance", 0.1, max(off))
    ]
    finish(targets, chosen.json, Console(), rank=chosen.rank, traffic=found)


if __name__ == "__main__":
    main()
