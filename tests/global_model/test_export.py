"""Exports, evaluate and generate give the trained model's logits: tied weights, saved modules, added tokens, dtypes.

The wanted logits are stock PEFT's, of the adapter on its base, in every test.
"""

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fedmomentum import GlobalModel, aggregate_adapters, read_adapter
from fedmomentum.base_model.identity import identify
from fedmomentum.base_model.loading import load_base
from fedmomentum.errors import AdapterError, ModelError
from fedmomentum.global_model import export, model_files, readback
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.global_model.tuned_model import TunedModel
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(3))
NAMES = {
    "llama": {
        "targets": ["q_proj", "v_proj"],
        "embeddings": "embed_tokens",
        "head": "lm_head",
        "norm": "norm",
    },
    "gpt2": {"targets": ["c_attn"], "embeddings": "wte", "head": "lm_head", "norm": "ln_f"},
}


def make_base(kind, folder, tied):
    (tiny_llama if kind == "llama" else tiny_gpt2)(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model.config.tie_word_embeddings != tied:
        model.config.tie_word_embeddings = tied
        weight = model.get_input_embeddings().weight
        model.get_output_embeddings().weight = (
            weight if tied else torch.nn.Parameter(weight.detach() * 0.5)
        )
        model.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (
        reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight
    ) == tied
    return folder


def trained_adapter(base, folder, targets, saved, *, tokens=None, size=0.1, **saving):
    """An adapter made, changed and saved by stock PEFT, and its logits and those of the untouched base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        untouched = model(input_ids=IDS).logits
    torch.manual_seed(1)
    if tokens:
        model.resize_token_embeddings(tokens)
    model = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=saved or None)
    )
    torch.manual_seed(2)
    for name, tensor in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            tensor.data += size * torch.randn(tensor.shape)
    model.save_pretrained(folder, **saving)
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits, untouched


def global_model(base, adapters, *, merged=True):
    """The adapters' global model; several leave a residual, which is merged into the base."""
    result = aggregate_adapters(adapters, rank=2 if merged else 3)
    update = (StoredObject.of(result.residual),) if result.residual else ()
    return GlobalModel(
        base=identify(str(base), base), adapter=result.adapter, base_update=update, method="m"
    )


def logits(model, ids=IDS):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def distance(one, two):
    return float((one.detach() - two.detach()).norm() / two.detach().norm())


# ── tied weights and saved modules ──


@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "saved", [("head",), ("embeddings",), ("embeddings", "head"), ("norm",), ()], ids="+".join
)
def test_every_export_gives_the_trained_models_logits(tmp_path, kind, tied, saved):
    names = NAMES[kind]
    base = make_base(kind, tmp_path / "base", tied)
    modules = [names[part] for part in saved]
    wanted, untouched = trained_adapter(base, tmp_path / "stock", names["targets"], modules)
    assert distance(untouched, wanted) > 0.05
    model = global_model(base, [read_adapter(tmp_path / "stock")])
    assert model.base_update  # rank 3 at rank 2: a part of the change is merged
    assert export_merged(model, tmp_path / "merged", base_directory=base) == pytest.approx(
        1, abs=1e-6
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), wanted) < 1e-5
    is_apart = bool({"head", "embeddings"} & set(saved))
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.tie_word_embeddings == (tied and not is_apart)

    export_adapter(model, tmp_path / "adapter", base_directory=base)
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert distance(logits(adapter), wanted) < 1e-5

    live = load_base(base, torch.float32, CPU)
    tuned = TunedModel(live, base, model)
    for _ in range(2):
        assert distance(logits(live), untouched) < 1e-6
        with tuned.applied():
            assert distance(logits(live), wanted) < 1e-5
    assert (live.get_input_embeddings().weight is live.get_output_embeddings().weight) == tied
    assert torch.equal(logits(live), logits(AutoModelForCausalLM.from_pretrained(base)))


def test_an_adapted_head_that_is_tied_is_merged_into_the_head_alone(tmp_path):
    """Foreign adapters may adapt it; the checkpoint stores the embeddings for both."""
    base = make_base("llama", tmp_path / "base", True)
    # PEFT saves a copy of the base's embeddings beside such an adapter unless that is switched off
    wanted, untouched = trained_adapter(
        base, tmp_path / "stock", ["q_proj", "lm_head"], (), save_embedding_layers=False
    )
    model = global_model(base, [read_adapter(tmp_path / "stock")])
    export_merged(model, tmp_path / "merged", base_directory=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), wanted) < 1e-5 < distance(untouched, wanted)
    assert torch.equal(
        merged.get_input_embeddings().weight,
        AutoModelForCausalLM.from_pretrained(base).model.embed_tokens.weight,
    )
    export_adapter(model, tmp_path / "adapter", base_directory=base)
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    assert distance(logits(adapter), wanted) < 1e-5


def test_a_base_that_says_tied_and_stores_two_weights_stays_apart(tmp_path):
    """transformers then ties nothing; what is exported must not be tied either."""
    base = make_base("llama", tmp_path / "base", False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    wanted, _ = trained_adapter(base, tmp_path / "stock", ["q_proj"], ())
    export_merged(
        global_model(base, [read_adapter(tmp_path / "stock")]),
        tmp_path / "merged",
        base_directory=base,
    )
    assert (
        distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted) < 1e-5
    )


def test_adapters_of_several_clients_with_saved_heads(tmp_path):
    base = make_base("llama", tmp_path / "base", True)
    for number in range(2):
        trained_adapter(
            base, tmp_path / str(number), ["q_proj"], ["lm_head"], size=0.1 * (number + 1)
        )
    adapters = [read_adapter(tmp_path / str(number)) for number in range(2)]
    model = global_model(base, adapters, merged=False)
    export_merged(model, tmp_path / "merged", base_directory=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    mean = (adapters[0].saved["lm_head.weight"] + adapters[1].saved["lm_head.weight"]) / 2
    assert torch.allclose(merged.lm_head.weight, mean, atol=1e-6)
    pristine = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(merged.model.embed_tokens.weight, pristine.model.embed_tokens.weight)


# ── 16 bits ──


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_on_disk_are_the_float32_weights_rounded(tmp_path, dtype):
    base = make_base("llama", tmp_path / "base", True)
    wanted, _ = trained_adapter(base, tmp_path / "stock", ["q_proj"], ["lm_head"])
    model = global_model(base, [read_adapter(tmp_path / "stock")])
    share = export_merged(model, tmp_path / "half", base_directory=base, dtype=dtype)
    assert 0.9 < share < 1.1 and share != 1
    export_merged(model, tmp_path / "whole", base_directory=base)
    half, full = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("half", "whole")
    )
    assert half.keys() == full.keys()
    for name, tensor in half.items():
        assert tensor.dtype == dtype and torch.equal(tensor, full[name].to(dtype)), name
    assert (
        distance(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)),
            wanted,
        )
        < 0.05
    )


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens", "norm", "model.layers.1.mlp"])
def test_on_a_16_bit_base_saved_modules_count_in_float32(tmp_path, saved):
    """As they are trained. The tuned model's answers are those of PEFT with the saved module in float32."""
    base = tiny_llama(tmp_path / "base")
    wanted, _ = trained_adapter(base, tmp_path / "stock", ["q_proj"], [saved])
    model = global_model(base, [read_adapter(tmp_path / "stock")])
    live = load_base(base, torch.bfloat16, CPU)
    before = logits(live)
    tuned = TunedModel(live, base, model)
    with tuned.applied():
        for name, tensor in model.adapter.saved.items():
            held = live.get_parameter(name)
            assert held.dtype == torch.float32 and torch.equal(held, tensor)
        answers = live(input_ids=IDS).logits
        assert answers.dtype == torch.bfloat16 and distance(answers.float(), wanted) < 0.05
    merged_logits = logits(live)
    assert {p.dtype for n, p in live.named_parameters() if "q_proj" not in n} == {torch.bfloat16}
    assert distance(merged_logits, before) < 0.01


# ── added tokens ──


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [("embeddings", "head"), ()], ids="+".join)
def test_adapters_trained_after_adding_tokens(tmp_path, kind, tied, saved):
    """PEFT saves the embeddings of a resized model, in modules_to_save or not. The export has the tokens."""
    names = NAMES[kind]
    base = make_base(kind, tmp_path / "base", tied)
    modules = [names[part] for part in saved]
    wanted, untouched = trained_adapter(
        base, tmp_path / "stock", names["targets"], modules, tokens=104
    )
    assert wanted.shape[-1] == 104
    model = global_model(base, [read_adapter(tmp_path / "stock")])
    export_merged(model, tmp_path / "merged", base_directory=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 104 and distance(logits(merged), wanted) < 1e-5
    export_adapter(model, tmp_path / "adapter", base_directory=base)
    stock = AutoModelForCausalLM.from_pretrained(base)
    stock.resize_token_embeddings(104)
    assert distance(logits(PeftModel.from_pretrained(stock, tmp_path / "adapter")), wanted) < 1e-5
    live = load_base(base, torch.float32, CPU)
    tuned = TunedModel(live, base, model)
    new_tokens = torch.tensor([[5, 103, 7, 100]])
    with tuned.applied():
        assert distance(logits(live), wanted) < 1e-5 and live.config.vocab_size == 104
        assert distance(logits(live, new_tokens), logits(merged, new_tokens)) < 1e-5
    assert distance(logits(live), untouched) < 1e-6 and live.config.vocab_size == 100


def test_added_tokens_without_all_their_embeddings_are_refused(tmp_path):
    base = make_base("llama", tmp_path / "base", True)
    trained_adapter(base, tmp_path / "stock", ["q_proj"], ["embed_tokens", "lm_head"], tokens=104)
    adapter = read_adapter(tmp_path / "stock")
    del adapter.saved["lm_head.weight"]
    adapter.config["modules_to_save"] = ["embed_tokens"]
    model = global_model(base, [adapter])
    for write in (export_merged, export_adapter):
        with pytest.raises(
            AdapterError, match="trained after tokens were added .the base has 100.*lm_head: none"
        ):
            write(model, tmp_path / "out", base_directory=base)
    live = load_base(base, torch.float32, CPU)
    with pytest.raises(
        ModelError, match="104 embeddings and, without a head of its own, 100 outputs"
    ):
        TunedModel(live, base, model).apply()
    assert not (tmp_path / "out").exists()


# ── read back ──


@pytest.fixture
def trained(tmp_path):
    base = make_base("llama", tmp_path / "base", True)
    trained_adapter(base, tmp_path / "stock", ["q_proj"], ["lm_head"])
    return base, global_model(base, [read_adapter(tmp_path / "stock")])


def leftovers(folder):
    return {file.name for file in folder.iterdir()} - {"base", "stock"}


def test_a_merged_model_that_reads_back_as_another_is_refused(trained, tmp_path, monkeypatch):
    """As when the head is tied again, which is how tied models were once exported."""
    base, model = trained
    monkeypatch.setattr(
        "fedmomentum.global_model.tuned_model.record_untied_weights", lambda model: None
    )
    honest = model_files.save_model

    def one_tensor_for_both(live, base_directory, out, dtype):
        honest(live, base_directory, out, dtype)
        tensors = load_file(out / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(model_files, "save_model", one_tensor_for_both)
    with pytest.raises(
        ModelError, match=r"is not what was written: on 16 tokens its logits differ .* by 0\.\d+"
    ):
        export_merged(model, tmp_path / "out", base_directory=base)
    assert not leftovers(tmp_path)


def test_a_merge_that_is_another_model_is_refused_before_anything_is_written(
    trained, tmp_path, monkeypatch
):
    base, model = trained
    monkeypatch.setattr(
        TunedModel, "_set_vocabulary", lambda self: self.base.lm_head.weight.data.mul_(1.01)
    )
    with pytest.raises(
        ModelError, match="the merged model is another model than the run's: on 16 tokens"
    ):
        export_merged(model, tmp_path / "out", base_directory=base)
    assert not leftovers(tmp_path)


def test_an_adapter_that_reads_back_as_another_is_refused(trained, tmp_path, monkeypatch):
    base, model = trained
    honest = export.to_single_adapter

    def without_its_head(model):
        adapter = honest(model)
        return type(adapter)(
            adapter.modules, adapter.scalings, {}, {**adapter.config, "modules_to_save": None}, "x"
        )

    monkeypatch.setattr(export, "to_single_adapter", without_its_head)
    with pytest.raises(
        ModelError,
        match="the adapter, read back by PEFT, is another model: on 16 tokens its logits",
    ):
        export_adapter(model, tmp_path / "out", base_directory=base)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interrupted_export_leaves_nothing(trained, tmp_path, monkeypatch, interrupt):
    base, model = trained

    def stop(*_, **__):
        raise interrupt

    monkeypatch.setattr("fedmomentum.global_model.export.write_card", stop)
    for write in (export_merged, export_adapter):
        with pytest.raises((KeyboardInterrupt, OSError)):
            write(model, tmp_path / "out", base_directory=base)
        assert not leftovers(tmp_path)


@pytest.mark.parametrize("kind", ["empty", "mounted", "in a directory that is read only"])
def test_an_empty_directory_is_filled_whether_or_not_it_can_be_renamed(
    trained, tmp_path, monkeypatch, kind
):
    base, model = trained
    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    if kind == "mounted":
        monkeypatch.setattr(
            "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("busy"))
        )
    if kind.startswith("in"):
        monkeypatch.setattr("os.access", lambda path, mode: False)
    export_adapter(model, out, base_directory=base)
    monkeypatch.undo()
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert read_adapter(out).digest() == export.to_single_adapter(model).digest()


def test_files_that_appear_during_an_export_are_left_alone(trained, tmp_path, monkeypatch):
    base, model = trained
    monkeypatch.setattr(
        export,
        "write_card",
        lambda *_, **__: (tmp_path / "out").mkdir() or (tmp_path / "out" / "x").touch(),
    )
    with pytest.raises(ModelError, match="now holds x; nothing was exported"):
        export_adapter(model, tmp_path / "out", base_directory=base)
    assert leftovers(tmp_path) == {"out"} and [
        file.name for file in (tmp_path / "out").iterdir()
    ] == ["x"]


def test_the_tolerance_is_far_above_what_rounding_does_and_below_what_a_mistake_does(
    trained, tmp_path, monkeypatch
):
    base, model = trained
    seen = []
    honest = readback.check_logits
    monkeypatch.setattr(
        readback, "check_logits", lambda *args: seen.append((args[2], honest(*args)))
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        export_merged(model, tmp_path / str(dtype), base_directory=base, dtype=dtype)
    for dtype, difference in seen:
        assert difference < readback.TOLERANCES[dtype] / 5
    assert len(seen) == 9


def test_logits_that_are_not_finite_or_of_another_shape_are_refused():
    wanted = torch.ones(1, 2, 3)
    for got in (wanted * math.nan, wanted * math.inf, wanted[:, :1], wanted * 1.01):
        with pytest.raises(ModelError, match="^x: .*logits"):
            readback.check_logits(got, wanted, torch.float32, "x")
    assert readback.check_logits(wanted, wanted, torch.float32, "x") == 0


def test_files_beside_the_weights_are_copied(tmp_path):
    """The tokenizer, and generation settings that transformers reads but refuses to write."""
    base = make_base("llama", tmp_path / "base", True)
    (base / "generation_config.json").write_text(
        json.dumps({"temperature": 0.5, "do_sample": False, "top_k": 7})
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Model"}})
    )
    trained_adapter(base, tmp_path / "stock", ["q_proj"], ())
    model = global_model(base, [read_adapter(tmp_path / "stock")])
    export_merged(model, tmp_path / "merged", base_directory=base)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["top_k"] == 7
    assert "auto_map" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
        == tiny_tokenizer().get_vocab()
    )


def chat_base(folder):
    """A base whose generation settings stop elsewhere than the chat template ends an answer."""
    base = make_base("llama", folder, True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<unk>"
    tokenizer.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    return base


@pytest.mark.parametrize("has_settings", [False, True])
def test_an_export_stops_where_answers_to_chats_end(tmp_path, has_settings):
    base = chat_base(tmp_path / "base")
    file = base / "generation_config.json"
    file.unlink(missing_ok=True)
    if has_settings:
        file.write_text(json.dumps({"eos_token_id": [1, 7], "top_k": 7}))
    trained_adapter(base, tmp_path / "stock", ["q_proj"], ())
    model = global_model(base, [read_adapter(tmp_path / "stock")])
    export_merged(model, tmp_path / "merged", base_directory=base)
    export_adapter(model, tmp_path / "adapter", base_directory=base)
    (end,) = tiny_tokenizer()("<|im_end|>", add_special_tokens=False)["input_ids"]
    wanted = [1, 7, end] if has_settings else [1, end]
    settings = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert settings.eos_token_id == wanted
    assert not has_settings or settings.top_k == 7
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert "_from_model_config" not in written
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"model.generation_config.eos_token_id = {wanted}\n" in card


def test_a_base_that_stops_at_the_end_of_answers_keeps_its_settings(tmp_path):
    base = make_base("llama", tmp_path / "base", True)
    trained_adapter(base, tmp_path / "stock", ["q_proj"], ())
    model = global_model(base, [read_adapter(tmp_path / "stock")])
    export_merged(model, tmp_path / "merged", base_directory=base)
    export_adapter(model, tmp_path / "adapter", base_directory=base)
    before = AutoModelForCausalLM.from_pretrained(base).generation_config
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
    assert after.eos_token_id == before.eos_token_id
    assert "eos_token_id" not in (tmp_path / "adapter" / "README.md").read_text()


def test_a_module_that_is_adapted_and_saved_is_refused(tmp_path):
    base = make_base("llama", tmp_path / "base", False)
    trained_adapter(base, tmp_path / "stock", ["q_proj"], ["lm_head"])
    adapter = read_adapter(tmp_path / "stock")
    adapter.saved["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32)
    live = load_base(base, torch.float32, CPU)
    with pytest.raises(AdapterError, match="q_proj is both adapted and saved in full"):
        TunedModel(live, base, global_model(base, [adapter]))
    for tensor, wanted in (
        (torch.zeros(7, 32), r"is \(7, 32\); .* has \(32, 32\)"),
        (torch.full((32,), math.nan), "NaN"),
    ):
        adapter = read_adapter(tmp_path / "stock")
        adapter.saved[
            "model.norm.weight" if tensor.ndim == 1 else "model.layers.0.self_attn.o_proj.weight"
        ] = tensor
        with pytest.raises(AdapterError, match=wanted):
            TunedModel(load_base(base, torch.float32, CPU), base, global_model(base, [adapter]))
