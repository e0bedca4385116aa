"""The plan's bytes of secure rounds are those of the messages, for every method that can be used."""

import pytest
import torch

from fedmomentum.aggregation.adapter_sums import AdapterSums
from fedmomentum.aggregation.moment_sums import (
    ClientMoments,
    MomentLimits,
    MomentSums,
    factor_shapes,
)
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.config.toml import from_dict
from fedmomentum.global_model.mean_changes import means_object
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
from fedmomentum.run.secure_traffic import num_stand_ins, secure_traffic
from fedmomentum.secure_sum.server import SumServer
from tests.secure_sum.sums import make_parties, make_plan, names, roster

SHAPES = {"layers.0.q": (900, 700), "layers.0.v": (500, 700)}
RANK = 4
N = 5


def adapter():
    draw = torch.Generator().manual_seed(1)
    modules = {}
    for name, (out_size, in_size) in SHAPES.items():
        B = 0.1 * torch.randn(out_size, RANK, generator=draw)
        modules[name] = LowRank(B, torch.randn(RANK, in_size, generator=draw))
    return Adapter(modules, dict.fromkeys(SHAPES, 2.5), {"head": torch.ones(3, 900)})


def messages_of(blocks, values, number, folder):
    """Bytes up and down of one party in a sum, and the totals."""
    plan = make_plan(N, blocks=blocks, number=number)
    parties = make_parties(plan, {party: values for party in names(N)}, folder)
    server = SumServer(plan, roster(names(N)))
    up = down = 0
    while not server.finished:
        for party, message in server.messages().items():
            reply = parties[party].answer(message)
            server.receive(party, reply)
            if party == names(N)[0]:
                up += len(reply)
                down += len(message)
        server.advance()
    totals = {name: torch.from_numpy(total) for name, total in server.result.values.items()}
    return up, down, totals


def numpy_of(values):
    return {name: tensor.numpy() for name, tensor in values.items()}


USABLE = [name for name, method in METHODS.items() if method.depends_on != "updates"]


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *((name, {}) for name in USABLE),
        ("fedmomentum", {"optimizer-state": "shared", "local-steps": 3}),
        ("fedit", {"optimizer-state": "shared", "local-steps": 3}),
    ],
    ids=str,
)
def test_counted_bytes_are_those_of_the_messages(name, training, tmp_path):
    method = METHODS[name]()
    config = from_dict({"privacy": {"secure-aggregation": True}, "training": training})
    start = adapter()
    up = down = 0
    server_round = 1  # of RoLoRA the one that sends B, which is the larger factor here
    layout = AdapterSums(
        start=start,
        factors=method.uploaded_factors(server_round),
        sketch_ranks=1 if method.depends_on == "product" else 0,
        num_parties=N,
        max_examples=100,
        max_change=0.1,
        expected_examples=50,
        seed=0,
    )
    changes = layout.changes(start, 10, {})
    blocks, values = layout.first_blocks(), layout.first_values(changes)
    if training:
        sums = MomentSums.of(
            start,
            layout.factors,
            config.training.hyperparameters(1, 1),
            num_parties=N,
            max_examples=100,
            limits=MomentLimits(1.0, 1.0),
        )
        means = {}
        for key, (num_rows, num_columns) in factor_shapes(start, "BA").items():
            means |= {f"{key}.rows": torch.zeros(num_rows)}
            means |= {f"{key}.columns": torch.zeros(num_columns)}
        own = ClientMoments(means, 3, 0.5)
        blocks = [*blocks, *sums.blocks()]
        values = {**values, **sums.values(10, own)}
    sent, got, totals = messages_of(blocks, numpy_of(values), 1, tmp_path)
    up, down = up + sent, down + got
    if layout.has_second_sum:
        means = layout.mean_changes(totals)
        down += len(means_object(means).data)
        sent, got, totals = messages_of(
            layout.second_blocks(), numpy_of(layout.second_values(changes, means)), 2, tmp_path
        )
        up, down = up + sent, down + got
        adapters, _ = layout.stand_ins(means, totals)
        assert len(adapters) == num_stand_ins(config, method)
    counted_up, counted_down = secure_traffic(config, start, method, N)
    # never less than is sent, and not much more than that and what carries the messages
    assert up <= counted_up <= up + 40_000
    assert down <= counted_down <= down + 40_000


def test_a_sketch_of_one_rank_doubles_what_is_sent():
    """4 (r + c)(out + in) up, as is said of FedMomentum; FedIT sends what it sends without."""
    start = adapter()
    plain = 4 * start.num_parameters()
    for name, privacy, factor in (("fedit", {}, 1), ("fedmomentum", {}, 2)):
        config = from_dict({"privacy": {"secure-aggregation": True} | privacy})
        up, _ = secure_traffic(config, start, METHODS[name](), 3)
        saved = 4 * 3 * 900
        assert up - 3 * (3 * 900 + 5 * 1200) - saved == pytest.approx(
            factor * (plain - saved), rel=1e-9
        )
