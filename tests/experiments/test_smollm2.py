"""The language-model experiment: its model is the stock one, and its script runs end to end."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmomentum.data.examples import Example
from fedmomentum.data.tokenization import tokenize
from fedmomentum.objectives.objective import CAUSAL_LM
from tests.tiny import tiny_llama

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def language(monkeypatch, tmp_path):
    """The script as a module, working in a separate directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS / "smollm2"), str(EXPERIMENTS), *sys.path])
    return importlib.import_module("language")


def tokenized(folder, prompts):
    examples = [Example(prompt=prompt, completion=prompt[::-1]) for prompt in prompts]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenize(examples, tokenizer, max_length=64, max_truncated_fraction=0, owner="test")


@pytest.fixture
def models(language, tmp_path):
    """The stock model, ours, and the same examples as either has them; the last one is not kept."""
    cached = importlib.import_module("cached_smollm2")
    source = tiny_llama(tmp_path / "source")
    prompts = ("ab: ", "c", "deca dba ", "never ")
    examples = tokenized(source, prompts)
    rows = list(examples.input_ids[:3])
    # "n", "v" and "r" must be in the vocabulary without the row being kept.
    rows.append(tokenized(source, ("nv", "er "))[0:].input_ids[0])
    rows.append(tokenized(source, ("er ",)).input_ids[0])
    cached.make(source, tmp_path / "base", rows, 1, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    return stock, ours, examples, tokenized(tmp_path / "base", prompts)


def logits(model, examples, rows):
    """Logits of the completions, each row's own tokens: what training and evaluation use."""
    batch = CAUSAL_LM.collate([examples.example(row) for row in rows], 0)
    with torch.no_grad():
        predictions = CAUSAL_LM.predict(model, batch)
    return predictions.logits[predictions.labels != -100]


@pytest.mark.parametrize("rows", [(0, 1, 2), (3,), (1, 3)], ids=["kept", "not kept", "mixed"])
def test_the_model_is_the_stock_one_on_the_tokens_of_the_data(models, rows):
    stock, ours, examples, renumbered = models
    kept = sorted({token for row in examples.input_ids for token in row} | {0, 1, 2, 3})
    assert ours.config.vocab_size == len(kept) < stock.config.vocab_size
    for old, new in zip(examples.input_ids, renumbered.input_ids, strict=True):
        assert [kept.index(token) for token in old] == list(new)
    torch.testing.assert_close(
        logits(ours, renumbered, rows), logits(stock, examples, rows)[:, kept], rtol=0, atol=1e-5
    )


def test_positions_are_those_of_the_stock_model_in_16_bits(language, tmp_path):
    cached = importlib.import_module("cached_smollm2")
    source = tiny_llama(tmp_path / "source")
    config = cached.CachedConfig.from_pretrained(source)
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ours = cached._trimmed(source, config, list(range(100)), torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    buffers = dict(stock.named_buffers())
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name


def test_what_is_kept_is_used_and_only_where_all_rows_are(models):
    _, ours, _, renumbered = models
    before = [logits(ours, renumbered, rows) for rows in ((0, 1), (0, 3))]
    ours._states = ours._states + 1
    after = [logits(ours, renumbered, rows) for rows in ((0, 1), (0, 3))]
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_training_takes_the_loss_of_the_package(models):
    _, ours, _, renumbered = models
    cached = importlib.import_module("cached_smollm2")
    ours.requires_grad_(False)
    ours.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    weight = ours.model.layers[1].self_attn.q_proj.weight
    before = weight.detach().clone()
    wanted = CAUSAL_LM.collate([renumbered.example(row) for row in range(len(renumbered))], 0)
    loss = CAUSAL_LM.loss(CAUSAL_LM.predict(ours, wanted))
    report = cached.train(
        ours,
        renumbered,
        pad_token_id=0,
        learning_rate=1e-3,
        local_steps=2,
        batch_size=4,
        seed=0,
        on_step=lambda *_: None,
    )
    assert report.first_loss == pytest.approx(loss.nll.item() / loss.num_targets, abs=1e-5)
    assert report.num_tokens == 2 * loss.num_targets
    assert report.last_loss < report.first_loss
    assert not torch.equal(weight, before)


@pytest.fixture
def small(language, monkeypatch, tmp_path):
    """The script on a tiny model: two methods, one learning rate, two rounds."""
    few = (
        "training.local-steps=1",
        "federation.num-rounds=2",
        "data.min-examples=4",
        "data.num-clients=2",
    )
    for name in language.WORKLOADS:
        grid = language.Grid((3e-3, 1e-2), (0, 1), "loss")
        workload = language.Workload(80, 24, 256, {"few": few}, grid)
        monkeypatch.setitem(language.WORKLOADS, name, workload)
    for name, value in (
        ("NUM_LAYERS", 2),
        ("NUM_ADAPTED_LAYERS", 1),
        ("METHODS", dict.fromkeys(language.METHODS, (language.PUBLISHED, "fedit"))),
        ("VARIANTS", (language.PUBLISHED, language.PROCRUSTES_SHARED)),
        ("HERE", tmp_path / "scripts"),
    ):
        monkeypatch.setattr(language, name, value)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "tasks.toml").write_bytes(
        (EXPERIMENTS / "smollm2" / "tasks.toml").read_bytes()
    )
    return language


def test_the_script_runs_end_to_end_and_resumes(small, tmp_path, capsys):
    out = tmp_path / "out"
    small.prepare("builtin", out, None, tiny_llama(tmp_path / "source"))
    words = ["--out", str(out), "--seeds", "1", "--publish"]

    assert small.main(words) == 0
    assert "seed 0: exact match" in capsys.readouterr().out
    rates = json.loads((out / "few-learning-rates.json").read_text())
    assert set(rates) == {small.PUBLISHED, "fedit"}
    for row in rates.values():
        assert row["chosen"] == float(min(row["loss"], key=row["loss"].get))
    results = tmp_path / "scripts" / "results" / "few"
    rows = list(csv.DictReader((results / "comparison.csv").open()))
    assert [row["seed"] for row in rows] == ["0", "0"]
    assert all(0 < float(row["loss"]) < 10 for row in rows)
    assert (
        (results / "learning-rates.csv")
        .read_text()
        .startswith("method,learning_rate,mean_loss_of_tuning_seeds,chosen\n")
    )

    before = (results / "comparison.csv").read_bytes()
    assert small.main(words) == 0
    assert "seed" not in capsys.readouterr().out  # nothing ran again
    assert (results / "comparison.csv").read_bytes() == before

    # A committed run is repeated: its scores are the same, to the last digit.
    assert small.main(["--out", str(out), "--reproduce", "few:fedit:0"]) == 0
    committed = next(row["loss"] for row in rows if row["method"].startswith("fedit"))
    assert f"loss: committed {committed}, here {committed}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no committed run of fedit with seed 9"):
        small.main(["--out", str(out), "--reproduce", "few:fedit:9"])

    # The variants of FedMomentum: the tuning runs of both comparisons are the same runs.
    assert small.main([*words, "--variants"]) == 0
    output = capsys.readouterr().out
    assert f"few-tuning {small.PUBLISHED};training.learning-rate=0.003, seed" not in output
    assert f"few-tuning {small.PROCRUSTES_SHARED};training.learning-rate=0.003, seed" in output
    variants = results.with_name("few-variants")
    rows = list(csv.DictReader((variants / "comparison.csv").open()))
    assert {row["method"].partition(";training.learning-rate")[0] for row in rows} == {
        small.PUBLISHED,
        small.PROCRUSTES_SHARED,
    }
    assert (
        "--variants --only few" in json.loads((variants / "comparison.json").read_text())["command"]
    )


def test_the_base_model_has_the_dtype_that_is_asked_for(small, tmp_path, monkeypatch):
    """Each dtype in a directory of its own: a run is not continued in another."""
    source = tiny_llama(tmp_path / "source")
    monkeypatch.setattr(small, "bundled_model_directory", lambda _: source)
    out = tmp_path / "out"
    words = ["--out", str(out), "--try", "few:fedit"]
    assert small.main(words) == 0
    assert small.main([*words, "--dtype", "float32"]) == 0
    for folder, dtype in ((out, torch.bfloat16), (out / "float32", torch.float32)):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        assert base.dtype == dtype
        (config,) = (folder / "few-tuning").glob("*/seed-100/config.toml")
        assert f'dtype = "{str(dtype).removeprefix("torch.")}"' in config.read_text()


def test_multiple_choice_is_scored_by_the_likelihood_of_the_choices(small, tmp_path):
    """As stock transformers scores it, one question after the other."""
    choice_scores = importlib.import_module("choice_scores")
    data = tmp_path / "data"
    for name in ("boolq", "arc_easy"):
        ends = "true/false" if name == "boolq" else "answer1/answer2/answer3"
        (data / name).mkdir(parents=True)
        for split, count in (("train", 60), ("test", 12)):
            rows = [
                {
                    "instruction": f"{split} {name} {i * i}?\n\nAnswer format: {ends}",
                    "input": "",
                    "output": "the correct answer is " + ends.split("/")[i % len(ends.split("/"))],
                }
                for i in range(count)
            ]
            (data / name / f"{split}.json").write_text(json.dumps(rows))
    out = tmp_path / "out" / "commonsense"
    small.prepare("commonsense", out, data, tiny_llama(tmp_path / "source"))
    words = ["--out", str(tmp_path / "out"), "--tasks", "commonsense", "--data", str(data)]
    assert small.main([*words, "--seeds", "1", "--publish"]) == 0
    results = tmp_path / "scripts" / "results" / "commonsense-few"
    table = list(csv.DictReader((results / "choices.csv").open()))
    assert [row["category"] for row in table] == ["arc_easy", "boolq"] * 2
    assert all(row["questions"] == "12" for row in table)

    # What was counted is not counted again.
    first = choice_scores.read_counts(out / "few" / "choices.csv")
    choice_scores.write_counts(out / "few" / "choices.csv", dict(list(first.items())[:1]))
    assert small.main([*words, "--seeds", "1"]) == 0
    assert choice_scores.read_counts(out / "few" / "choices.csv") == first

    # The same by hand.
    (run,) = (out / "few").glob("fedit*/seed-0")
    inference = importlib.import_module("fedmomentum.run.inference")
    saved = importlib.import_module("fedmomentum.run.saved_model")
    pair = inference.ModelPair(saved.open_result(run), inference.LoadSettings())
    correct = 0
    with pair.tuned(), torch.no_grad():
        for line in (out / "test.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["category"] != "boolq":
                continue
            prompt = pair.tokenizer(row["prompt"])["input_ids"]
            likelihoods = []
            for choice in ("the correct answer is true", "the correct answer is false"):
                ids = pair.tokenizer(row["prompt"] + choice)["input_ids"]
                ids.append(pair.tokenizer.eos_token_id)
                logits = pair.model(input_ids=torch.tensor([ids])).logits[0].float()
                each = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
                likelihoods.append(float(each[len(prompt) - 1 :].sum()))
            right = likelihoods[0] >= likelihoods[1]
            correct += row["completion"].endswith("true") == right
    assert int(table[-1]["correct"]) == correct
