"""The loss and scores of a classifier are transformers' own, whatever a batch is padded with."""

import pytest
import torch

from fedmomentum.base_model.classifier import set_pad_token
from fedmomentum.base_model.loading import load_base, load_tokenizer
from fedmomentum.data.examples import Example, TextPair
from fedmomentum.data.labeled_texts import tokenize_labeled
from fedmomentum.objectives.classification import SequenceClassification
from tests.classifiers import LABELS, tiny_base

TEXTS = ("ab", "cd efg", "a longer text than these", "x")
OBJECTIVE = SequenceClassification(LABELS)


def batch_of(model, tokenizer, *, pairs, texts=TEXTS):
    """Rows of the texts, with their labels in turn, as a batch; and what stock users would pass."""
    examples = []
    for number, text in enumerate(texts):
        prompt = TextPair(text, f"and {text}") if pairs else text
        label = LABELS[number % 3]
        examples.append(Example(prompt, label, category=label))
    rows = tokenize_labeled(examples, tokenizer, LABELS, max_length=64, owner="a test")
    batch = OBJECTIVE.collate(list(map(rows.example, range(len(rows)))), tokenizer.pad_token_id)
    tokenizer.padding_side = "right"
    seconds = [[f"and {text}" for text in texts]] if pairs else []
    stock = tokenizer(list(texts), *seconds, padding=True, return_tensors="pt")
    return batch, stock


def classifier(folder, kind):
    base = tiny_base(folder / kind, kind)
    model = load_base(base, torch.float32, torch.device("cpu"), labels=LABELS)
    tokenizer = load_tokenizer(base, generates=False)
    set_pad_token(model, tokenizer)
    return model, tokenizer


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
def test_loss_gradient_and_predictions_are_those_of_stock_transformers(tmp_path, kind, pairs):
    model, tokenizer = classifier(tmp_path, kind)
    batch, stock = batch_of(model, tokenizer, pairs=pairs)
    labels = torch.arange(len(TEXTS)) % 3
    assert torch.equal(batch["input_ids"], stock["input_ids"])
    segments = stock.get("token_type_ids", torch.zeros_like(batch["input_ids"]))
    assert torch.equal(batch["token_type_ids"], segments)
    assert bool(segments.any()) == (pairs and kind == "bert")
    assert OBJECTIVE.num_targets(batch) == len(TEXTS)

    wanted = model(**stock, labels=labels)
    predictions = OBJECTIVE.predict(model, batch)
    loss = OBJECTIVE.loss(predictions)
    assert torch.allclose(predictions.logits[:, 0], wanted.logits, atol=1e-6)
    assert loss.num_targets == len(TEXTS)
    assert torch.allclose(loss.optimized / len(TEXTS), wanted.loss, atol=1e-6)
    parameter = next(iter(model.parameters()))
    (got,) = torch.autograd.grad(loss.optimized / len(TEXTS), parameter)
    (gradient,) = torch.autograd.grad(wanted.loss, parameter)
    assert torch.allclose(got, gradient, atol=1e-6) and bool(gradient.any())

    scores = list(OBJECTIVE.score(predictions))
    best = [LABELS[index] for index in wanted.logits.argmax(dim=-1).tolist()]
    assert [score.predicted for score in scores] == best
    assert [score.label for score in scores] == [LABELS[index] for index in labels.tolist()]
    assert [score.is_exact for score in scores] == [s.label == s.predicted for s in scores]
    assert sum(score.nll for score in scores) == pytest.approx(loss.nll.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama"])
def test_padding_changes_nothing(tmp_path, kind):
    model, tokenizer = classifier(tmp_path, kind)
    together, _ = batch_of(model, tokenizer, pairs=False)
    with torch.no_grad():
        logits = OBJECTIVE.predict(model, together).logits
        for row, text in enumerate(TEXTS):
            alone, _ = batch_of(model, tokenizer, pairs=False, texts=(text,))
            assert torch.allclose(OBJECTIVE.predict(model, alone).logits[0], logits[row], atol=1e-5)


def test_labels_are_smoothed_in_what_is_optimized_only(tmp_path):
    model, tokenizer = classifier(tmp_path, "bert")
    batch, _ = batch_of(model, tokenizer, pairs=False)
    predictions = OBJECTIVE.predict(model, batch)
    smoothed = OBJECTIVE.loss(predictions, label_smoothing=0.3)
    assert smoothed.nll == OBJECTIVE.loss(predictions).nll != smoothed.optimized
