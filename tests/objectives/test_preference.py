"""DPO: the loss, margins and accuracies of TRL; a base model's own margins are exactly 0."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedmomentum.config.training import LocalTraining
from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import tokenize
from fedmomentum.errors import DataError
from fedmomentum.evaluation.teacher_forcing import evaluate, measure_reference
from fedmomentum.objectives.preference import DPO
from fedmomentum.training.trainer import train
from tests.tiny import PAD_TOKEN_ID, tiny_gpt2, tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [
    Example(({"role": "user", "content": "2+2?"},), "four", "sum", rejected="a fish, perhaps"),
    Example(
        (
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "capital?"},
            {"role": "assistant", "content": "of?"},
            {"role": "user", "content": "France"},
        ),
        "Paris",
        "city",
        rejected="Lyon",
    ),
    Example(({"role": "user", "content": "a" * 40},), "b" * 30, "long", rejected="c"),
]


def tokenized(pairs=PAIRS, *, max_length=200):
    return tokenize(
        pairs, TOKENIZER, max_length=max_length, max_truncated_fraction=0.0, owner="north"
    )


def with_adapter(folder, seed=3):
    """A model with an adapter that changes it: r = 2, scaling = 3."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def measured(model, examples):
    with model.disable_adapter():
        return measure_reference(model, examples, pad_token_id=PAD_TOKEN_ID)


@pytest.mark.parametrize("max_length", [200, 90])
@pytest.mark.parametrize("beta", [0.05, 0.2])
def test_loss_margins_and_accuracies_are_those_of_trl(beta, max_length, folder, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = with_adapter(folder)
    rows = []
    for pair in PAIRS:
        chosen = [{"role": "assistant", "content": pair.completion}]
        rejected = [{"role": "assistant", "content": pair.rejected}]
        rows.append({"prompt": list(pair.prompt), "chosen": chosen, "rejected": rejected})
    trainer = DPOTrainer(
        model=copy.deepcopy(model),
        args=DPOConfig(
            output_dir=str(tmp_path),
            beta=beta,
            max_length=max_length,
            per_device_train_batch_size=len(PAIRS),
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )
    dataset = [trainer.train_dataset[row] for row in range(len(PAIRS))]
    for row in dataset:  # TRL learns the newline after the end token, which generation never sees
        for column in ("chosen_ids", "rejected_ids"):
            row[column] = row[column][:-1]
    batch = trainer.data_collator(dataset)
    trainer.model.delete_adapter("ref")  # a copy of the adapter; without it the base is compared
    trainer.model.eval()
    with torch.no_grad():
        trl_loss = float(trainer.compute_loss(trainer.model, batch))
    metrics = {key: values[-1] for key, values in trainer._metrics["eval"].items()}

    examples = measured(model, tokenized(max_length=max_length))
    total = evaluate(model, examples, pad_token_id=PAD_TOKEN_ID, objective=DPO(beta)).total
    assert total.loss == pytest.approx(trl_loss, rel=1e-6)
    assert total.mean_margin == pytest.approx(metrics["rewards/margins"], rel=1e-5, abs=1e-6)
    assert total.exact_match == pytest.approx(metrics["rewards/accuracies"])
    assert abs(total.mean_margin) > 0.01  # the adapter makes a difference

    # Training minimizes that loss: the first step's is the same.
    report = train(
        model,
        examples,
        LocalTraining(learning_rate=1e-3, batch_size=len(PAIRS), local_steps=1),
        pad_token_id=PAD_TOKEN_ID,
        seed=0,
        objective=DPO(beta),
    )
    assert report.first_loss == pytest.approx(trl_loss, rel=1e-6)
    assert report.num_tokens == len(PAIRS)


def test_gradient_is_that_of_the_formula_in_float64(folder):
    beta = 0.4
    model = with_adapter(folder).double()
    examples = measured(model, tokenized())
    objective = DPO(beta)
    batch = objective.collate([examples.example(row) for row in range(3)], PAD_TOKEN_ID)
    loss = objective.loss(objective.predict(model, batch))
    loss.optimized.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.zero_grad()

    # Pair by pair, without padding: -log sigmoid of the difference of log-ratios.
    def log_prob(ids, num_prompt):
        logits = model(torch.tensor([ids])).logits[0, num_prompt - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[num_prompt:])[:, None]).sum()

    total = 0
    for row in range(3):
        example = examples.example(row)
        ratios = []
        for ids in (example.input_ids, example.rejected_ids):
            ours = log_prob(ids, example.num_prompt_tokens)
            with torch.no_grad(), model.disable_adapter():
                reference = log_prob(ids, example.num_prompt_tokens)
            ratios.append(ours - reference)
        total = total - torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1]))
    assert loss.nll.item() == pytest.approx(total.item(), rel=1e-6)
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_is_its_reference_has_margins_of_exactly_0(dtype, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    examples = measure_reference(model, tokenized(), pad_token_id=PAD_TOKEN_ID, batch_size=2)
    total = evaluate(
        model, examples, pad_token_id=PAD_TOKEN_ID, batch_size=2, objective=DPO(0.3)
    ).total
    assert (total.margin, total.num_exact, total.num_tokens) == (0.0, 0, 3)
    assert total.loss == pytest.approx(0.6931471805599453, abs=1e-15)


def test_dropout_is_off_in_training_and_back_afterwards(tmp_path):
    folder = tiny_gpt2(tmp_path / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(
        folder, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    )
    examples = measure_reference(model, tokenized(), pad_token_id=PAD_TOKEN_ID)
    rates = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert 0.5 in rates
    report = train(
        model,
        examples,
        LocalTraining(learning_rate=1e-3, batch_size=3, local_steps=1),
        pad_token_id=PAD_TOKEN_ID,
        seed=0,
        objective=DPO(),
    )
    # With dropout the model would differ from itself.
    assert report.first_loss == pytest.approx(0.6931471805599453, rel=1e-6)
    assert rates == [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]


def test_pairs_without_reference_and_answers_without_pair_are_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(DataError, match="call measure_reference first"):
        evaluate(model, tokenized(), pad_token_id=PAD_TOKEN_ID, objective=DPO())
    single = tokenized([replace(pair, rejected=None) for pair in PAIRS])
    with pytest.raises(DataError, match="no rejected answer"):
        measure_reference(model, single, pad_token_id=PAD_TOKEN_ID)
    with pytest.raises(DataError, match="north, example 1: no rejected answer, and 2 of"):
        tokenized([PAIRS[0], replace(PAIRS[1], rejected=None), PAIRS[2]])
