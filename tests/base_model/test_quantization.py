"""Quantized bases: loaded as what they are, computing right, and the same for all parties or refused."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedmomentum.base_model.as_loaded import AsLoadedWeights
from fedmomentum.base_model.base_weights import choose_weight_format, make_base_weights
from fedmomentum.base_model.identity import BaseIdentity, identify
from fedmomentum.base_model.loading import load_base
from fedmomentum.base_model.quantization import ON_LOADING
from fedmomentum.base_model.weight_slots import find_owners
from fedmomentum.client.loaded_base import LoadedBase
from fedmomentum.config.schema import ModelConfig
from fedmomentum.errors import ModelError
from fedmomentum.formats.manifest import Base
from fedmomentum.global_model.model import version_of
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.peft_model import attach_adapter
from fedmomentum.utils.quantized import dequantize, num_parameters, quantized_layers
from tests.tiny import tiny_gpt2, tiny_llama

CPU = torch.device("cpu")
KINDS = sorted(ON_LOADING)
UP_PROJ = "model.layers.0.mlp.up_proj"
# What rounding to 4 or 8 bits leaves of a normal weight; a wrong weight is 1.4 away.
ERRORS = {"nf4": 0.12, "int8": 0.012, "torchao-int8": 0.012}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("quantization") / "base", width=64)


def load(folder, kind, dtype=torch.float32, **arguments):
    return load_base(folder, dtype, CPU, quantization=ON_LOADING.get(kind), **arguments)


def saved(folder, kind, path):
    """A directory that stock transformers has quantized and written."""
    model = load(folder, kind)
    model.save_pretrained(path)
    for file in folder.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


# ── loading ──


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stand_for_the_stored_ones_whatever_dtype_they_compute_in(folder, kind, dtype):
    stored = load_file(folder / "model.safetensors")
    model = load(folder, kind, dtype)
    layers = dict(quantized_layers(model))
    in_float32 = load(folder, kind)
    # Embeddings and head stay as they are; all linear layers of the decoder are quantized.
    assert len(layers) == 14 and "lm_head" not in layers
    assert model.dtype == model.lm_head.weight.dtype == dtype
    for path, layer in layers.items():
        exact = stored[f"{path}.weight"]
        weight = dequantize(layer)
        assert weight.dtype == torch.float32 and weight.shape == exact.shape
        assert (weight - exact).norm() < ERRORS[kind] * exact.norm()
        # Not the dtype of the computation, but that of the checkpoint decides the codes.
        assert torch.equal(weight, dequantize(in_float32.get_submodule(path)))
        inputs = torch.randn(5, exact.shape[1], generator=torch.Generator().manual_seed(1))
        wanted = inputs @ weight.T
        model.train()
        got = layer(inputs.to(dtype))
        assert got.dtype == dtype
        assert (got - wanted).norm() < 8 * torch.finfo(dtype).eps * wanted.norm()
    assert num_parameters(model) == num_parameters(load_base(folder, dtype, CPU))


def test_dequantized_weights_are_bitsandbytes_own(folder):
    four = load(folder, "nf4").get_submodule(UP_PROJ)
    own = bitsandbytes.functional.dequantize_4bit(four.weight.data, four.weight.quant_state)
    assert torch.equal(dequantize(four), own)
    eight = load(folder, "int8").get_submodule(UP_PROJ)
    own = bitsandbytes.functional.int8_vectorwise_dequant(eight.weight.data, eight.state.SCB)
    assert torch.equal(dequantize(eight), own)


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_is_quantized_already_loads_as_it_is(folder, tmp_path, kind):
    path = saved(folder, kind, tmp_path / kind)
    quantized = dict(quantized_layers(load(folder, kind)))
    model = load_base(path, torch.bfloat16, CPU)
    stored = dict(quantized_layers(model))
    others = [p for p in model.parameters() if p.ndim == 1 or p.shape[0] == 100]
    assert len(others) == 7 and all(parameter.dtype == torch.bfloat16 for parameter in others)
    assert quantized.keys() == stored.keys()
    for module in quantized:
        assert torch.equal(dequantize(quantized[module]), dequantize(stored[module]))
    # Its hash is of the codes; how they were computed need not be stored.
    assert identify("base", path).sha256 != identify("base", folder).sha256
    with pytest.raises(
        ModelError, match=rf"quantized already \({kind}\).*leave model.quantization"
    ):
        load(path, kind)


def test_transposed_weights_are_quantized_by_bitsandbytes_only(tmp_path):
    """GPT-2 stores `(in, out)`; bitsandbytes turns it, torchao does not know such layers."""
    folder = tiny_gpt2(tmp_path / "gpt2")
    stored = load_file(folder / "model.safetensors")
    for kind in ("nf4", "int8"):
        # Its products with 32 inputs are no whole blocks of 64 weights.
        path, layer = list(quantized_layers(load(folder, kind)))[-1]
        assert path.endswith("mlp.c_proj")
        exact = stored[f"{path}.weight"].T
        assert (dequantize(layer) - exact).norm() < ERRORS[kind] * exact.norm()
    with pytest.raises(ModelError, match="no linear layers that can be quantized"):
        load(folder, "torchao-int8")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_in_full_is_not_quantized(folder, kind):
    model = load(folder, kind, trained=["layers.1.mlp"])
    quantized = {path for path, _ in quantized_layers(model)}
    assert len(quantized) == 11 and not any("layers.1.mlp" in path for path in quantized)
    classifier = load(folder, kind, labels=("a", "b"))
    quantized = {path for path, _ in quantized_layers(classifier)}
    assert len(quantized) == 14 and "score" not in quantized


# ── computing ──


def gradients(model):
    """The adapter's gradients of one backward pass."""
    model.zero_grad()
    tokens = torch.arange(40).reshape(4, 10) + 5
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert grads
    return grads


def with_adapter(base):
    """The model with an adapter that adds something already."""
    model = attach_adapter(base, rank=3, lora_alpha=7.0, target_modules="all-linear", seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.02
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_weights_are_the_same_before_and_after_an_evaluation(folder, kind, dtype):
    """On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in an evaluation; the loss does not show it."""
    model = with_adapter(load(folder, kind, dtype))
    weights = {path: dequantize(layer) for path, layer in quantized_layers(model)}
    before = gradients(model)
    # Loading evaluates a model, too: so compare with one that has such weights, unquantized.
    plain = load_base(folder, dtype, CPU)
    with torch.no_grad():
        for path, layer in quantized_layers(load(folder, kind)):
            plain.get_submodule(path).weight.copy_(dequantize(layer))
    for name, wanted in gradients(with_adapter(plain)).items():
        error = (before[name].double() - wanted.double()).norm() / wanted.double().norm()
        assert error < {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype], name
    model.eval()
    with torch.no_grad():
        for length in (1, 7):
            model(input_ids=torch.arange(length)[None] + 5)
    after = gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for path, layer in quantized_layers(model):
        assert torch.equal(weights[path], dequantize(layer))


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_computes_what_training_does_whatever_shares_the_batch(folder, kind):
    """LLM.int8() rounds inputs, by what is large in any row; here the last row would decide for the first."""
    model = load(folder, kind)
    layer = model.get_submodule(UP_PROJ)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    inputs[2, 7] = 50.0
    with torch.no_grad():
        together = layer.eval()(inputs)
        assert torch.allclose(together, layer.train()(inputs), atol=1e-5)
        assert torch.allclose(together[:1], layer.eval()(inputs[:1]), atol=1e-5)
        assert torch.allclose(together, inputs @ dequantize(layer).T, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_share_codes_and_scales_and_compute_the_same(folder, kind):
    config = ModelConfig(str(folder), dtype="float32", device="cpu", quantization=kind)
    loaded = LoadedBase.from_config(config)
    first = loaded.copy()
    second = loaded.copy()
    tokens = torch.arange(9)[None] + 5
    with torch.no_grad():
        logits = [model(input_ids=tokens).logits for model in (first, second, loaded.model)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    for (_, one), (_, other) in zip(quantized_layers(first), quantized_layers(second), strict=True):
        assert one is not other
        if kind == "torchao-int8":
            assert one.weight is other.weight
        else:
            assert one.weight.data_ptr() == other.weight.data_ptr()
        if kind == "nf4":
            assert one.weight.quant_state is other.weight.quant_state is one.quant_state
        if kind == "int8":
            assert one.state.CB.data_ptr() == other.state.CB.data_ptr()
            assert one.state.SCB is other.state.SCB


@dataclass
class Part:
    """What one round merges."""

    name: str
    matrices: dict[str, LowRank]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_small_residuals_arrive_in_the_forward(folder, kind, dtype):
    """Each is 3e-4 of the weight, a fraction of the step between two codes."""
    model = load(folder, kind, dtype)
    layers = find_owners(model, ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
    weights = make_base_weights(
        layers, folder, weight_format=choose_weight_format("auto", model), model=model
    )
    assert isinstance(weights, AsLoadedWeights)
    generator = torch.Generator().manual_seed(7)
    parts = []
    for index in range(50):
        matrices = {}
        for module in layers:
            pretrained = weights.pretrained(module)
            assert torch.equal(pretrained, dequantize(layers[module]))
            B = torch.randn(pretrained.shape[0], 6, generator=generator)
            A = torch.randn(6, pretrained.shape[1], generator=generator)
            matrices[module] = LowRank(B * (3e-4 * pretrained.norm() / (B @ A).norm()), A)
        parts.append(Part(f"{index:064x}", matrices))
    weights.apply(parts)
    got = []
    wanted = []
    for module in layers:
        total = sum(part.matrices[module].dense().double() for part in parts)
        X = torch.randn(total.shape[1], 8, generator=generator)
        inputs = weights.inputs(module, X)
        before = weights.pretrained_outputs({module: inputs})[module].double()
        got.append((weights.outputs(module, inputs).double() - before).flatten())
        wanted.append((total @ inputs.double()).flatten())
        # What the whole layer gives is this, rounded to the dtype of its outputs.
        after = layers[module](inputs.T).double()
        exact = (before + total @ inputs.double()).T
        assert (after - exact).norm() < 4 * torch.finfo(
            dtype
        ).eps * exact.norm() + 1e-4 * exact.norm()
    got, wanted = torch.cat(got), torch.cat(wanted)
    assert float(got @ wanted / (wanted @ wanted)) == pytest.approx(1, abs=0.01)
    # Applied one by one they are the same bits, and nothing is left of them when they are removed.
    outputs = weights.outputs(module, inputs)
    weights.reset()
    for count in (1, 20, 50):
        weights.apply(parts[:count])
    assert torch.equal(weights.outputs(module, inputs), outputs)
    weights.reset()
    assert torch.equal(weights.pretrained(module), dequantize(layers[module]))


# ── identity ──


def test_parties_with_other_quantizations_never_agree(folder):
    plain = identify("base", folder)
    identities = {kind: replace(plain, quantization=q) for kind, q in ON_LOADING.items()}
    identities["none"] = plain
    for kind, one in identities.items():
        for other_kind, other in identities.items():
            if kind == other_kind:
                one.check(other)
                continue
            with pytest.raises(ModelError, match="quantized differently .*model.quantization"):
                one.check(other)
    versions = {version_of(identity, []) for identity in identities.values()}
    assert len(versions) == len(identities)
    # Of a base that is not quantized, the version is what it was before there were any.
    assert identities["none"].record().keys() == {
        "name",
        "revision",
        "sha256",
        "tokenizer_sha256",
        "labels",
    }


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_a_manifest_keeps_the_quantization(folder, kind):
    import msgspec

    identity = identify("base", folder, quantization=ON_LOADING.get(kind))
    text = json.dumps(identity.record())
    assert BaseIdentity.of(msgspec.json.decode(text, type=Base)) == identity
    if kind == "none":
        return
    wrong = json.loads(text)
    wrong["quantization"]["kind"] = "nf3"
    with pytest.raises(msgspec.ValidationError, match="nf3"):
        msgspec.json.decode(json.dumps(wrong), type=Base)


# ── refusals ──


def change_settings(folder: Path, **changes) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"bnb_4bit_quant_storage": "bfloat16"},
        {"bnb_4bit_quant_type": "int2"},
        {"load_in_8bit": True},
        {"quant_method": "hqq"},
    ],
)
def test_other_settings_of_a_quantized_directory_are_refused(folder, tmp_path, changes):
    path = saved(folder, "nf4", tmp_path / "nf4")
    load_base(path, torch.float32, CPU)
    change_settings(path, **changes)
    with pytest.raises(ModelError, match="in a way that is not supported; supported are"):
        load_base(path, torch.float32, CPU)


def test_other_weights_of_torchao_are_refused(folder, tmp_path):
    path = saved(folder, "torchao-int8", tmp_path / "torchao")
    dynamic = {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {}}}
    change_settings(path, quant_type=dynamic)
    with pytest.raises(ModelError, match=r"torchao\) in a way that is not supported"):
        load_base(path, torch.float32, CPU)


def test_rows_that_are_not_full_blocks_stay_as_they_are_or_are_refused(tmp_path):
    """On a CPU, bitsandbytes 0.50.2 dequantizes blocks that two rows share to weights that are 30 % off."""
    narrow = tiny_llama(tmp_path / "narrow")
    quantized = {path for path, _ in quantized_layers(load(narrow, "nf4"))}
    assert quantized == {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)}
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        narrow, quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "nf4")
    with pytest.raises(ModelError, match="q_proj of .* has rows of 32 weights in blocks of 64"):
        load_base(tmp_path / "nf4", torch.float32, CPU)


def test_fp4_directories_load_too(folder, tmp_path):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "fp4")
    stored = load_base(tmp_path / "fp4", torch.float32, CPU).get_submodule(UP_PROJ)
    assert torch.equal(dequantize(stored), dequantize(model.get_submodule(UP_PROJ)))


@pytest.mark.parametrize(
    ("kind", "library"), [("nf4", "bitsandbytes"), ("torchao-int8", "torchao")]
)
def test_a_missing_library_names_the_extra(folder, monkeypatch, kind, library):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "fedmomentum.base_model.quantization.find_spec",
        lambda name: None if name == library else real(name),
    )
    wanted = rf"^{kind} weights need {library}: pip install 'fedmomentum\[quantization\]'$"
    with pytest.raises(ModelError, match=wanted):
        load(folder, kind)


def test_a_device_without_the_quantization_is_refused_by_name(folder):
    with pytest.raises(ModelError, match="bitsandbytes cannot compute with nf4 weights on meta"):
        load_base(folder, torch.float32, torch.device("meta"), quantization=ON_LOADING["nf4"])


def test_importing_bitsandbytes_fetches_no_code(tmp_path):
    """With `kernels` installed, its import asks the model hub for a compiled extension, and prints advice."""
    (tmp_path / "kernels.py").write_text(
        "def get_kernel(*names, **_):\n    print('ASKED FOR', *names)\n    raise OSError\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from fedmomentum.utils.quantized import import_bitsandbytes\n"
        "import_bitsandbytes()\n"
        "import bitsandbytes, kernels\n"
        "print('DONE', kernels.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "ASKED FOR" not in done.stdout and str(tmp_path) in done.stdout
    assert not done.stderr
