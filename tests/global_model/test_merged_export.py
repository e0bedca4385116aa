"""A merged export reads and writes a weight at a time, and writes what a merge in memory would, bit by bit."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedmomentum import GlobalModel, LowRank
from fedmomentum.base_model.identity import identify
from fedmomentum.base_model.loading import load_base
from fedmomentum.base_model.streamed import StreamedTensor, is_streamed
from fedmomentum.base_model.streamed_weights import StreamedWeights
from fedmomentum.base_model.weight_slots import find_owners
from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.global_model import model_files
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.objects import StoredObject
from fedmomentum.global_model.tuned_model import TunedModel, record_untied_weights
from fedmomentum.lora.peft_model import attach_adapter, copy_adapter
from tests.families import FAMILIES, make_model, tokenizer
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
EVERY_TIME = ("deepseek_v4", "gemma3", "gpt2", "llama4", "mixtral")
"""Families with integer tensors, renamed or joined ones, scaled embeddings, transposed weights."""


def random_global_model(base, *, seed=0, size=0.05, **settings):
    """A global model with factored and dense merged parts and an adapter, of scaling 3 and unequal ranks."""
    noise = torch.Generator().manual_seed(seed)
    live = attach_adapter(
        load_base(base, torch.float32, CPU),
        **{"rank": 2, "lora_alpha": 6.0, "target_modules": None} | settings,
    )
    adapter = copy_adapter(live)

    def factors(module, rank):
        out_size, in_size = adapter.modules[module].shape
        B = size * torch.randn(out_size, rank, generator=noise)
        return LowRank(B, size * torch.randn(rank, in_size, generator=noise))

    saved = {}
    for name, tensor in adapter.saved.items():
        saved[name] = tensor + size * torch.randn(tensor.shape, generator=noise)
    modules = {module: factors(module, 2) for module in adapter.modules}
    merged = [
        StoredObject.of({module: factors(module, 3) for module in adapter.modules}),
        StoredObject.of({module: factors(module, 1).dense() for module in [*modules][:2]}),
        StoredObject.of({module: factors(module, 1) for module in [*modules][1:]}),
    ]
    return GlobalModel(
        base=identify(str(base), base),
        adapter=replace(adapter, modules=modules, saved=saved),
        base_update=tuple(merged),
        method="m",
    )


def merge_in_memory(model, base, dtype, out):
    """Merge a float32 copy of the model in place, and write it by `save_pretrained`."""
    live = load_base(base, torch.float32, CPU)
    owners = find_owners(live, model.adapter.modules)
    tuned = TunedModel(live, base, model)
    assert not is_streamed(live) and tuned.base_weights.layers == owners
    tuned.apply()
    record_untied_weights(live)
    kept = [*(live._keep_in_fp32_modules or ()), *(live._keep_in_fp32_modules_strict or ())]
    for name, tensor in [*live.named_parameters(), *live.named_buffers()]:
        is_kept = any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in kept)
        rounded = tensor.data.to(dtype)
        is_stored = name in live.state_dict() and tensor.is_floating_point()
        if is_stored and (not is_kept or torch.equal(rounded.float(), tensor)):
            tensor.data = rounded
    live.save_pretrained(out)


def stored(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_files(folder, wanted):
    """The same tensors, bit by bit, under the same names; the same configuration."""
    got = stored(folder)
    expected = stored(wanted)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        (wanted / "config.json").read_text()
    )


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in EVERY_TIME else [pytest.mark.long])
        for name in FAMILIES
    ],
)
def test_the_files_are_those_of_a_merge_in_memory(family, tmp_path, monkeypatch):
    base = tmp_path / "base"
    model = make_model(family).to(torch.bfloat16)
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    try:
        result = random_global_model(base)
        merge_in_memory(result, base, torch.bfloat16, tmp_path / "wanted")
    except FedMomentumError:
        pytest.skip("refused: see tests/test_families.py")
    monkeypatch.setattr(model_files, "SHARD_BYTES", 2**13)
    export_merged(result, tmp_path / "out", base_directory=base, dtype=torch.bfloat16)
    assert_same_files(tmp_path / "out", tmp_path / "wanted")
    files = list((tmp_path / "out").glob("*.safetensors"))
    largest = max(tensor.nbytes for tensor in stored(tmp_path / "out").values())
    assert len(files) > 3
    assert all(file.stat().st_size < max(2**13, largest) + 2**13 for file in files)


def write_llama(folder, dtypes):
    """A tiny Llama whose tensors are stored in these dtypes in turn."""
    tiny_llama(folder)
    tensors = load_file(folder / "model.safetensors")
    for number, name in enumerate(sorted(tensors)):
        # Numbers that only the wider dtypes hold exactly.
        tensors[name] = (tensors[name].float() * 1.0001).to(dtypes[number % len(dtypes)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float32],
        [torch.float16],
        [torch.float64, torch.bfloat16],
        [torch.bfloat16, torch.float32, torch.float16],
    ],
    ids=str,
)
def test_every_weight_is_read_as_a_model_in_float32_has_it(tmp_path, dtypes):
    base = write_llama(tmp_path / "base", dtypes)
    streamed = load_base(base, None, CPU)
    wanted = load_base(base, torch.float32, CPU)
    assert streamed.dtype == torch.float32
    for (name, got), (_, parameter) in zip(
        streamed.named_parameters(), wanted.named_parameters(), strict=True
    ):
        assert isinstance(got, StreamedTensor), name
        assert got.dtype == torch.float32
        assert torch.equal(got.read(), parameter)
        is_narrow = {torch.float16, torch.bfloat16} >= {stored(base)[name].dtype}
        if is_narrow:  # it stays in its file
            assert got.source.stored.dtype == stored(base)[name].dtype
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        difference = streamed(input_ids=ids).logits - wanted(input_ids=ids).logits
    assert float(difference.abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_of_several_dtypes_with_tied_and_fully_trained_modules(tmp_path, dtype):
    base = write_llama(tmp_path / "base", [torch.bfloat16, torch.float32])
    result = random_global_model(base, modules_to_save=["lm_head", "model.norm"])
    merge_in_memory(result, base, dtype, tmp_path / "wanted")
    share = export_merged(result, tmp_path / "out", base_directory=base, dtype=dtype)
    assert share == pytest.approx(1, abs=1e-6 if dtype == torch.float32 else 0.01)
    assert_same_files(tmp_path / "out", tmp_path / "wanted")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "wanted" / "model.safetensors"
    ).read_bytes()


def test_a_merge_without_one_part_is_refused(tmp_path, monkeypatch):
    """The model that the logits are compared with is not made of the same sums: PEFT adds the adapter."""
    base = write_llama(tmp_path / "base", [torch.bfloat16])
    result = random_global_model(base)
    honest = StreamedWeights.apply
    monkeypatch.setattr(
        StreamedWeights, "apply", lambda self, parts, own=None: honest(self, parts, None)
    )
    with pytest.raises(ModelError, match="the merged model is another model than the run's"):
        export_merged(result, tmp_path / "out", base_directory=base)
    assert not (tmp_path / "out").exists()


def test_a_file_that_holds_other_numbers_is_refused(tmp_path, monkeypatch):
    base = write_llama(tmp_path / "base", [torch.bfloat16])
    result = random_global_model(base)
    honest = model_files._computed
    monkeypatch.setattr(model_files, "_computed", lambda tensor: honest(tensor).roll(1, 0))
    with pytest.raises(ModelError, match="read back, is not what was written"):
        export_merged(result, tmp_path / "out", base_directory=base)
    assert not (tmp_path / "out").exists()


def test_no_streamed_tensor_can_be_changed(tmp_path):
    """A change would be lost."""
    live = load_base(write_llama(tmp_path / "base", [torch.bfloat16]), None, CPU)
    weight = live.get_parameter("model.norm.weight")
    for change in (lambda: weight.mul_(2), lambda: weight.data.add_(1), lambda: weight.zero_()):
        with pytest.raises(ModelError, match="changes a weight in place"):
            change()


def test_an_adapter_on_a_streamed_base(tmp_path):
    base = write_llama(tmp_path / "base", [torch.bfloat16])
    result = random_global_model(base, modules_to_save=["lm_head"])
    assert export_adapter(result, tmp_path / "adapter", base_directory=base) < 1e-5
    export_merged(result, tmp_path / "merged", base_directory=base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        wanted = merged(input_ids=ids).logits
        assert torch.allclose(
            adapted(input_ids=ids).logits, wanted, atol=1e-4 * float(wanted.norm())
        )


@pytest.mark.parametrize("stored_for", [("a", "b"), ("one", "two")])
def test_a_classifier_whose_head_is_new_on_16_bit_weights(tmp_path, stored_for):
    """The head is in float32, whatever the checkpoint has: none, or one for other labels."""
    kind = AutoModelForSequenceClassification
    base = write_llama(tmp_path / "base", [torch.bfloat16])
    names = dict(enumerate(stored_for))
    kind.from_pretrained(base, id2label=names, dtype=torch.bfloat16).save_pretrained(base)
    labels = ("one", "two")
    streamed = load_base(base, None, CPU, labels=labels)
    wanted = load_base(base, torch.float32, CPU, labels=labels)
    head = streamed.get_parameter("score.weight")
    assert isinstance(head, StreamedTensor)
    assert torch.equal(head.read(), wanted.score.weight)
    is_fresh = stored_for != labels
    assert is_fresh == (not torch.equal(head.read(), head.read().bfloat16().float()))
