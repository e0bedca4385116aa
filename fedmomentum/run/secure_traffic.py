"""Upper estimates, for a plan, of the bytes that a round of secure sums sends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmomentum.aggregation.adapter_sums import AdapterSums
from fedmomentum.aggregation.moment_sums import MomentLimits, MomentSums
from fedmomentum.secure_sum.messages import STEPS
from fedmomentum.server.selection import sample_size

if TYPE_CHECKING:
    from fedmomentum.aggregation import Method
    from fedmomentum.config.schema import Config
    from fedmomentum.lora.adapter import Adapter
    from fedmomentum.secure_sum.messages import Block

VALUE_BYTES = 4
PARTY_BYTES = 900
"""Keys, shares, hashes and signatures of one other party in one sum, with its name, each way."""
EXCHANGE_BYTES = 1200
"""A task or a reply of a step of a sum, besides the message in it, each way."""
BLOCK_BYTES = 40
"""A block in a sum's plan, besides its name."""
NUM_SUMS = 3
"""The sums of updates, of cross terms, and of scores."""


def num_stand_ins(config: Config, method: Method) -> int:
    """Return how many stand-ins replace the clients' updates."""
    return 2 * config.privacy.sketch_ranks if method.depends_on == "product" else 1


def secure_traffic(
    config: Config, adapter: Adapter, method: Method, num_clients: int
) -> tuple[int, int]:
    """Return the bytes that a client sends in a round's sums, and receives besides the model.

    Args:
        config: The run's settings.
        adapter: The adapter; only its shapes matter.
        method: The method; if it alternates, the round with more traffic counts.
        num_clients: The total number of clients in the run.
    """
    # A method may alternate: count both kinds of rounds, and report the larger one.
    layouts = []
    for server_round in (1, 2):
        layouts.append(
            AdapterSums(
                start=adapter,
                factors=method.uploaded_factors(server_round),
                sketch_ranks=config.privacy.sketch_ranks if method.depends_on == "product" else 0,
                num_parties=num_clients,
                max_examples=1,
                max_change=1.0,
                expected_examples=1,
                seed=0,
            )
        )
    # Keys, shares and signatures grow with the number of clients, plans with that of modules.
    parties = sample_size(num_clients, config.federation.client_fraction)
    agreement = NUM_SUMS * (PARTY_BYTES * parties + EXCHANGE_BYTES * len(STEPS))
    names = sum(len(name) + BLOCK_BYTES for name in (*adapter.modules, *adapter.saved))
    uplink = 0
    downlink = 0
    for layout in layouts:
        values, means = _num_values(layout)
        plan = 0
        for block in _moment_blocks(config, layout):
            values += block.size
            plan += len(block.name) + BLOCK_BYTES
        uplink = max(uplink, VALUE_BYTES * values)
        downlink = max(downlink, VALUE_BYTES * means + plan)
    return uplink + agreement, downlink + agreement + 2 * NUM_SUMS * names


def _moment_blocks(config: Config, layout: AdapterSums) -> list[Block]:
    """Return the blocks of optimizer moments in the first sum; none if no moments are shared."""
    if not config.training.shares_moments:
        return []
    sums = MomentSums.of(
        layout.start,
        layout.factors,
        config.training.hyperparameters(1, config.federation.num_rounds),
        num_parties=layout.num_parties,
        max_examples=1,
        limits=MomentLimits(1.0, 1.0),
    )
    return sums.blocks()


def _num_values(layout: AdapterSums) -> tuple[int, int]:
    """Return how many numbers a client sends in the sums of updates, and receives as means."""
    # Tensors trained in full are summed and averaged whole.
    saved = sum(tensor.numel() for tensor in layout.start.saved.values())
    values = saved
    means = saved
    for module, matrix in layout.start.modules.items():
        out_size, in_size = matrix.shape
        rank = matrix.rank
        factors = rank * (out_size * ("B" in layout.factors) + in_size * ("A" in layout.factors))
        # The sketch has as many columns as the range on which cross terms are summed.
        values += factors + (out_size + in_size) * layout.width(module)
        means += rank * (out_size + in_size) + out_size * layout.width(module)
    return values, means if layout.has_second_sum else 0
