"""Benchmarks of a run: the federated model with all of its parts, beside its base, offline."""

import json
import shutil
import socket

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmomentum.benchmark.language_model import BenchmarkModel, PromptSettings
from fedmomentum.benchmark.saving import ResultFile
from fedmomentum.benchmark.scoring import Benchmarks, Subject, run_benchmarks
from fedmomentum.benchmark.task_files import read_task
from fedmomentum.benchmark.tasks import make_task
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.global_model.export import export_merged
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.results.run_results import RunResults
from fedmomentum.run.inference import LoadSettings, ModelPair
from fedmomentum.run.saved_model import open_result
from tests.benchmark.files import (
    QUESTIONS,
    SUMS,
    write_choices,
    write_programs,
    write_rows,
    write_sums,
)
from tests.classifiers import classifier_config
from tests.runs import rewritten, start, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Unequal ranks, scalings other than 1, and a residual in the base update."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(
        folder,
        lora={
            "rank": 3,
            "lora-alpha": 6.0,
            "clients": {"site0": {"rank": 1}, "site1": {"rank": 2}},
        },
        training={"learning_rate": 0.3},
        run={"keep_checkpoints": 5},
    )
    start(config, folder / "run")
    return folder / "run"


@pytest.fixture
def tasks(tmp_path):
    return write_programs(write_sums(write_choices(tmp_path / "tasks"), num_fewshot=1))


def log_likelihoods(task, model, tokenizer):
    """Every log-likelihood of the task, by our model."""
    own = BenchmarkModel(model, tokenizer, PromptSettings(), lambda number: None)
    own.count_truncated(task)
    return torch.tensor([value for value, _ in own.loglikelihood(task.instances)])


def test_the_federated_model_is_base_plus_update_plus_adapter_and_equals_its_export(run, tasks):
    result = open_result(run)
    data = read_task(tasks, "choices")
    pair = ModelPair(result, LoadSettings())
    before = log_likelihoods(make_task(data), pair.model, pair.tokenizer)
    with pair.tuned():
        tuned = log_likelihoods(make_task(data), pair.model, pair.tokenizer)
    after = log_likelihoods(make_task(data), pair.model, pair.tokenizer)
    assert torch.equal(before, after)
    # the change, added by hand: all of it, and only the adapter
    base = run.parent / "base"
    model: GlobalModel = result.model
    assert model.base_update and set(model.adapter.scalings.values()) == {2.0}
    by_hand = {}
    for what in ("nothing", "adapter", "all"):
        plain = AutoModelForCausalLM.from_pretrained(base)
        for module in model.adapter.modules:
            change = {
                "nothing": torch.zeros(()),
                "adapter": model.adapter.effective(module).dense(),
                "all": getattr(
                    model.effective(module), "dense", lambda m=module: model.effective(m)
                )(),
            }[what]
            weight = plain.get_submodule(module).weight
            with torch.no_grad():
                weight.copy_((weight.double() + change).float())
        by_hand[what] = log_likelihoods(make_task(data), plain, pair.tokenizer)
    assert torch.allclose(before, by_hand["nothing"], atol=1e-5, rtol=0)
    assert torch.allclose(tuned, by_hand["all"], atol=1e-4, rtol=0)
    assert (tuned - before).abs().max() > 0.1
    assert (tuned - by_hand["adapter"]).abs().max() > 0.01
    # lm-eval without our code, on the merged export
    out = tasks / "merged"
    export_merged(model, out, base_directory=base)
    stock = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(out),
        tokenizer=AutoTokenizer.from_pretrained(out),
    )
    task = make_task(data)
    task.build_all_requests()
    exported = torch.tensor([value for value, _ in stock.loglikelihood(task.instances)])
    assert torch.allclose(tuned, exported, atol=1e-4, rtol=0)


def test_scores_are_those_of_the_models_one_by_one_and_need_no_network(run, tasks, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    seen = []
    results = run_benchmarks(
        Subject(run, ("all",)),
        Benchmarks(("gsm8k", "choices"), tasks, PromptSettings(batch_size=4)),
        on_result=lambda result: seen.append((result.task, len(result.models))),
    )
    assert [result.task for result in results] == ["gsm8k", "choices"]
    assert seen == [(task, n) for n in range(1, 6) for task in ("gsm8k", "choices")]
    for result in results:
        assert [model.round for model in result.federated] == [0, 1, 2, 3]
        # round 0 adds nothing yet
        assert result.federated[0].scores == result.base.scores
        assert {score.num_examples for m in result.models for score in m.scores} == {
            len(SUMS) if result.task == "gsm8k" else len(QUESTIONS)
        }
    for server_round in (1, 3):
        pair = ModelPair(open_result(run, server_round=str(server_round)), LoadSettings())
        with pair.tuned():
            model = BenchmarkModel(
                pair.model, pair.tokenizer, PromptSettings(), lambda number: None
            )
            own = model.score(make_task(read_task(tasks, "choices"))).scores
        assert results[1].federated[server_round].scores == own
    assert len({m.scores[1].correct for m in results[1].models}) > 1  # the rounds differ


def test_a_global_model_and_a_plain_model_are_benchmarked_too(run, tasks):
    result = run_benchmarks(Subject(run), Benchmarks(("choices",), tasks))[0]
    GlobalModel.load(run).save(tasks / "model")
    single = run_benchmarks(Subject(tasks / "model"), Benchmarks(("choices",), tasks))[0]
    assert single.federated[0].round is None and result.federated[0].round == 3
    assert single.federated[0].scores == result.federated[0].scores
    assert single.base.scores == result.base.scores
    # a plain model alone: the base, and the merged export
    plain = run_benchmarks(
        Subject(run.parent / "base"),
        Benchmarks(("choices",), tasks),
        LoadSettings(dtype="float32"),
    )[0]
    assert plain.base.scores == result.base.scores and plain.federated == []
    export_merged(open_result(run).model, tasks / "merged", base_directory=run.parent / "base")
    merged = run_benchmarks(
        Subject(tasks / "merged"),
        Benchmarks(("choices",), tasks),
        LoadSettings(dtype="float32"),
    )[0]
    assert merged.base.scores == result.federated[0].scores


def test_what_can_be_refused_is_refused_before_a_model_is_loaded(run, tasks, monkeypatch):
    monkeypatch.setattr(ModelPair, "__init__", lambda *_: pytest.fail("loaded"))
    for benchmarks, message in [
        (Benchmarks((), tasks), "--tasks names no task"),
        (Benchmarks(("choices", "x"), tasks), "no task 'x'"),
        (Benchmarks(("humaneval",), tasks), "humaneval: answers are programs.*--run-code"),
        (
            Benchmarks(("choices",), tasks, PromptSettings(limit=0)),
            "--limit must be at least 1; got 0",
        ),
        (
            Benchmarks(("choices",), tasks, PromptSettings(batch_size=0)),
            "--batch-size must be at least 1",
        ),
        (Benchmarks(("choices",), tasks, num_fewshot=-1), "--num-fewshot must be from 0 to 1000"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_benchmarks(Subject(run), benchmarks)
    choices = Benchmarks(("choices",), tasks)
    with pytest.raises(ConfigError, match="--rounds names no round"):
        run_benchmarks(Subject(run, ()), choices)
    with pytest.raises(ModelError, match="7"):
        run_benchmarks(Subject(run, ("7",)), choices)
    with pytest.raises(
        ConfigError, match="is a plain model; --rounds, --client, --store and --base"
    ):
        run_benchmarks(Subject(run.parent / "base", ("all",)), choices)
    with pytest.raises(ConfigError, match="--rounds all: .* is no run"):
        run_benchmarks(Subject(tasks, ("all",)), choices)


def test_programs_need_run_code_and_a_working_sandbox(run, tasks, monkeypatch):
    from fedmomentum.benchmark import programs, sandbox, scoring

    programs_task = Benchmarks(("humaneval",), tasks, run_code=True)
    monkeypatch.setattr(sandbox, "SYSTEM_PATH", "/nowhere")
    with pytest.raises(ConfigError, match="--run-code needs Linux and the program `unshare`"):
        run_benchmarks(Subject(run), programs_task)
    monkeypatch.setattr(scoring, "check_sandbox", lambda: None)
    seen = []

    def passes(program):
        seen.append(program)
        return len(seen) % 2 == 0

    monkeypatch.setattr(programs, "run_program", passes)
    result = run_benchmarks(Subject(run), programs_task)[0]
    assert [model.scores[0].correct for model in result.models] == ["01", "01"]
    assert seen[0].startswith("def double(x):\n") and seen[0].endswith("check(double)\n")


def test_prompts_are_truncated_only_on_request_and_it_is_reported(run, tasks):
    rows = [{**QUESTIONS[0], "question": "ab" * 150}, *QUESTIONS[1:]]
    write_rows(tasks / "choices_test.jsonl", rows)
    with pytest.raises(
        DataError, match="choices: 1 prompts are longer than the 256 tokens.*--trun"
    ):
        run_benchmarks(Subject(run), Benchmarks(("choices",), tasks))
    cut = run_benchmarks(Subject(run), Benchmarks(("choices",), tasks, truncate=True))[0]
    assert [model.num_truncated for model in cut.models] == [1, 1]
    assert cut.settings.truncate
    copy = tasks / "copy"
    shutil.copytree(run, copy)
    file = ResultFile.of(copy, None)
    file.add(cut)
    file.finish()
    assert "Prompts of choices were cut from the left" in (copy / "report.html").read_text()


def test_results_are_kept_beside_those_of_equal_settings_only(run, tasks, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)

    def scored(rounds, name="choices", **settings):
        file = ResultFile.of(copy, None)
        prompt_settings = PromptSettings(**settings)
        run_benchmarks(
            Subject(copy, rounds), Benchmarks((name,), tasks, prompt_settings), on_result=file.add
        )
        shown = RunResults.load(copy).benchmarks
        return {task.task: [model.round for model in task.federated] for task in shown.tasks}

    assert scored(("1",)) == {"choices": [1]}
    assert scored(("last",)) == {"choices": [1, 3]}
    assert scored(("2",), "gsm8k") == {"choices": [1, 3], "gsm8k": [2]}
    assert ResultFile.of(copy, None).finish() == [copy / "benchmarks.json", copy / "report.html"]
    page = (copy / "report.html").read_text()
    assert "Standard benchmarks" in page and 'id="benchmarks"' in page
    assert 'id="benchmark-rounds"' in page and "exact_match, strict-match" in page
    # other data take the place of all; a smaller limit, or another prompt, of nothing
    write_rows(tasks / "choices_test.jsonl", QUESTIONS[1:])
    assert scored(("2",)) == {"choices": [2], "gsm8k": [2]}
    scored(("1",), limit=5)
    shown = RunResults.load(copy).benchmarks
    assert [(task.task, task.variant) for task in shown.tasks] == [
        ("choices", "0-shot first 5 float32"),
        ("choices", "0-shot float32"),
        ("gsm8k", "1-shot float32"),
    ]
    assert {line.name for line in shown.newest} >= {
        "choices 0-shot first 5 float32, acc",
        "choices 0-shot float32, acc",
        "gsm8k, exact_match, strict-match",
    }
    assert "0-shot first 5 float32" in ResultFile.of(copy, None).finish()[1].read_text()
    # another run's file is not added to
    rewritten(copy / "benchmarks.json", lambda table: table.update(run_id="other"))
    with pytest.raises(ConfigError, match="holds the scores of another run"):
        ResultFile.of(copy, None)
    with pytest.raises(DataError, match="files of several runs"):
        RunResults.load(copy)
    table = json.loads((copy / "benchmarks.json").read_text())
    table["tasks"][0]["models"][0]["scores"][0]["correct"] = "11111"
    (copy / "benchmarks.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match="damaged or altered.*move it away"):
        ResultFile.of(copy, None)
    with pytest.raises(DataError, match="damaged or altered"):
        RunResults.load(copy)


def test_scores_of_a_round_that_was_trained_again_are_not_shown(run, tasks, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    file = ResultFile.of(copy, None)
    run_benchmarks(Subject(copy, ("2", "3")), Benchmarks(("choices",), tasks), on_result=file.add)
    lines = RunResults.load(copy).benchmarks.newest
    assert {line.model.round for line in lines} == {3}

    def age(table):
        table["tasks"][0]["models"][2]["adapter"] = "0" * 64

    rewritten(copy / "benchmarks.json", age)
    shown = RunResults.load(copy).benchmarks
    assert shown.num_outdated == 1 and {line.model.round for line in shown.lines} == {2}
    # the manifest is gone; the version in the metrics still tells
    shutil.rmtree(copy / "rounds")
    assert RunResults.load(copy).benchmarks.num_outdated == 0

    def age_version(table):
        table["tasks"][0]["models"][1]["version"] = "0" * 64

    rewritten(copy / "benchmarks.json", age_version)
    assert RunResults.load(copy).benchmarks.num_outdated == 1


def test_a_classifier_is_refused_before_it_is_loaded(tasks, tmp_path):
    start(classifier_config(tmp_path, "bert", federation={"num_rounds": 1}), tmp_path / "run")
    with pytest.raises(ConfigError, match="is a sequence classifier: it gives labels and writes"):
        run_benchmarks(Subject(tmp_path / "run"), Benchmarks(("choices",), tasks))
