"""The strategy's laws, on arrays alone and on live PEFT models."""

import random
from io import BytesIO

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from fedmomentum.aggregation import FedMomentum
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.errors import AdapterError, ConfigError, ModelError, QuorumError
from fedmomentum.flower import FedMomentumStrategy
from fedmomentum.flower.peft_arrays import RESIDUAL_KEY, STATE_KEY, digest, to_record
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.matrix import to_dense
from tests.flower.loop_grid import LoopGrid

# after fedmomentum.flower, which sets what flwr reads when it is imported
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # isort: skip
from flwr.serverapp.strategy import FedAvg  # isort: skip

PREFIX = "base_model.model."
SHAPES = {"a.q_proj": (7, 9), "a.v_proj": (5, 9), "b.up": (12, 6)}
# unequal ranks and scalings, none of them 1
CONFIG = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 12,
    "rank_pattern": {"v_proj": 2},
    "alpha_pattern": {"b.up": 5},
    "target_modules": ["q_proj", "v_proj", "up"],
    "base_model_name_or_path": "a-base",
}
RANKS = {"a.q_proj": 3, "a.v_proj": 2, "b.up": 3}
SCALINGS = {"a.q_proj": 4.0, "a.v_proj": 6.0, "b.up": 5 / 3}
EXAMPLES = {11: 40, 22: 10, 33: 25}


def adapter_arrays(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out_size, in_size) in SHAPES.items():
        rank = RANKS[module]
        A = torch.randn(rank, in_size, generator=generator, dtype=torch.float64)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A.to(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.zeros(out_size, rank, dtype=dtype)
    return to_record(tensors)


def products(arrays, scalings=SCALINGS):
    """Module to `s B A`, in float64."""
    result = {}
    for module, scaling in scalings.items():
        A, B = (arrays[f"{PREFIX}{module}.lora_{kind}.weight"].numpy() for kind in "AB")
        result[module] = scaling * B.astype(np.float64) @ A.astype(np.float64)
    return result


def residuals(content):
    """Module to the dense base residual of a message."""
    record = content.array_records.get(RESIDUAL_KEY, {})
    result = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for module in SHAPES:
        if f"{module}.dense" in record:
            result[module] += record[f"{module}.dense"].numpy()
        elif f"{module}.B" in record:
            result[module] += record[f"{module}.B"].numpy() @ record[f"{module}.A"].numpy()
    return result


def receipt(message):
    record = message.content.array_records.get(RESIDUAL_KEY, ArrayRecord())
    return ConfigRecord({"sha256": digest(record)})


class Client:
    """A client that adds noise to its arrays, and answers as FlowerTune's do."""

    def __init__(self, node_id, change=None, has_receipt=True):
        self.node_id, self.change, self.has_receipt = node_id, change, has_receipt
        self.trained = []

    def __call__(self, message):
        generator = np.random.default_rng([self.node_id, len(self.trained)])
        metrics = MetricRecord({"num-examples": EXAMPLES[self.node_id], "loss": 0.1 * self.node_id})
        content = RecordDict({"metrics": metrics})
        if message.metadata.message_type == "train":
            arrays = {}
            for key, array in message.content["arrays"].items():
                value = array.numpy()
                arrays[key] = Array(value + generator.normal(size=value.shape).astype(value.dtype))
            content["arrays"] = ArrayRecord(arrays)
            self.trained.append(content["arrays"])
        if self.has_receipt:
            content["receipt"] = receipt(message)
        return Message(
            self.change(content) or content if self.change else content, reply_to=message
        )


def make_strategy(**options):
    return FedMomentumStrategy(
        options.pop("config", CONFIG), fraction_evaluate=options.pop("evaluate", 0.0), **options
    )


def play(strategy, clients=None, rounds=1, dtype=torch.float64, arrays=None):
    clients = clients or {node: Client(node) for node in EXAMPLES}
    grid = LoopGrid(clients)
    result = strategy.start(grid, arrays or adapter_arrays(dtype=dtype), num_rounds=rounds)
    return result, clients, grid


def weighted(arrays_of):
    total = sum(EXAMPLES[node] for node in arrays_of)
    return {
        module: sum(
            EXAMPLES[node] / total * products(arrays)[module] for node, arrays in arrays_of.items()
        )
        for module in SHAPES
    }


# ── laws ──


@pytest.mark.parametrize(
    "method",
    [
        "fedmomentum",
        "flora",
        "fedexlora",
        FedMomentum(residual="carried"),
        FedMomentum(energy=0.8, split="balanced"),
        FedMomentum(merge_every=2),
    ],
    ids=str,
)
def test_next_model_is_the_exact_weighted_mean(method):
    """adapter + residual + carried, as sent, is the residual before plus the mean of all products."""
    strategy = make_strategy(method=method)
    _, clients, grid = play(strategy, rounds=4)
    waiting = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    sent = [message for message in grid.sent if message.metadata.dst_node_id == 11]
    for number in range(3):
        mean = weighted({node: client.trained[number] for node, client in clients.items()})
        before, after = residuals(sent[number].content), residuals(sent[number + 1].content)
        following = products(sent[number + 1].content["arrays"])
        for module in SHAPES:
            wanted = before[module] + mean[module] + waiting[module]
            left = wanted - following[module] - after[module]
            if strategy.method.residual_rank and not isinstance(strategy.method, FedMomentum):
                np.testing.assert_allclose(left, 0, atol=1e-10)
            waiting[module] = left
    # the strategy holds what is carried; with a plain method nothing is
    state = strategy.state
    last = weighted({node: client.trained[3] for node, client in clients.items()})
    for module in SHAPES:
        held = state.adapter.effective(module).dense().numpy()
        for part in (state.residual, state.carried):
            held = held + (to_dense(part[module]).numpy() if module in part else 0)
        wanted = residuals(sent[3].content)[module] + last[module] + waiting[module]
        np.testing.assert_allclose(held, wanted, atol=1e-10)
        if method == "fedmomentum":
            np.testing.assert_allclose(waiting[module], 0, atol=1e-10)


def test_an_evaluation_on_the_server_gets_the_residual_or_a_warning(caplog):
    strategy = make_strategy()
    contents = []

    def evaluate_all(server_round, arrays):
        contents.append((strategy.residual_content(), arrays))

    grid = LoopGrid({node: Client(node) for node in EXAMPLES})
    strategy.start(grid, adapter_arrays(), num_rounds=2, evaluate_fn=evaluate_all)
    assert "without the base residual" not in caplog.text
    assert not contents[0][0]
    # after round 1, what clients are sent in round 2
    sent = grid.sent[-1].content
    content, arrays = contents[1]
    assert arrays == sent["arrays"] and RESIDUAL_KEY in content
    assert {key: sent[key] for key in content} == dict(content)

    strategy = make_strategy()
    grid = LoopGrid({node: Client(node) for node in EXAMPLES})
    strategy.start(grid, adapter_arrays(), num_rounds=1, evaluate_fn=lambda *_: None)
    assert "evaluate_fn scored round 1 without the base residual" in caplog.text
    assert "scored round 0" not in caplog.text


def test_stock_fedavg_gives_a_different_model():
    _, clients, _ = play(make_strategy())
    stock, stock_clients, _ = play(FedAvg(fraction_evaluate=0.0))
    mean = weighted({node: client.trained[0] for node, client in stock_clients.items()})
    for node, client in clients.items():
        assert digest(client.trained[0]) == digest(stock_clients[node].trained[0])
    for module in SHAPES:
        lost = np.linalg.norm(products(stock.arrays)[module] - mean[module])
        assert lost > 0.3 * np.linalg.norm(mean[module])


def test_rslora_scales_by_the_root_of_the_rank():
    config = CONFIG | {"use_rslora": True}
    strategy = make_strategy(config=config)
    _, clients, _ = play(strategy)
    scalings = {"a.q_proj": 12 / 3**0.5, "a.v_proj": 12 / 2**0.5, "b.up": 5 / 3**0.5}
    for module, scaling in scalings.items():
        mean = sum(
            EXAMPLES[node] / 75 * products(client.trained[0], scalings)[module]
            for node, client in clients.items()
        )
        held = strategy.state.adapter.effective(module).dense() + to_dense(
            strategy.state.residual[module]
        )
        np.testing.assert_allclose(held.numpy(), mean, atol=1e-10)
        assert strategy.state.adapter.scalings[module] == pytest.approx(scaling)


def test_modules_that_are_trained_in_full_are_averaged_by_weight():
    key = f"{PREFIX}score.weight"
    start = ArrayRecord({**adapter_arrays(), key: Array(np.ones((2, 9)))})
    strategy = make_strategy(config=CONFIG | {"modules_to_save": ["score"]})
    result, clients, _ = play(strategy, rounds=2, arrays=start)
    assert list(result.arrays) == list(start)
    mean = sum(EXAMPLES[n] / 75 * c.trained[1][key].numpy() for n, c in clients.items())
    np.testing.assert_allclose(result.arrays[key].numpy(), mean, atol=1e-12)


def test_the_arrays_keep_names_order_and_dtypes():
    for dtype in (torch.float64, torch.float32, torch.float16):
        start = adapter_arrays(dtype=dtype)
        result, _, grid = play(make_strategy(), dtype=dtype)
        assert list(result.arrays) == list(start)
        for key, array in result.arrays.items():
            assert (array.dtype, array.shape) == (start[key].dtype, start[key].shape)


def test_what_rounding_to_float16_removes_is_in_the_residual():
    strategy = make_strategy()
    result, clients, _ = play(strategy, dtype=torch.float16)
    mean = weighted({node: client.trained[0] for node, client in clients.items()})
    for module in SHAPES:
        total = products(result.arrays)[module] + to_dense(strategy.state.residual[module]).numpy()
        error = np.linalg.norm(total - mean[module]) / np.linalg.norm(mean[module])
        assert error < 1e-6
        rounding = products(result.arrays)[module] - mean[module]
        assert np.linalg.norm(rounding) > 1e-4 * np.linalg.norm(mean[module])


def test_the_order_of_replies_changes_no_bit():
    seen = set()
    for seed in range(3):
        clients = {node: Client(node) for node in EXAMPLES}
        strategy = make_strategy()
        grid = LoopGrid(clients)

        def shuffled(messages, *, timeout=None, grid=grid, seed=seed):
            replies = LoopGrid.send_and_receive(grid, messages)
            random.Random(seed).shuffle(replies)
            return replies

        grid.send_and_receive = shuffled
        result = strategy.start(grid, adapter_arrays(), num_rounds=2)
        metrics = repr(sorted(result.train_metrics_clientapp[2].items()))
        seen.add((digest(result.arrays), digest(strategy.state.residual_arrays()), metrics))
    assert len(seen) == 1


def test_resuming_from_a_directory_gives_the_same_bits(tmp_path):
    uninterrupted = make_strategy()
    result, clients, _ = play(uninterrupted, rounds=3, dtype=torch.float32)
    first = make_strategy(save_to=tmp_path)
    _, halves, _ = play(first, rounds=2, dtype=torch.float32)
    second = make_strategy()
    arrays = second.load(tmp_path, adapter_arrays(dtype=torch.float32))
    resumed, _, _ = play(second, clients=halves, arrays=arrays)
    assert digest(resumed.arrays) == digest(result.arrays)
    assert digest(second.state.residual_arrays()) == digest(uninterrupted.state.residual_arrays())
    assert second.state.server_round == 3
    model = GlobalModel.load(tmp_path)
    assert (model.server_round, model.base.name) == (2, "a-base")
    # another method, another scaling, other shapes
    with pytest.raises(ModelError, match="this strategy has FedMomentum"):
        make_strategy(method=FedMomentum(split="procrustes")).load(tmp_path, arrays)
    with pytest.raises(ModelError, match="other scalings"):
        make_strategy(config=CONFIG | {"lora_alpha": 6}).load(tmp_path, arrays)


def test_carried_rounds_resume_too(tmp_path):
    method = FedMomentum(residual="carried")
    uninterrupted = make_strategy(method=method)
    result, _, _ = play(uninterrupted, rounds=3, dtype=torch.float32)
    _, halves, _ = play(
        make_strategy(method=method, save_to=tmp_path), rounds=2, dtype=torch.float32
    )
    second = make_strategy(method=method)
    arrays = second.load(tmp_path, adapter_arrays(dtype=torch.float32))
    resumed, _, _ = play(second, clients=halves, arrays=arrays)
    assert digest(resumed.arrays) == digest(result.arrays)


# ── refusals ──


def change_array(function, key=f"{PREFIX}a.q_proj.lora_A.weight"):
    def change(content):
        arrays = dict(content["arrays"])
        function(arrays, key)
        content["arrays"] = ArrayRecord(arrays)

    return change


def with_metrics(**metrics):
    def change(content):
        content["metrics"] = MetricRecord({k.replace("_", "-"): v for k, v in metrics.items()})

    return change


def replaced(make):
    return change_array(lambda arrays, key: arrays.update({key: make(arrays[key])}))


def huge_header(array):
    """A header of a terabyte, and no data."""
    stream = BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (3, 10**9)}
    np.lib.format.write_array_header_1_0(stream, header)
    return Array("float64", (3, 10**9), "numpy.ndarray", stream.getvalue())


def npy_with_header(text):
    """An array whose header is any text: numpy evaluates it, and what it raises varies."""

    def make(array):
        header = text.encode().ljust(117) + b"\n"
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        return Array(array.dtype, array.shape, array.stype, data + array.data[128:])

    return replaced(make)


BAD = {
    "array base_model.model.a.q_proj.lora_A.weight is missing": change_array(
        lambda arrays, key: arrays.pop(key)
    ),
    "array base_model.model.zz.lora_A.weight is unknown": change_array(
        lambda arrays, key: arrays.update({f"{PREFIX}zz.lora_A.weight": arrays[key]})
    ),
    "is float64 (2, 9); wanted float64 (3, 9)": replaced(lambda a: Array(a.numpy()[:2])),
    "is float32 (3, 9); wanted float64 (3, 9)": replaced(
        lambda a: Array(a.numpy().astype(np.float32))
    ),
    "holds NaN or Inf": replaced(lambda a: Array(a.numpy() * np.inf)),
    "too large for sums": replaced(lambda a: Array(a.numpy() * 1e30)),
    "declares float64 (3, 9) and holds float32 (3, 9)": replaced(
        lambda a: Array("float64", (3, 9), a.stype, Array(a.numpy().astype(np.float32)).data)
    ),
    "is float64 (3, 1000000000); wanted": replaced(huge_header),
    "holds 208 bytes for": replaced(lambda a: Array(a.dtype, a.shape, a.stype, a.data[:-8])),
    "is no .npy file": replaced(lambda a: Array(a.dtype, a.shape, a.stype, b"\x93NUMPY\x01\x00")),
    "has dtype object": replaced(
        lambda a: Array("object", a.shape, a.stype, a.data.replace(b"'<f8'", b"'|O' "))
    ),
    "is stored as 'pickle'": replaced(lambda a: Array(a.dtype, a.shape, "pickle", a.data)),
    "has 2 ArrayRecords": lambda content: content.update({"more": content["arrays"]}),
    "has 0 ArrayRecords": lambda content: content.pop("arrays") and None,
    "has 2 MetricRecords": lambda content: content.update({"more": content["metrics"]}),
    "'num-examples' is 0": with_metrics(num_examples=0),
    "'num-examples' is -3": with_metrics(num_examples=-3),
    "'num-examples' is nan": with_metrics(num_examples=float("nan")),
    "'num-examples' is 1e+308": with_metrics(num_examples=1e308),
    "'num-examples' is [4, 5]": with_metrics(num_examples=[4, 5]),
    "'num-examples' is None": with_metrics(loss=1.0),
}


HEADERS = (
    "{'descr': (",
    "{'descr': (), 'fortran_order': False, 'shape': (3, 9)}",
    "{'descr': ('<f4',), 'fortran_order': False, 'shape': (3, 9)}",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (3, -9)}",
    "[" * 100,
)


@pytest.mark.parametrize(
    ("reason", "change"),
    [*BAD.items(), *(("array", npy_with_header(text)) for text in HEADERS)],
)
def test_a_bad_reply_is_named_and_spoils_no_other(reason, change, caplog):
    clients = {node: Client(node) for node in EXAMPLES}
    clients[22].change = change
    strategy = make_strategy()
    result, _, _ = play(strategy, clients)
    (record,) = (r.getMessage() for r in caplog.records if "does not count" in r.getMessage())
    assert "node 22" in record and reason in record
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["accepted-nodes"], metrics["rejected-nodes"]) == (2, 1)
    mean = weighted({node: clients[node].trained[0] for node in (11, 33)})
    for module in SHAPES:
        held = strategy.state.adapter.effective(module).dense() + to_dense(
            strategy.state.residual[module]
        )
        np.testing.assert_allclose(held.numpy(), mean[module], atol=1e-10)


def test_errors_and_silence_are_named_and_too_many_end_the_run(caplog):
    def broken(message):
        raise ValueError("boom\x1b[2J")

    clients = {11: Client(11), 22: broken, 33: lambda message: None}
    with pytest.raises(QuorumError) as caught:
        play(make_strategy(), clients)
    text = str(caught.value)
    assert "1 of 3 nodes" in text and "\x1b" not in text
    assert "node 22: it failed with code 2: <class 'ValueError'>:<boom" in text
    assert "node 33: no reply arrived in time" in text
    result, _, _ = play(make_strategy(min_valid_fraction=0.3), clients)
    assert result.train_metrics_clientapp[1]["rejected-nodes"] == 2


def test_a_reply_without_the_round_s_residual_does_not_count(caplog):
    clients = {node: Client(node) for node in EXAMPLES}
    clients[33].has_receipt = False
    result, _, _ = play(make_strategy(evaluate=1.0), clients, rounds=2)
    assert result.train_metrics_clientapp[1]["rejected-nodes"] == 0  # there was none to apply
    assert result.train_metrics_clientapp[2]["rejected-nodes"] == 1
    assert "node 33 does not count: it worked without the round's base residual" in caplog.text
    # evaluations of the model without its residual are left out as well
    loss = result.evaluate_metrics_clientapp[1]["loss"]
    assert loss == pytest.approx((40 * 1.1 + 10 * 2.2) / 50)


def test_clients_that_never_apply_residuals_are_found_in_round_1():
    clients = {node: Client(node, has_receipt=False) for node in EXAMPLES}
    strategy = make_strategy()
    with pytest.raises(ConfigError, match="no client confirms that it applies one"):
        play(strategy, clients)
    assert strategy.state.server_round == 0
    # a method without residual needs no change of the clients
    for method in (FedMomentum(residual="carried"), "flexlora", "fedit"):
        result, _, grid = play(make_strategy(method=method), clients, rounds=2)
        metrics = result.train_metrics_clientapp[2]
        assert (metrics["dropped-norm"] > 0.1) == (method in ("flexlora", "fedit"))
        assert (metrics["carried-norm"] > 0.1) == isinstance(method, FedMomentum)
        assert metrics["residual-norm"] == metrics["residual-rank"] == 0
        assert all(RESIDUAL_KEY not in message.content for message in grid.sent)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_works_or_says_what_it_needs(name):
    needs = {
        "ffalora": "train one factor at a time",
        "rolora": "train one factor at a time",
        "fedsvd": "train one factor at a time",
        "fedsalora": "stay with each client",
        "frlora": "base weights on the server",
        "hetlora": "ranks change",
    }
    if name in needs:
        with pytest.raises(ConfigError, match=needs[name]):
            make_strategy(method=name)
        return
    strategy = make_strategy(method=name)
    _, clients, _ = play(strategy, rounds=2)
    assert strategy.state.server_round == 2


def test_mistakes_of_the_server_are_refused():
    with pytest.raises(AdapterError, match="use_dora"):
        make_strategy(config=CONFIG | {"use_dora": True})
    with pytest.raises(ConfigError, match="min_valid_fraction"):
        make_strategy(min_valid_fraction=0)
    with pytest.raises(ConfigError, match="unknown method 'fedavg'"):
        make_strategy(method="fedavg")
    with pytest.raises(
        AdapterError, match="module a.v_proj has rank 2 and the configuration says 3"
    ):
        play(make_strategy(config=CONFIG | {"rank_pattern": {}}))
    strategy = make_strategy()
    play(strategy)
    with pytest.raises(ConfigError, match="not those that the strategy returned last"):
        play(strategy)
    with pytest.raises(ConfigError, match="no arrays yet"):
        make_strategy().save("nowhere")


def test_metrics_that_not_all_replies_have_are_left_out():
    clients = {node: Client(node) for node in EXAMPLES}
    clients[22].change = with_metrics(num_examples=10, loss=2.2, extra=1.0)
    clients[33].change = with_metrics(num_examples=25, loss=3.3, steps=[1, 2])
    metrics = play(make_strategy(), clients)[0].train_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx((40 * 1.1 + 10 * 2.2 + 25 * 3.3) / 75)
    assert not {"extra", "steps"} & set(metrics)


def test_messages_say_which_residual_they_hold():
    _, _, grid = play(make_strategy(), rounds=2)
    first, second = (m for m in grid.sent if m.metadata.dst_node_id == 11)
    assert first.content[STATE_KEY]["round"] == 0 and RESIDUAL_KEY not in first.content
    assert second.content[STATE_KEY]["round"] == 1
    assert second.content[STATE_KEY]["sha256"] == digest(second.content[RESIDUAL_KEY])
    assert second.content["config"]["server-round"] == 2
