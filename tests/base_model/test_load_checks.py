"""What is held is what was loaded, and what was loaded is what the directory stores: everything else is refused."""

import json
import os
import pty
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaForSequenceClassification,
    LlamaModel,
)

from fedmomentum.base_model.checkpoint_files import checkpoint_files
from fedmomentum.base_model.identity import identify
from fedmomentum.base_model.load_checks import check_token_ids, max_positions, vocabulary_size
from fedmomentum.base_model.loading import load_base, load_tokenizer
from fedmomentum.base_model.weights import Float32Weights
from fedmomentum.errors import ConfigError, FedMomentumError, ModelError
from tests.runs import prepare, tiny_config
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

CPU = torch.device("cpu")
MODULE = "model.layers.0.self_attn.q_proj"
WEIGHT = f"{MODULE}.weight"


@pytest.fixture
def base(tmp_path):
    return tiny_llama(tmp_path / "base")


def load(folder, dtype=torch.float32):
    return load_base(folder, dtype, CPU)


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


# ── models that transformers loads, with other weights than the directory's ──


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_what_is_stored(base, dtype):
    model = load(base, dtype)
    stored = load_file(base / "model.safetensors")
    assert all(
        torch.equal(tensor, stored[name].to(dtype)) for name, tensor in model.state_dict().items()
    )
    held = Float32Weights({MODULE: model.get_submodule(MODULE)}, base)
    assert (
        torch.equal(held.weight(MODULE), stored[WEIGHT])
        and held.weight(MODULE).dtype == torch.float32
    )


def test_weights_that_are_incomplete_or_were_never_pulled_are_refused_with_what_to_do(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelError, match="model.safetensors.*incomplete: copy or download it"):
        identify("base", base)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="model.safetensors.*run `git lfs pull`"):
        identify("base", base)


def test_a_missing_weight_is_refused_by_name(base):
    change_tensors(base, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(
        ModelError,
        match=rf"does not hold {WEIGHT}, which LlamaForCausalLM needs and would initialize at random",
    ):
        load(base)


def test_a_weight_of_another_shape_is_refused_by_name(base):
    change_tensors(base, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(90, 32)}))
    with pytest.raises(
        ModelError, match=r"holds lm_head.weight of shape \(90, 32\); Llama.* needs \(100, 32\)"
    ):
        load(base)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (
            "model.layers.2.mlp.up_proj.weight",
            torch.zeros(64, 32),
        ),  # a layer that the configuration leaves out
        (f"{MODULE}.lora_A.weight", torch.zeros(2, 32)),  # an adapter that was not merged
        (f"{MODULE}.weight_scale", torch.ones(1)),
        (f"{MODULE}.bias", torch.ones(32)),
    ],
)
def test_a_stored_weight_that_has_no_place_is_refused_by_name(base, name, tensor):
    change_tensors(base, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(ModelError, match=rf"holds {name}, for which LlamaForCausalLM has no place"):
        load(base)


def test_models_of_another_kind_are_refused(base, tmp_path):
    """Their checkpoints load as language models, with random or meaningless heads."""
    causal = AutoModelForCausalLM.from_pretrained(base)
    config = causal.config
    config.pad_token_id = 0
    classifier = tmp_path / "classifier"
    LlamaForSequenceClassification(config).save_pretrained(classifier)
    with pytest.raises(ModelError, match=r"does not hold lm_head.weight"):
        load(classifier)
    config.tie_word_embeddings = True  # then no weight is missing: the embeddings serve as a head
    embedding = tmp_path / "embedding"
    LlamaModel(config).save_pretrained(embedding)
    with pytest.raises(
        ModelError, match="was saved as LlamaModel, which is no causal language model"
    ):
        load(embedding)
    change_config(embedding, architectures=["LlamaForCausalLM"])
    load(embedding)  # by all appearances a language model
    (embedding / "modules.json").write_text(
        json.dumps(
            [
                {"type": "sentence_transformers.models.Transformer"},
                {"type": "sentence_transformers.models.Pooling"},
            ]
        )
    )
    with pytest.raises(ModelError, match="is an embedding model"):
        load(embedding)


@pytest.mark.parametrize("architecture", [BertForMaskedLM, BertLMHeadModel])
def test_encoders_are_recognized_by_their_configuration_or_behavior_and_refused(
    tmp_path, architecture
):
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    architecture(config).save_pretrained(tmp_path)
    wanted = (
        "saved as BertForMaskedLM"
        if architecture is BertForMaskedLM
        else "a later token changes its logits"
    )
    with pytest.raises(ModelError, match=wanted):
        load(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
)
def test_quantized_bases_are_refused_by_name(base, settings):
    change_config(base, **settings)
    with pytest.raises(
        ModelError, match=r"is quantized \(.*(fp8|mxfp4|gptq|awq|compressed-tensors)\)"
    ):
        load(base)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float8_e4m3fn, "in F8_E4M3; quantized"),
        (torch.float8_e5m2, "in F8_E5M2; quantized"),
        (torch.int8, "in I8; wanted floating-point"),
    ],
)
def test_quantized_weights_without_a_quantization_config_are_refused_by_name(base, dtype, wanted):
    """Without a quantization_config transformers casts the codes to weights and leaves the scales out."""
    change_tensors(base, lambda tensors: tensors.update({WEIGHT: (tensors[WEIGHT] * 10).to(dtype)}))
    with pytest.raises(ModelError, match=rf"{WEIGHT} {wanted}"):
        load(base)


def test_weights_that_are_not_finite_are_refused(base):
    change_tensors(base, lambda tensors: tensors[WEIGHT].fill_(float("nan")))
    with pytest.raises(ModelError, match=f"weight of {MODULE} .*holds NaN or Inf"):
        held_weight(base)
    change_tensors(base, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    with pytest.raises(ModelError, match="computes NaN or Inf"):
        load(base)


def test_weights_too_large_for_the_dtype_are_refused(base):
    change_tensors(base, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    load(base)
    with pytest.raises(ModelError, match="computes NaN or Inf in float16"):
        load(base, torch.float16)


# ── files that transformers does not read ──


def sharded(base, folder):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def held_weight(folder):
    return Float32Weights({MODULE: load(folder).get_submodule(MODULE)}, folder).weight(MODULE)


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "model-00009-of-00009.safetensors",
        "zzz.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
    ],
)
def test_other_files_in_the_directory_are_not_taken_for_weights(base, tmp_path, name):
    other = tiny_llama(tmp_path / "other", seed=5)
    before = identify("x", base)
    wanted = load_file(base / "model.safetensors")[WEIGHT]
    shutil.copy(other / "model.safetensors", base / name)
    assert identify("x", base) == before
    assert torch.equal(held_weight(base), wanted)


def test_of_a_single_file_and_a_sharded_copy_the_one_that_is_loaded_counts(base, tmp_path):
    other = tiny_llama(tmp_path / "other", seed=5)
    both = sharded(other, tmp_path / "both")
    shutil.copy(base / "model.safetensors", both)
    assert checkpoint_files(both) == [both / "model.safetensors"]
    assert torch.equal(held_weight(both), load_file(base / "model.safetensors")[WEIGHT])
    assert identify("x", both).sha256 == identify("x", base).sha256


def test_shards_are_those_of_the_index(base, tmp_path):
    folder = sharded(base, tmp_path / "sharded")
    assert identify("x", folder).sha256 == identify("x", base).sha256
    assert torch.equal(held_weight(folder), load_file(base / "model.safetensors")[WEIGHT])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][WEIGHT]
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(ModelError, match=f"has no file '{file.name}'"):
        load(folder)
    file.write_bytes(content)
    another = next(name for name in index["weight_map"].values() if name != file.name)
    change_tensors(folder, lambda tensors: tensors.update({WEIGHT: torch.ones(32, 32)}), another)
    with pytest.raises(ModelError, match=rf"both hold {WEIGHT}"):
        load(folder)
    for broken in (
        "[]",
        "{",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../base/model.safetensors"}}',
    ):
        (folder / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(ModelError, match=r"index.json|base/model"):
            load(folder)


def test_the_file_that_the_configuration_names_is_the_one(base, tmp_path):
    other = tiny_llama(tmp_path / "other", seed=5)
    shutil.copy(other / "model.safetensors", base / "mine.safetensors")
    change_config(base, transformers_weights="mine.safetensors")
    assert torch.equal(held_weight(base), load_file(other / "model.safetensors")[WEIGHT])
    assert identify("x", base).sha256 == identify("x", other).sha256


def test_directories_that_hold_more_than_a_model_are_refused(base):
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load(base)
    (base / "adapter_config.json").unlink()
    (base / "shard-00000-model-00001-of-00001.safetensors").touch()
    with pytest.raises(ModelError, match="is a distributed checkpoint"):
        load(base)


def test_a_live_weight_that_is_not_the_stored_one_is_refused_by_name(base):
    """Whatever the reason: a name found in the wrong place, a conversion on loading, a directory that changed."""
    for change in (lambda w: w.add_(1e-3), lambda w: w.copy_(w.clone().mT)):
        model = load(base)
        with torch.no_grad():
            change(model.get_submodule(MODULE).weight)
        with pytest.raises(
            ModelError, match=rf"{MODULE}: transformers loads another weight than {WEIGHT}"
        ):
            Float32Weights({MODULE: model.get_submodule(MODULE)}, base)


def test_an_identity_is_recomputed_where_the_cache_is_damaged_or_stale(base, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOMENTUM_CACHE", str(tmp_path / "cache"))
    identity = identify("x", base)
    (cached,) = (tmp_path / "cache" / "identities").iterdir()
    for damage in (b"", b"{}", b"\xff", b'{"sha256": 3}', b'{"sha256": "abc"}'):
        cached.write_bytes(damage)
        assert identify("x", base) == identity
    file = base / "model.safetensors"
    status = file.stat()
    change_tensors(base, lambda tensors: tensors[WEIGHT].zero_())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size and time
    assert file.stat().st_size == status.st_size and identify("x", base).sha256 != identity.sha256


# ── remote code ──


def with_code(folder, marker):
    """A directory whose model and tokenizer need custom code, which leaves a trace when it is run."""
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    change_config(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    return folder


def test_code_in_the_directory_is_never_run_nor_asked_about(base, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    marker = tmp_path / "it ran"
    with pytest.raises(
        ModelError, match="needs code from its directory .auto_map., which is never run"
    ):
        load(with_code(base, marker))
    file = base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings |= {
        "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]},
        "tokenizer_class": "OwnTokenizer",
    }
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="needs code from its directory"):
        load_tokenizer(base)
    assert not marker.exists()


def test_a_plan_on_a_terminal_asks_nothing_and_runs_nothing(tmp_path):
    """The answer y is waiting on the terminal; nothing reads it."""
    config = tiny_config(tmp_path)
    marker = tmp_path / "it ran"
    with_code(tmp_path / "base", marker)
    from fedmomentum.config.toml import to_toml

    (tmp_path / "job.toml").write_text(to_toml(config))
    command = [
        sys.executable,
        "-m",
        "fedmomentum",
        "run",
        str(tmp_path / "job.toml"),
        "--plan",
        "--out",
        str(tmp_path / "out"),
    ]
    process, terminal = pty.fork()
    if process == 0:
        os.execv(sys.executable, command)
    os.write(terminal, b"y\ny\n")
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # the end of a terminal
        pass
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 2, shown
    text = b" ".join(shown.split())
    assert b"which is never run" in text and b"[y/N]" not in text and b"Traceback" not in text
    assert not marker.exists()


def test_transformers_own_class_is_used_where_there_is_one(base, tmp_path):
    """Many published models keep the code of their first release beside the weights; it is neither needed nor run."""
    marker = tmp_path / "it ran"
    (base / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    change_config(base, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    assert type(load(base)).__module__.startswith("transformers.") and not marker.exists()


# ── what else can go wrong while loading ──


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (MemoryError(), "out of memory.*smaller model"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "out of memory.*Tried to allocate",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            "out of memory",
        ),
        (
            ImportError("\nThis needs the sentencepiece library\nInstall it"),
            "library is missing: This needs the senten",
        ),
        (AttributeError("'str' object has no attribute 'x'"), "no attribute 'x'"),
    ],
)
def test_out_of_memory_and_missing_libraries_end_with_a_message(base, monkeypatch, error, wanted):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=f"cannot load a model from .*{wanted}"):
        load(base)
    monkeypatch.undo()
    model = load(base)
    monkeypatch.setattr(torch, "empty_like", fail)
    if isinstance(error, (MemoryError, RuntimeError)):
        with pytest.raises(ModelError, match="do not fit in float32: out of memory"):
            Float32Weights({MODULE: model.get_submodule(MODULE)}, base)


def test_a_device_without_memory_for_what_a_streamed_model_keeps_there_is_named(base, monkeypatch):
    """Its buffers are moved when it is loaded, although its parameters stay in their files."""
    moved = torch.Tensor.to

    def fail(tensor, *args, **kwargs):
        if kwargs.get("device") == torch.device("cpu"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
        return moved(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", fail)
    with pytest.raises(ModelError, match="does not fit on cpu: out of memory.*Tried to allocate"):
        load_base(base, None, torch.device("cpu"))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"{}", b'{"hidden_size": "many"}', b"[" * 100_000]
)
def test_damaged_files_end_with_a_message(base, name, content):
    (base / name).write_bytes(content)
    try:
        load(base), load_tokenizer(base)
    except ModelError as error:
        assert str(base) in str(error) and "\n" not in str(error)
    else:
        assert name == "tokenizer_config.json" and content == b"{}" or name == "tokenizer.json"


# ── tokens and positions ──


def test_a_pad_token_beyond_the_vocabulary_is_replaced_and_trains_the_same(tmp_path):
    """Padding is masked, so that any token that the model can embed gives the same numbers."""
    losses = []
    for folder in (tmp_path / "good", tmp_path / "beyond"):
        folder.mkdir()
        config = tiny_config(folder)
        if folder.name == "beyond":
            tokenizer = tiny_tokenizer()
            tokenizer.add_special_tokens({"pad_token": "<a new one>"})
            assert tokenizer.pad_token_id == 100
            tokenizer.save_pretrained(folder / "base")
            assert load_tokenizer(folder / "base").pad_token_id == 100
            assert (
                load_tokenizer(folder / "base", 100).pad_token_id
                == load_tokenizer(folder / "base").eos_token_id
            )
        from tests.runs import start

        run = start(config, folder / "out", function=None)
        losses.append(
            [(row.train_loss, row.evaluation.total.loss) for row in run.directory.records[1:]]
        )
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_tokens_that_the_model_cannot_embed_are_refused_by_name(tmp_path):
    config = tiny_config(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["cd"])
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(
        ModelError, match=r"site0: the tokenizer gives token 100, and the model embeds 100 tokens"
    ):
        prepare(config, tmp_path / "out")
    model = load(tmp_path / "base")
    check_token_ids(model, [[0, 99], []], "x")
    assert vocabulary_size(model) == 100


def test_rows_beyond_the_table_of_positions_are_refused_by_name(tmp_path):
    tiny_gpt2(tmp_path / "base")
    assert max_positions(load(tmp_path / "base")) == (256, True)
    lora = {"target-modules": ["c_attn"]}
    with pytest.raises(
        ConfigError, match="data.max-length is 257, and the model has 256 positions"
    ):
        prepare(tiny_config(tmp_path, data={"max_length": 257}, lora=lora), tmp_path / "out")
    prepare(tiny_config(tmp_path, data={"max_length": 256}, lora=lora), tmp_path / "out").close()


def test_rows_longer_than_rotary_positions_are_reported_in_the_plan(tmp_path):
    config = tiny_config(tmp_path, data={"max_length": 512})
    assert max_positions(load(tmp_path / "base")) == (256, False)
    run = prepare(config, tmp_path / "out")
    run.close()
    assert not any("tokens and the model was made for" in warning for warning in run.plan.warnings)
    change_config(tmp_path / "base", max_position_embeddings=16)
    run = prepare(config, tmp_path / "short")
    run.close()
    longest = max(len(ids) for client in run.clients for ids in client.train.input_ids)
    assert any(
        f"has {longest} tokens and the model was made for 16" in warning
        for warning in run.plan.warnings
    )


def test_model_and_config_errors_are_user_errors():
    assert issubclass(ModelError, FedMomentumError) and issubclass(ConfigError, FedMomentumError)
