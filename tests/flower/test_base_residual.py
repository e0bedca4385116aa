"""The client's part on live PEFT models: the same base for all, whatever a client has missed."""

import pytest
import torch

pytest.importorskip("flwr")

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fedmomentum.cli.main import app as cli
from fedmomentum.errors import AdapterError, ModelError, PayloadError
from fedmomentum.flower import FedMomentumStrategy, apply_base_residual
from fedmomentum.flower.peft_arrays import RESIDUAL_KEY, STATE_KEY, digest, to_record
from fedmomentum.linalg.matrix import to_dense
from tests.flower.loop_grid import LoopGrid
from tests.tiny import tiny_llama

# after fedmomentum.flower, which sets what flwr reads when it is imported
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # isort: skip

CONFIG = {
    "r": 4,
    "lora_alpha": 10,
    "use_rslora": True,
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"down_proj": 2},
    "task_type": "CAUSAL_LM",
}
TOKENS = torch.arange(4, 24)[None]


def lora_config():
    return LoraConfig(**CONFIG)


def live_model(base, dtype=torch.float32):
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), lora_config())


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def base_weights(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}


def load(model, content):
    """As a ClientApp does it."""
    receipt = apply_base_residual(model, content)
    set_peft_model_state_dict(model, content["arrays"].to_torch_state_dict())
    return receipt


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Three rounds of clients that move their factors: the base, the strategy, node 1's messages."""
    base = tiny_llama(tmp_path_factory.mktemp("base"))
    model = live_model(base)
    strategy = FedMomentumStrategy(lora_config(), base_model=str(base), fraction_evaluate=0.0)

    def client(message):
        receipt = load(model, message.content)
        node = message.metadata.dst_node_id
        generator = torch.Generator().manual_seed(node + message.content[STATE_KEY]["round"])
        state = get_peft_model_state_dict(model)
        for key, tensor in state.items():
            state[key] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        metrics = MetricRecord({"num-examples": 10 * node})
        content = {"arrays": ArrayRecord(state), "metrics": metrics, "receipt": receipt}
        return Message(RecordDict(content), reply_to=message)

    grid = LoopGrid({1: client, 2: client, 3: client})
    strategy.start(grid, ArrayRecord(get_peft_model_state_dict(model)), num_rounds=3)
    assert strategy.state.server_round == 3
    messages = [m.content for m in grid.sent if m.metadata.dst_node_id == 1]
    last = RecordDict({"arrays": strategy.state.arrays()})
    strategy._with_residual([Message(last, 1, "train")])
    return base, strategy, [*messages, last]


def test_a_client_that_missed_rounds_has_the_same_base(federation):
    base, _, messages = federation
    always, late, twice = (live_model(base) for _ in range(3))
    untouched = base_weights(always)
    for content in messages:
        load(always, content)
    load(late, messages[-1])
    for content in (messages[3], messages[1], messages[3], messages[3]):  # back and forth
        load(twice, content)
    same = base_weights(always)
    for other in (late, twice):
        assert all(torch.equal(same[key], tensor) for key, tensor in base_weights(other).items())
        assert torch.equal(logits(always), logits(other))
    assert not all(torch.equal(same[key], tensor) for key, tensor in untouched.items())
    # the first message has no residual: the base is as it was loaded, bit for bit
    load(always, messages[0])
    assert all(torch.equal(untouched[k], tensor) for k, tensor in base_weights(always).items())


def test_the_base_plus_residual_plus_adapter_is_the_strategys_model(federation):
    base, strategy, messages = federation
    model = live_model(base)
    pretrained = base_weights(model)
    load(model, messages[-1])
    for module in strategy.state.adapter.modules:
        layer = model.get_base_model().get_submodule(module)
        start = pretrained[f"base_model.model.{module}.base_layer.weight"].double()
        wanted = strategy.state.to_model(strategy.method, "").effective(module)
        wanted = to_dense(wanted)
        assert wanted.norm() > 0.1
        live = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        torch.testing.assert_close(live - start, wanted, atol=1e-6, rtol=0)


def test_the_saved_model_is_exported_and_inspected(federation, tmp_path):
    base, strategy, messages = federation
    strategy.save(tmp_path / "model")
    model = live_model(base)
    load(model, messages[-1])
    for command in (
        ["inspect", str(tmp_path / "model")],
        [
            "export",
            str(tmp_path / "model"),
            "--out",
            str(tmp_path / "merged"),
            "--to",
            "merged",
            "--dtype",
            "float32",
        ],
    ):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=0)
    assert (logits(merged) - logits(live_model(base))).abs().max() > 0.1


def test_a_message_of_another_strategy_changes_nothing(federation):
    base, _, messages = federation
    model = live_model(base)
    before = logits(model)
    receipt = apply_base_residual(model, RecordDict({"arrays": messages[0]["arrays"]}))
    assert receipt == ConfigRecord({"sha256": digest(ArrayRecord())})
    assert torch.equal(logits(model), before)


def test_a_residual_that_does_not_fit_is_refused_before_anything_changes(federation):
    base, _, messages = federation
    model = live_model(base)
    load(model, messages[1])
    before = base_weights(model)
    good = {key: array.numpy() for key, array in messages[-1][RESIDUAL_KEY].items()}
    one = next(key for key in good if key.endswith(".B"))
    cases = {
        "is of no module that is adapted here": {**good, "lm_head.B": good[one]},
        "has no other factor": {k: v for k, v in good.items() if k != one},
        "holds NaN or Inf": {**good, one: good[one] * float("nan")},
        "wanted floating point": {**good, one: good[one][:-1]},
    }
    for reason, arrays in cases.items():
        record = to_record({key: torch.from_numpy(value) for key, value in arrays.items()})
        state = ConfigRecord({"round": 9, "sha256": digest(record)})
        with pytest.raises(PayloadError, match=reason):
            apply_base_residual(model, RecordDict({RESIDUAL_KEY: record, STATE_KEY: state}))
    # taken out or altered on the way
    for record in (ArrayRecord(), messages[1][RESIDUAL_KEY]):
        content = RecordDict({RESIDUAL_KEY: record, STATE_KEY: messages[-1][STATE_KEY]})
        with pytest.raises(PayloadError, match="not the one of which the message has the hash"):
            apply_base_residual(model, content)
    assert all(torch.equal(before[key], tensor) for key, tensor in base_weights(model).items())


def test_models_that_cannot_take_it_are_refused(federation):
    base, _, messages = federation
    with pytest.raises(AdapterError, match="wanted a PeftModel; got LlamaForCausalLM"):
        apply_base_residual(AutoModelForCausalLM.from_pretrained(base), messages[-1])
    model = live_model(base)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        apply_base_residual(model, messages[-1])
    model.unmerge_adapter()
    model.get_base_model().config._name_or_path = ""
    with pytest.raises(ModelError, match="as `base`"):
        apply_base_residual(model, messages[-1])
    apply_base_residual(model, messages[-1], base=base)


def test_a_bfloat16_base_is_not_rounded(federation):
    """The residual reaches the layers' outputs, which a sum in bfloat16 would lose most of."""
    base, strategy, messages = federation
    for held in ("float32", "as-loaded"):
        model = live_model(base, torch.bfloat16)
        apply_base_residual(model, messages[-1], adapted_weights=held)
        module = "model.layers.0.self_attn.q_proj"
        residual = strategy.state.residual[module]
        layer = model.get_base_model().get_submodule(module).base_layer
        x = torch.eye(32, dtype=torch.bfloat16)
        plain = live_model(base, torch.bfloat16).get_base_model().get_submodule(module).base_layer
        added = (layer(x).double() - plain(x).double()).mT
        dense = to_dense(residual).double()
        assert (added - dense).norm() < 0.2 * dense.norm()
