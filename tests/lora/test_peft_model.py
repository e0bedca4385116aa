"""What is adapted and what is trained in full: names that match, precision, and whole runs with saved modules."""

import pytest
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM

from fedmomentum.base_model.loading import load_base
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.errors import AdapterError, ConfigError, ModelError
from fedmomentum.evaluation.teacher_forcing import evaluate
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.lora.peft_model import attach_adapter, copy_adapter, detach_adapter
from fedmomentum.run.inference import LoadSettings, ModelPair
from fedmomentum.run.saved_model import open_result
from tests.runs import prepare, start, tiny_config
from tests.tiny import tiny_gpt2, tiny_llama

CPU = torch.device("cpu")
IDS = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(3))


def attached(base, targets=("q_proj",), saved=(), dtype=torch.float32):
    return attach_adapter(
        load_base(base, dtype, CPU),
        rank=2,
        lora_alpha=4,
        target_modules=targets,
        modules_to_save=saved,
    )


# ── names ──


@pytest.mark.parametrize(
    ("targets", "saved", "message"),
    [
        (
            ["q_proj", "v_porj"],
            [],
            "target-modules: v_porj is no linear module of Llama.*; did you mean v_proj",
        ),
        (
            ["q_proj", "c_attn"],
            [],
            "target-modules: c_attn is no linear module of LlamaForCausalLM",
        ),
        (["q_proj", "all-linear"], [], "target-modules: all-linear is no linear module"),
        (["q_proj", ""], [], "target-modules:  is no linear module"),
        (
            ["q_proj", "layers.2.mlp.up_proj"],
            [],
            "layers.2.mlp.up_proj is no .* did you mean layers.1.mlp.up_proj",
        ),
        (
            ["q_proj"],
            ["lm_head", "embed_token"],
            "embed_token is no module .* did you mean embed_tokens",
        ),
        (["q_proj"], ["head"], "modules-to-save: head is no module"),
        (
            ["q_proj"],
            ["norm"],
            "norm also ends the name of model.layers.0.input_layernorm, which PEFT would train too",
        ),
        (["q_proj"], ["act_fn"], "modules-to-save: model.layers.0.mlp.act_fn has no parameters"),
        (
            ["q_proj"],
            ["mlp", "up_proj"],
            "modules-to-save: .*up_proj is a part of model.layers.0.mlp, which is saved",
        ),
        (["q_proj", "lm_head"], ["lm_head"], "lm_head is in target-modules and in modules-to-save"),
        (["q_proj", "up_proj"], ["mlp"], "up_proj is in target-modules and in modules-to-save"),
        (["q_proj"], ["self_attn"], "q_proj is in target-modules and in modules-to-save"),
    ],
)
def test_every_name_must_match_modules_of_its_own(tmp_path, targets, saved, message):
    base = tiny_llama(tmp_path / "base")
    with pytest.raises(AdapterError, match=message):
        attached(base, targets, saved)


def test_full_paths_and_path_suffixes_are_names(tmp_path):
    base = tiny_llama(tmp_path / "base")
    model = attached(
        base, ["self_attn.q_proj", "model.layers.1.mlp.up_proj"], ["model.norm", "lm_head"]
    )
    adapter = copy_adapter(model)
    assert set(adapter.modules) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert set(adapter.saved) == {"model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"target-modules": ["q_proj", "v_porj"]},
            "lora.clients.site1: target-modules: v_porj is no linear module",
        ),
        ({"target-modules": ["nothing"]}, "lora.clients.site1: target-modules"),
        (
            {"target-modules": ["q_proj", "o_proj"]},
            "lora.clients.site1: .*adapt .*o_proj, which the run's lora.target-modules",
        ),
    ],
)
def test_a_clients_own_names_must_match_and_lie_within_the_runs(tmp_path, own, message):
    config = tiny_config(tmp_path, lora={"clients": {"site1": own}})
    with pytest.raises(ConfigError, match=message):
        prepare(config, tmp_path / "out")


class Router(nn.Linear):
    """A linear layer only by name: it returns more than its product."""

    def forward(self, x):
        return super().forward(x).softmax(-1)


def test_a_layer_that_computes_something_else_is_refused(tmp_path):
    base = tiny_llama(tmp_path / "base")
    model = load_base(base, torch.float32, CPU)
    layer = model.model.layers[0].self_attn.q_proj
    layer.__class__ = Router
    with pytest.raises(ModelError, match="q_proj is a Router, which computes something else"):
        Float32Weights({"model.layers.0.self_attn.q_proj": layer}, base)
    layer.__class__ = type("Plain", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.T})
    Float32Weights({"model.layers.0.self_attn.q_proj": layer}, base)


# ── precision ──


SAVED = ["lm_head", "embed_tokens", "model.norm", "model.layers.1.mlp", "o_proj"]


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_to_save_are_trained_in_float32_on_a_16_bit_base(tmp_path, saved, dtype):
    """A step of 1e-4 of a weight moves it by that much; in 16 bits most of it would be rounded away."""
    base = tiny_llama(tmp_path / "base")
    model = attached(base, saved=[saved], dtype=dtype)
    before = copy_adapter(model).saved
    assert before and all(tensor.dtype == torch.float32 for tensor in before.values())
    stored = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(
        torch.equal(tensor, stored[name].to(dtype).float()) for name, tensor in before.items()
    )
    logits = model(input_ids=IDS).logits
    assert logits.dtype == dtype
    logits.float().square().mean().backward()
    wanted = moved = 0.0
    trained = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert len(trained) == len(before)
    with torch.no_grad():
        for parameter in trained:
            assert parameter.requires_grad and parameter.grad.abs().max() > 0
            step = 1e-4 * parameter.abs().mean() * parameter.grad.sign()
            start_ = parameter.detach().clone()
            parameter -= step
            wanted += float(step.double().square().sum())
            moved += float(((start_ - parameter).double() * step.double()).sum())
            rounded = (start_ - (start_.to(dtype) - step.to(dtype)).float()).double()
            assert (
                float((rounded * step).sum()) < 0.9 * float(step.double().square().sum())
                or dtype == torch.float16
            )
    assert moved / wanted == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("saved", SAVED)
def test_a_16_bit_model_with_modules_in_float32_answers_as_before(tmp_path, saved):
    base = tiny_llama(tmp_path / "base")
    plain = load_base(base, torch.bfloat16, CPU)(input_ids=IDS).logits.float()
    answers = attached(base, saved=[saved], dtype=torch.bfloat16)(input_ids=IDS).logits.float()
    assert float((answers - plain).detach().norm() / plain.detach().norm()) < 0.01


def test_removing_an_adapter_restores_the_base(tmp_path):
    """PEFT leaves trained modules in place of the base's."""
    base = tiny_gpt2(tmp_path / "base")
    model = attached(base, ["c_attn"], ["lm_head", "ln_f"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    detached = detach_adapter(model)
    stock = AutoModelForCausalLM.from_pretrained(base)
    assert not any(isinstance(module, ModulesToSaveWrapper) for module in detached.modules())
    assert detached.lm_head.weight is detached.transformer.wte.weight
    assert all(
        torch.equal(tensor, stock.state_dict()[name])
        for name, tensor in detached.state_dict().items()
    )


# ── whole runs ──


def tied_base(folder, kind):
    folder.mkdir(exist_ok=True)
    if kind == "gpt2":
        return tiny_gpt2(folder / "base")
    tiny_llama(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder / "base")
    return folder / "base"


TIED = [
    ("llama", ["lm_head"]),
    ("llama", ["embed_tokens"]),
    ("llama", ["embed_tokens", "lm_head"]),
    ("gpt2", ["lm_head"]),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "saved"), TIED)
def test_a_run_on_tied_weights_is_the_same_model_wherever_it_is_used(tmp_path, kind, saved, dtype):
    """The run's own evaluation, both exports in stock libraries, and `evaluate` give one loss."""
    base = tied_base(tmp_path, kind)
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    config = tiny_config(
        tmp_path,
        num_clients=2,
        lora={"target-modules": targets, "modules-to-save": saved},
        model={"dtype": dtype},
        training={"learning-rate": 0.003, "local-steps": 4},
        federation={"num-rounds": 2},
        evaluation={"final-num-examples": 1000},
    )
    run = start(config, tmp_path / "out", function=None)
    losses = [row.evaluation.total.loss for row in run.directory.records]
    assert losses[-1] < 0.95 * losses[0]
    model = GlobalModel.load(tmp_path / "out")
    assert all(tensor.dtype == torch.float32 for tensor in model.adapter.saved.values())

    def loss(one):
        scores = [evaluate(one, client.test, pad_token_id=0).total for client in run.clients]
        return sum(score.nll for score in scores) / sum(score.num_tokens for score in scores)

    assert export_merged(model, tmp_path / "merged", base_directory=base) == pytest.approx(
        1, abs=1e-6
    )
    export_adapter(model, tmp_path / "adapter", base_directory=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert loss(merged) == pytest.approx(loss(adapter), rel=1e-5)
    assert loss(merged) == pytest.approx(losses[-1], rel=1e-5 if dtype == "float32" else 0.01)
    both = ModelPair(open_result(tmp_path / "out"), LoadSettings())
    with both.tuned():
        assert loss(both.model) == pytest.approx(losses[-1], rel=0.01)  # in the run's dtype
    assert loss(both.model) == pytest.approx(losses[0], rel=0.01)
    for (
        name,
        tensor,
    ) in model.adapter.saved.items():  # what was trained arrives whole, also from 16 bits
        assert torch.equal(merged.get_parameter(name), tensor)


def test_a_run_with_a_saved_head_resumes_to_the_same_bits(tmp_path):
    tied_base(tmp_path, "llama")
    lora = {"modules-to-save": ["lm_head"]}

    def config(rounds):
        return tiny_config(
            tmp_path,
            lora=lora,
            model={"dtype": "bfloat16"},
            num_clients=2,
            federation={"num-rounds": rounds},
        )

    start(config(1), tmp_path / "in two")
    start(config(2), tmp_path / "in two", resume=True)
    start(config(2), tmp_path / "at once")
    digests = {GlobalModel.load(tmp_path / name).adapter.digest() for name in ("in two", "at once")}
    assert len(digests) == 1
