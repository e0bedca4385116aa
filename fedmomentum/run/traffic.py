"""The bytes of a round: what a client sends and receives, and what the server keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmomentum.aggregation.method import num_factor_parameters
from fedmomentum.lora.half_precision import wire_dtype
from fedmomentum.run.secure_traffic import num_stand_ins, secure_traffic
from fedmomentum.server.selection import sample_size

if TYPE_CHECKING:
    from fedmomentum.aggregation.method import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.lora.adapter import Adapter

FLOAT32 = 4
"""Bytes per number in residuals, and in updates on disk, whatever the dtype on the wire."""
FLOAT64 = 8
"""Bytes per number in sums."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a round, all of them upper bounds.

    Attributes:
        uplink: What a client sends.
        downlink: What a client receives: of the adapter what the method sends, and the residual.
        adapter: The whole adapter and the moments that belong to it, as the server keeps them.
        residual: What the server keeps besides, whether it is merged or carried.
        dense: All adapted modules as dense matrices.
        largest_sum: The sum of the largest module in float64.
        spool: All updates of the round.
    """

    uplink: int
    downlink: int
    adapter: int
    residual: int
    dense: int
    largest_sum: int
    spool: int


def plan_traffic(config: Config, adapter: Adapter, method: Method, num_clients: int) -> Traffic:
    """Bound the bytes of a round after the first, which sends the whole adapter.

    Args:
        config: The run's settings.
        adapter: The adapter; only its shapes matter.
        method: The method; if it alternates, the round with more traffic counts.
        num_clients: The total number of clients in the run.
    """
    up = wire_dtype(config.federation.uplink_dtype)
    down = wire_dtype(config.federation.downlink_dtype)
    rank = config.lora.rank
    is_secure = config.privacy.secure_aggregation
    num_updates = sample_size(num_clients, config.federation.client_fraction)
    if is_secure:
        # Stand-ins replace the clients' updates.
        num_updates = num_stand_ins(config, method)
    is_rounded = down.itemsize < FLOAT32
    sent_rank, kept_rank = _residual_ranks(method, rank, num_updates, is_rounded=is_rounded)

    uploaded = sent = sent_residual = kept_residual = 0
    dense = largest_sum = 0
    for matrix in adapter.modules.values():
        out_size, in_size = matrix.shape
        largest_rank = min(out_size, in_size)
        uploaded += _num_uploaded(method, out_size, in_size, rank)
        of_adapter, of_residual = _num_received(
            method, out_size, in_size, rank, min(sent_rank, largest_rank)
        )
        sent += of_adapter
        sent_residual += min(of_residual, out_size * in_size)
        kept = min(kept_rank, largest_rank) * (out_size + in_size)
        kept_residual += min(kept, out_size * in_size)
        dense += out_size * in_size
        num_summed = min((out_size + in_size) * num_updates * rank, out_size * in_size)
        largest_sum = max(largest_sum, FLOAT64 * num_summed)

    # Modules that are trained in full travel as they are.
    num_saved = sum(tensor.numel() for tensor in adapter.saved.values())
    sent_moments, received_moments = _moment_bytes(config, adapter)
    uplink = sent_moments + up.itemsize * (uploaded + num_saved)
    received = received_moments
    spool = FLOAT32 * num_updates * adapter.num_parameters()
    if is_secure:
        uplink, received_in_sums = secure_traffic(config, adapter, method, num_clients)
        received += received_in_sums
        spool = num_clients * uplink
    return Traffic(
        uplink=uplink,
        downlink=received + down.itemsize * (sent + num_saved) + FLOAT32 * sent_residual,
        adapter=received + down.itemsize * adapter.num_parameters(),
        residual=FLOAT32 * kept_residual,
        dense=FLOAT32 * dense,
        largest_sum=largest_sum,
        spool=spool,
    )


def _residual_ranks(
    method: Method, rank: int, num_updates: int, *, is_rounded: bool
) -> tuple[int, int]:
    """Return the largest ranks of the residual that clients receive, and of what the server keeps.

    The server also keeps what is carried into the next sum instead of being merged.
    """
    # An exact method merges what rounding removes from the adapter, of twice its rank.
    rounding_rank = 2 * rank if method.exact and is_rounded else 0
    sent_rank = method.max_residual_rank(rank, num_updates) + rounding_rank
    if not method.residual_rank:
        return sent_rank, sent_rank
    return sent_rank, max(sent_rank, (num_updates - 1) * rank + rounding_rank)


def _num_uploaded(method: Method, out_size: int, in_size: int, rank: int) -> int:
    """Return the number of parameters that a client uploads for one module."""
    by_round = [
        method.num_uplink_parameters(out_size, in_size, rank, server_round)
        for server_round in (1, 2)
    ]
    return max(by_round)


def _num_received(
    method: Method, out_size: int, in_size: int, rank: int, residual_rank: int
) -> tuple[int, int]:
    """Return the numbers of parameters of the adapter and the residual sent for one module."""
    adapter = residual = 0
    for server_round in (1, 2):
        factors = method.sent_factors(server_round)
        sent = num_factor_parameters(factors, out_size, in_size, rank)
        total = method.num_downlink_parameters(out_size, in_size, rank, residual_rank, server_round)
        adapter = max(adapter, sent)
        residual = max(residual, total - sent)
    return adapter, residual


def _moment_bytes(config: Config, adapter: Adapter) -> tuple[int, int]:
    """Return the bytes of optimizer moments that a client sends and receives."""
    state = config.training.optimizer_state
    # SGD has no second moments.
    num_seconds = 0 if config.training.arguments.get("optim") == "sgd" else 1
    numbers = 0
    means = 0
    for matrix in adapter.modules.values():
        out_size, in_size = matrix.shape
        numbers += matrix.rank * (out_size + in_size)
        means += num_seconds * (out_size + in_size + 2 * matrix.rank)
    if state == "shared-full":
        full = 4 * (1 + num_seconds) * numbers
        return full, full
    if state == "shared":
        return 2 * means, 2 * (numbers + means)
    return 0, 0
