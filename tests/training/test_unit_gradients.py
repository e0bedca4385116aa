"""A clipped sum is the formula, unit by unit; models in which rows meet are refused."""

import pytest
import torch
from torch import nn

from fedmomentum.data.tokenized import TokenizedExamples
from fedmomentum.errors import ModelError
from fedmomentum.objectives.classification import SequenceClassification
from fedmomentum.objectives.objective import CAUSAL_LM
from fedmomentum.objectives.preference import DPO
from fedmomentum.training.unit_gradients import ClippedSum, UnitGradients, check_layers
from tests.training.private_models import PAD, Float64LM, lora_model, random_rows

# Units of one row and of several, one of more rows than go through the model together.
UNITS = ((0,), (1, 5, 2, 7, 8), (3,), (4, 6))


def clipped(model, rows, units, max_norm, objective, max_rows=2):
    model.train()
    gradients = UnitGradients(model, objective, PAD, max_rows)
    with gradients.hooked():
        gradients.check_rows_are_independent()
        return gradients.clipped_sum(rows, units, max_norm)


def one_by_one(model, rows, unit, objective):
    """The gradient of a unit, each of its rows run alone, by plain autograd."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for row in unit:
        batch = objective.collate([rows.example(row)], PAD)
        loss = objective.loss(objective.predict(model, batch))
        mean = loss.optimized / loss.num_targets
        gradients = torch.autograd.grad(mean, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient.double()
    return total


def norm_of(gradients):
    return torch.sqrt(sum(gradient.double().square().sum() for gradient in gradients.values()))


def formula(model, rows, units, max_norm, objective):
    parts = [one_by_one(model, rows, unit, objective) for unit in units]
    factors = [min(1.0, max_norm / norm_of(part).item()) for part in parts]
    return {
        name: sum(factor * part[name] for factor, part in zip(factors, parts, strict=True))
        for name in parts[0]
    }, factors


@pytest.mark.parametrize("max_rows", [1, 2, 16])
def test_sum_is_the_formula_to_1e_10(max_rows):
    model = lora_model(dtype=torch.float64)
    rows = random_rows()
    norms = [norm_of(one_by_one(model, rows, unit, Float64LM())) for unit in UNITS]
    max_norm = float(sorted(norms)[1]) * 1.01  # two units are clipped, two are not
    wanted, factors = formula(model, rows, UNITS, max_norm, Float64LM())
    assert sorted(factor < 1 for factor in factors) == [False, False, True, True]
    result = clipped(model, rows, UNITS, max_norm, Float64LM(), max_rows)
    assert result.num_unusable == 0
    for name, gradient in result.gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-10, rtol=1e-10)
    assert set(result.gradients) == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("objective", "kind"),
    [(CAUSAL_LM, {}), (DPO(0.3), {"pairs": True}), (SequenceClassification(("a", "b", "c")), {})],
    ids=["sft", "dpo", "classification"],
)
def test_clipped_sums_of_every_objective_equal_the_formula(objective, kind):
    labels = 3 if isinstance(objective, SequenceClassification) else 0
    model = lora_model(classes=labels)
    rows = random_rows(**kind, labels=labels)
    wanted, _ = formula(model, rows, UNITS, 0.5, objective)
    result = clipped(model, rows, UNITS, 0.5, objective)
    assert any("score" in name for name in wanted) == bool(labels)
    for name, gradient in result.gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=2e-6, rtol=1e-4)


def test_one_unit_more_changes_the_sum_by_at_most_the_norm():
    model = lora_model(dtype=torch.float64)
    rows = random_rows()
    max_norm = 0.05
    everything = clipped(model, rows, UNITS, max_norm, Float64LM()).gradients
    for left_out in range(len(UNITS)):
        others = UNITS[:left_out] + UNITS[left_out + 1 :]
        without = clipped(model, rows, others, max_norm, Float64LM()).gradients
        change = norm_of({name: everything[name] - without[name] for name in everything})
        assert change == pytest.approx(max_norm, abs=1e-10)  # every unit is clipped


def test_without_units_the_sum_is_zero_and_hooks_leave_no_trace():
    model = lora_model()
    result = clipped(model, random_rows(), (), 1.0, CAUSAL_LM)
    assert result.num_targets == 0
    assert all(not gradient.any() for gradient in result.gradients.values())
    for parameter in model.parameters():
        assert not hasattr(parameter, "grad_sample") and parameter.grad is None
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_rows_of_similar_length_share_a_pass_and_each_is_seen_once(monkeypatch):
    lengths = (9, 30, 10, 31, 11, 64, 12, 9, 29)
    count = len(lengths)
    texts = tuple((1,) * length for length in lengths)
    rows = TokenizedExamples(texts, (1,) * count, ("",) * count, (False,) * count, num_lost=0)
    seen = []

    def gradients_of_nothing(self, batch, result):
        seen.append([row.length for row in batch])
        return {"w": torch.zeros(len(batch), 1, dtype=torch.float64)}

    monkeypatch.setattr(UnitGradients, "_row_gradients", gradients_of_nothing)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1))
    units = [(index,) for index in range(len(lengths))]
    UnitGradients(model, CAUSAL_LM, PAD, max_rows=4).clipped_sum(rows, units, 1.0)
    assert seen == [[9, 9, 10, 11], [12], [29, 30, 31], [64]]


def test_gradient_that_is_not_finite_contributes_nothing():
    units = {
        "w": torch.tensor([[3.0, 4.0], [torch.nan, 1.0], [torch.inf, 0.0], [1e200, 0.0]]).double()
    }
    total = ClippedSum({"w": torch.zeros(2, dtype=torch.float64)})
    total.add_clipped(units, 1.0)
    # The square of the last overflows: it cannot be clipped either.
    assert total.num_unusable == 3
    torch.testing.assert_close(total.gradients["w"], torch.tensor([0.6, 0.8]).double())


class Transposed(nn.Linear):
    """A linear layer under a name of its own."""


class Flattening(nn.Module):
    """Has its layer see the tokens of all rows as one dimension, or positions before rows."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner = inner
        self.how = how

    def forward(self, x):
        if self.how == "flat":
            return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.how == "transposed":
            return self.inner(x.transpose(0, 1)).transpose(0, 1)
        return self.inner(x) + 0.1 * self.inner(x).mean(dim=0, keepdim=True)  # rows meet


@pytest.mark.parametrize("how", ["flat", "transposed", "coupled"])
def test_rows_that_cannot_be_told_apart_are_refused(how):
    model = lora_model()
    layer = model.base_model.model.model.layers[0].self_attn
    layer.q_proj = Flattening(layer.q_proj, how)
    with pytest.raises(ModelError, match="cannot be attributed to single examples"):
        clipped(model, random_rows(), UNITS, 1.0, CAUSAL_LM)


@pytest.mark.parametrize(
    ("error", "is_refused"), [(2e-8, False), (1e-5, True)], ids=["rounding", "coupling"]
)
def test_rounding_errors_of_a_canceling_gradient_are_not_taken_for_coupling(
    monkeypatch, error, is_refused
):
    """Far from the first layers, a query's gradient is ten million times smaller than others."""
    exact = {"value": torch.tensor([[3.0, 4.0]]), "query": torch.tensor([[6e-8, 8e-8]])}

    def row_gradients(self, batch, result):
        rows = {name: gradient.repeat(len(batch), 1) for name, gradient in exact.items()}
        if len(batch) > 1:
            rows["query"] = rows["query"] + error
        return rows

    monkeypatch.setattr(UnitGradients, "_row_gradients", row_gradients)
    gradients = UnitGradients(lora_model(), CAUSAL_LM, PAD, 2)
    if not is_refused:
        return gradients.check_rows_are_independent()
    with pytest.raises(ModelError, match="query cannot be attributed to single examples"):
        gradients.check_rows_are_independent()


def test_unsupported_layers_are_refused_by_name():
    model = lora_model()
    check_layers(model)
    model.base_model.model.lm_head.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"lm_head.weight is held in torch.bfloat16"):
        check_layers(model)
    with pytest.raises(ModelError, match=r"lora_embedding_\w.default belongs to a"):
        check_layers(lora_model(targets=("embed_tokens",)))
    normalized = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).requires_grad_(False))
    with pytest.raises(ModelError, match="gradient of 1 cannot be attributed"):
        check_layers(normalized)
    with pytest.raises(ModelError, match="belongs to a Transposed"):
        check_layers(nn.Sequential(Transposed(2, 2)))
