"""Adapters of classifiers from elsewhere: combined and exported, whatever their head is called."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedmomentum.aggregation.aggregate import aggregate_adapters
from fedmomentum.aggregation.methods.fedmomentum import FedMomentum
from fedmomentum.errors import AdapterError, ConfigError, ModelError
from fedmomentum.global_model.base_loading import num_labels
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import Adapter
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.run.aggregate import aggregate_directories
from fedmomentum.run.evaluate import evaluate_on
from fedmomentum.run.inference import LoadSettings
from fedmomentum.run.saved_model import open_result
from tests.classifiers import KINDS, tiny_base

WEIGHTS = (1.0, 3.0)


def peft_adapters(folder, kind, extra=()):
    """Two adapters of stock PEFT, of different ranks and scalings, with trained heads."""
    base = tiny_base(folder / "base", kind)
    directories = []
    for number, (rank, alpha) in enumerate([(3, 5), (2, 7)]):
        torch.manual_seed(number)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=KINDS[kind][3],
            task_type="SEQ_CLS",
            modules_to_save=list(extra) or None,
        )
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.1)
                assert "lora_" in name or "modules_to_save" in name
        directories.append(folder / f"adapter{number}")
        wrapped.save_pretrained(directories[-1])
    return base, directories


@pytest.mark.parametrize(
    ("kind", "extra", "head"),
    [
        ("distilbert", (), "classifier"),
        ("roberta", (), "classifier.out_proj"),
        ("deberta", ("pooler",), "classifier"),
        ("llama", (), "score"),
    ],
)
def test_adapters_of_stock_peft_are_combined_with_their_heads(tmp_path, kind, extra, head):
    base, directories = peft_adapters(tmp_path, kind, extra)
    adapters = [read_adapter(directory) for directory in directories]
    model = aggregate_directories(directories, FedMomentum(), weights=list(WEIGHTS)).model
    assert f"{head}.weight" in model.adapter.saved and num_labels(model) == 4
    if kind == "distilbert":
        assert "pre_classifier.weight" in model.adapter.saved
    for name, tensor in model.adapter.saved.items():
        one, two = (adapter.saved[name].double() for adapter in adapters)
        assert torch.equal(tensor, (0.25 * one + 0.75 * two).float())

    # Both exports, by stock libraries: the same classifier, and its weights the mean of both.
    export_adapter(model, tmp_path / "combined", base_directory=base)
    card = (tmp_path / "combined" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    assert "    num_labels=4,\n" in card
    checked = aggregate_directories(
        directories, FedMomentum(), weights=list(WEIGHTS), base=str(base)
    )
    for name, tensor in checked.model.adapter.saved.items():
        assert torch.equal(tensor, model.adapter.saved[name])
    export_merged(model, tmp_path / "merged", base_directory=base)
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
    wrapped = PeftModel.from_pretrained(stock, tmp_path / "combined").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_labels == 4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer(["ab", "a longer text"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(wrapped(**batch).logits, merged(**batch).logits, atol=1e-5)
    alone = []
    for directory in directories:
        fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
        alone.append(PeftModel.from_pretrained(fresh, directory).merge_and_unload().state_dict())
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, 0.25 * alone[0][name] + 0.75 * alone[1][name], atol=1e-6)


def test_the_mean_of_heads_in_16_bits_is_not_rounded_to_16_bits():
    heads = torch.tensor([1.0, 1.0 + 2**-7])
    factors = LowRank(torch.ones(4, 1), torch.ones(1, 3))
    for dtypes in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)):
        adapters = []
        for number, dtype in enumerate(dtypes):
            saved = {"score.weight": heads[number].reshape(1, 1).to(dtype)}
            adapters.append(Adapter({"q": factors}, {"q": 1.0}, saved, {}, f"client{number}"))
        for order in (adapters, adapters[::-1]):
            mean = aggregate_adapters(order, method=FedMomentum()).adapter.saved["score.weight"]
            assert mean.dtype == torch.float32
            assert mean.item() == 1 + 2**-8


def test_a_base_that_cannot_be_built_is_refused_by_name(tmp_path):
    base, directories = peft_adapters(tmp_path, "distilbert")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    with pytest.raises(ModelError, match="cannot build the model in .*base"):
        aggregate_directories(directories, FedMomentum(), base=str(base))


def test_a_head_without_output_layer_is_refused_by_name(tmp_path):
    _, directories = peft_adapters(tmp_path, "distilbert")
    model = aggregate_directories(directories, FedMomentum()).model
    for name in ("classifier.weight", "classifier.bias"):
        del model.adapter.saved[name]
    with pytest.raises(AdapterError, match="saves no classification head"):
        num_labels(model)
    # A run knows its labels, whatever the last layer of its head is called.
    labels = ("north", "east", "south")
    named = replace(model, base=replace(model.base, labels=labels))
    assert num_labels(named) == len(labels)


def test_an_adapter_that_does_not_name_its_labels_is_not_scored(tmp_path):
    _, directories = peft_adapters(tmp_path, "bert")
    result = open_result(directories[0])
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a", "label": "x"}\n')
    with pytest.raises(ConfigError, match="does not name its labels; evaluate the run"):
        evaluate_on(result, str(data), LoadSettings())


def test_a_head_without_a_task_type_is_refused_with_what_to_set(tmp_path):
    base, directories = peft_adapters(tmp_path, "distilbert")
    for directory in directories:
        config = json.loads((directory / "adapter_config.json").read_text())
        config["task_type"] = None
        (directory / "adapter_config.json").write_text(json.dumps(config))
    model = aggregate_directories(directories, FedMomentum()).model
    with pytest.raises(AdapterError, match='saves classifier.*no task_type.*"SEQ_CLS"'):
        export_merged(model, tmp_path / "merged", base_directory=base)
