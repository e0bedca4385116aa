"""The head of a classifier: the same for every party, reused only if it is for these labels."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from fedmomentum.base_model.classifier import (
    head_modules,
    is_head,
    order_labels,
    set_pad_token,
    stored_labels,
)
from fedmomentum.base_model.load_checks import check_max_length, max_positions
from fedmomentum.base_model.loading import load_base, load_tokenizer
from fedmomentum.errors import ConfigError, ModelError
from tests.classifiers import KINDS, LABELS, tiny_base

CPU = torch.device("cpu")
HEADS = {
    "bert": ["classifier"],
    "bert-mlm": ["bert.pooler", "classifier"],
    "roberta": ["classifier"],
    "distilbert": ["classifier", "pre_classifier"],
    "deberta": ["classifier", "pooler"],
    "modernbert": ["classifier", "head"],
    "llama": ["score"],
    "qwen2": ["score"],
}


def load(base, labels=LABELS, dtype=torch.float32):
    return load_base(base, dtype, CPU, labels=labels)


def head_of(model):
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if is_head(name, model)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_head_does_not_depend_on_the_random_state(tmp_path, kind):
    base = tiny_base(tmp_path / "base", kind)
    torch.manual_seed(1)
    first = load(base)
    torch.manual_seed(2)
    second = load(base)
    assert head_modules(first, base) == HEADS[kind]
    for name, tensor in head_of(first).items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert bool(tensor.isfinite().all())
    weight = next(t for n, t in head_of(first).items() if n.endswith("weight") and len(t) == 3)
    assert 0.03 < float(weight.std()) < 0.3  # the configuration says 0.1
    # Everything that the checkpoint holds, and that is no output for labels, is the checkpoint's.
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    stored = set(load_file(base / "model.safetensors"))
    for name, tensor in stock.state_dict().items():
        bare = name.removeprefix(f"{stock.base_model_prefix}.")
        if name in stored or bare in stored:
            assert torch.equal(tensor, first.state_dict()[name]), name


def test_a_head_for_these_labels_is_reused_and_sets_their_order(tmp_path, caplog):
    base = tiny_base(tmp_path / "base", "bert")
    model = load(base)
    with torch.no_grad():
        model.classifier.weight.fill_(3.0)
    model.save_pretrained(tmp_path / "trained")
    trained = tmp_path / "trained"
    assert stored_labels(base) == () and stored_labels(trained) == LABELS
    assert order_labels(trained, sorted(LABELS)) == LABELS
    assert order_labels(base, sorted(LABELS)) == tuple(sorted(LABELS))
    caplog.clear()
    assert bool((load(trained).classifier.weight == 3.0).all())
    assert not any(record.name == "fedmomentum" for record in caplog.records)
    with pytest.raises(ModelError, match="in another order than model.labels: 'north', 'east'"):
        load(trained, tuple(sorted(LABELS)))
    # As many other labels, and another number of them.
    for labels in (("a", "b", "c"), ("a", "b", "c", "d")):
        fresh = load(trained, labels).classifier.weight
        assert not bool((fresh == 3.0).any()) and fresh.shape[0] == len(labels)
    assert "is for other labels, or does not name them" in caplog.text


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    config = AutoConfig.for_model(
        "bart",
        vocab_size=100,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="is an encoder with a decoder .Bart.*on encoders"):
        load(tmp_path / "base")


def test_a_checkpoint_without_a_part_of_its_body_is_refused(tmp_path):
    base = tiny_base(tmp_path / "base", "bert")
    tensors = load_file(base / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    save_file(
        {key: value for key, value in tensors.items() if key != name},
        base / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=rf"does not hold bert.{name}, which Bert.* would init"):
        load(base)


def test_a_tensor_without_a_place_in_the_body_is_refused(tmp_path):
    base = tiny_base(tmp_path / "base", "bert-mlm")
    tensors = load_file(base / "model.safetensors")
    tensors["bert.encoder.layer.7.output.dense.weight"] = torch.zeros(2, 2)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="bert.encoder.layer.7.* has no place"):
        load(base)


def test_a_decoder_gets_the_tokenizers_pad_token_and_an_encoder_must_have_it(tmp_path):
    llama = tiny_base(tmp_path / "llama", "llama")
    roberta = tiny_base(tmp_path / "roberta", "roberta")
    for base in (llama, roberta):
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "pad_token_id": 7}))
    model = load(llama)
    set_pad_token(model, load_tokenizer(llama, generates=False))
    assert model.config.pad_token_id == 0
    with pytest.raises(ModelError, match="pads with token 0, and Roberta.* was made for 7"):
        set_pad_token(load(roberta), load_tokenizer(roberta, generates=False))


def test_roberta_has_fewer_positions_than_rows_in_its_table(tmp_path):
    model = load(tiny_base(tmp_path / "base", "roberta"))
    assert max_positions(model) == (63, True)  # of 64 rows, one for the pad token 0
    tokens = torch.full((1, 63), 5)
    assert bool(model(input_ids=tokens).logits.isfinite().all())
    with pytest.raises(ConfigError, match="has 63 positions"):
        check_max_length(model, 64)
    assert max_positions(load(tiny_base(tmp_path / "bert", "bert"))) == (64, True)
