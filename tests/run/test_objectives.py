"""Whole runs that learn all turns of a chat, or to prefer answers: same bits however they are made."""

import dataclasses
import json
import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedmomentum.errors import ConfigError, DataError
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.evaluate import evaluate
from fedmomentum.run.networked import run_federation
from fedmomentum.utils.names import directory_name
from tests.runs import WORDS, altered, chain, prepare, start, timeless, tiny_config

LOG_2 = math.log(2)
METHOD_SETTINGS = {"fedmomentum": {"split": "procrustes"}}


def pair_rows(client, number):
    rows = []
    for i in range(number):
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{client} {WORDS[i % 4]} {i}"}],
                "chosen": [{"role": "assistant", "content": WORDS[(i + client) % 4]}],
                "rejected": "no" + WORDS[(i + client + 1) % 4],
                "kind": WORDS[i % 2],
            }
        )
    return rows


def chat_rows(client, number):
    rows = []
    for i in range(number):
        turns = []
        for turn in range(1 + i % 3):
            turns.append({"role": "user", "content": f"{client} {WORDS[i % 4]} {i} {turn}"})
            turns.append({"role": "assistant", "content": WORDS[(i + turn) % 4]})
        rows.append({"messages": turns, "kind": WORDS[i % 2]})
    return rows


def write(folder, rows_of):
    files = {}
    for client in range(2):
        file = folder / f"{rows_of.__name__}-{client}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(client, 10 + 4 * client)))
        files[f"site{client}"] = str(file)
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def config_of(folder, rows_of=pair_rows, *, method="fedmomentum", state="fresh", **training):
    objective = {"objective": "dpo", "dpo-beta": 0.5} if rows_of is pair_rows else {}
    return tiny_config(
        folder,
        data={"client-files": write(folder, rows_of)},
        method={"name": method, "settings": METHOD_SETTINGS.get(method, {})},
        training={**objective, "optimizer-state": state, **training},
        federation={"num-rounds": 2},
    )


def networked(config, stores):
    handlers = {}
    for name in config.data.client_files:
        handlers[name] = prepare_client(config, name, stores / directory_name(name)).handle
    return InProcessTransport(handlers)


CASES = [
    ("fedmomentum", "shared"),
    ("flora", "fresh"),  # a fresh adapter every round
    ("fedsvd", "fresh"),  # B is trained against an orthonormal A
    ("fedsalora", "local"),  # factors that stay with the client
    ("hetlora", "fresh"),  # ranks that shrink, and a penalty
]


@pytest.mark.parametrize(("method", "state"), CASES)
def test_dpo_has_the_same_bits_in_one_process_over_a_network_and_resumed(
    folder, tmp_path, method, state
):
    config = config_of(folder, method=method, state=state)
    start(config, tmp_path / "whole", function=None)
    rows = timeless(tmp_path / "whole")
    assert all(row["failures"] == {} for row in rows)
    run_federation(networked(config, tmp_path / "nodes"), config, tmp_path / "served")
    assert chain(tmp_path / "served") == chain(tmp_path / "whole")
    assert timeless(tmp_path / "served") == rows

    class Stop(Exception):
        pass

    def stop(event, facts):
        if event == "row" and facts["round"] == 1:
            raise Stop

    with pytest.raises(Stop):
        start(config, tmp_path / "halves", function=None, observer=stop)
    start(config, tmp_path / "halves", function=None, resume=True)
    assert chain(tmp_path / "halves") == chain(tmp_path / "whole")
    assert timeless(tmp_path / "halves") == rows

    # The base model is its own reference: no margin, though the factors of some methods begin with
    # a product, and what is merged belongs to the model and not to the reference.
    before, *_, after = (row["evaluation"]["total"] for row in rows)
    assert (before["margin"], before["num_exact"]) == (0.0, 0)
    assert before["loss"] == pytest.approx(LOG_2, abs=1e-5)
    assert abs(after["mean_margin"]) > 1e-3
    assert before["num_tokens"] == before["num_examples"]
    assert "perplexity" in before and before["perplexity"] is None


def test_reference_is_the_base_model_without_anything_merged(folder, tmp_path):
    config = config_of(folder, method="flora")
    run = start(config, tmp_path / "run", function=None)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    for client in run.clients:
        for row in range(len(client.train)):
            example = client.train.example(row)
            for ids, measured in zip(
                (example.input_ids, example.rejected_ids), example.reference, strict=True
            ):
                with torch.no_grad():
                    logits = base(torch.tensor([ids])).logits[0].float()
                labels = torch.tensor(ids)
                labels[: example.num_prompt_tokens] = -100
                nll = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
                assert measured == pytest.approx(-nll.item(), rel=1e-5)


def test_evaluate_scores_pairs_as_the_run_did_and_other_rows_as_text(folder, tmp_path):
    config = config_of(folder)
    start(config, tmp_path / "run", function=None)
    last = timeless(tmp_path / "run")[-1]["evaluation"]["total"]
    scored = evaluate(tmp_path / "run")
    assert scored.base.all.total.margin == 0.0
    assert scored.tuned.all.total.loss == pytest.approx(last["loss"], rel=1e-4)
    assert scored.tuned.all.total.mean_margin == pytest.approx(last["mean_margin"], rel=1e-3)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"question": "0 ab 0", "answer": "ab"}) + "\n")
    assert evaluate(tmp_path / "run", str(text)).tuned.all.total.margin is None


@pytest.mark.parametrize("state", ["fresh", "shared"])
def test_all_turns_have_the_same_bits_in_one_process_and_over_a_network(folder, tmp_path, state):
    config = config_of(folder, chat_rows, state=state, loss_on="all-assistant")
    start(config, tmp_path / "whole", function=None)
    run_federation(networked(config, tmp_path / "nodes"), config, tmp_path / "served")
    assert chain(tmp_path / "served") == chain(tmp_path / "whole")
    rows = timeless(tmp_path / "whole")
    assert all(row["failures"] == {} for row in rows)
    last = config_of(folder, chat_rows, state=state)
    start(last, tmp_path / "last", function=None)
    fewer = timeless(tmp_path / "last")[0]["evaluation"]["total"]
    total = rows[0]["evaluation"]["total"]
    assert total["num_examples"] == fewer["num_examples"]
    assert total["num_tokens"] > fewer["num_tokens"]


def test_client_with_another_objective_is_left_out_with_the_reason(folder, tmp_path):
    config = config_of(folder, chat_rows, loss_on="all-assistant")
    other = config_of(folder, chat_rows)
    handlers = {
        "site0": prepare_client(config, "site0", tmp_path / "first").handle,
        "site1": prepare_client(other, "site1", tmp_path / "other").handle,
    }
    run_federation(InProcessTransport(handlers), config, tmp_path / "served")
    rows = timeless(tmp_path / "served")
    assert "objective = sft, loss-on = all-assistant; [training] here gives" in str(
        rows[-1]["failures"]
    )


@pytest.mark.parametrize(
    ("rows_of", "training", "error", "pattern"),
    [
        (chat_rows, {"objective": "dpo"}, DataError, 'site0: .*"dpo" needs rows of prompt, chosen'),
        (
            pair_rows,
            {"objective": "sft"},
            DataError,
            "site0: the rows hold a chosen and a rejected",
        ),
        (
            pair_rows,
            {"loss_on": "all-assistant"},
            ConfigError,
            "training.loss-on must be last with",
        ),
        (pair_rows, {"function": "a:b"}, ConfigError, "training.function must be left out with"),
        (
            pair_rows,
            {"arguments": {"label_smoothing_factor": 0.1}},
            ConfigError,
            "training.arguments.label_smoothing_factor must be left out",
        ),
        (pair_rows, {"dpo_beta": 0.0}, ConfigError, "training.dpo-beta must be above 0"),
        (pair_rows, {"objective": "ppo"}, ConfigError, "training.objective must be sft or dpo"),
        (chat_rows, {"loss_on": "user"}, ConfigError, "training.loss-on must be last or all-ass"),
    ],
)
def test_settings_and_rows_that_contradict_the_objective_are_refused(
    folder, tmp_path, rows_of, training, error, pattern
):
    with pytest.raises(error, match=pattern):
        prepare(config_of(folder, rows_of, **training), tmp_path / "run").close()


def test_dropout_is_refused_where_answers_are_compared(folder, tmp_path):
    config = config_of(folder)
    dropping = dataclasses.replace(config.lora, dropout=0.1)
    with pytest.raises(ConfigError, match=r"lora.dropout must be 0 with .* dpo; got 0.1"):
        prepare(dataclasses.replace(config, lora=dropping), tmp_path / "run")


def test_resume_with_other_turns_or_answers_is_refused(folder, tmp_path):
    config = config_of(folder)
    start(config, tmp_path / "run", function=None)
    file = folder / "pair_rows-0.jsonl"
    text = file.read_text()
    try:
        file.write_text(text.replace("nocd", "nono"))
        with pytest.raises(DataError, match="site0"):
            prepare(config, tmp_path / "run", resume=True)
    finally:
        file.write_text(text)


def test_tables_and_pages_name_what_pairs_measure(folder, tmp_path):
    from rich.console import Console

    from fedmomentum.cli.evaluation_tables import evaluation_table
    from fedmomentum.cli.tables import comparison_tables, summary_table
    from fedmomentum.report import write_comparison_page, write_report
    from fedmomentum.results.comparison import compare_runs
    from fedmomentum.results.run_results import RunResults

    start(config_of(folder), tmp_path / "one", function=None)
    start(config_of(folder, method="fedit"), tmp_path / "two", function=None)
    comparison = compare_runs([tmp_path / "one", tmp_path / "two"], 0.5)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary_table(RunResults.load(tmp_path / "one")))
        console.print(evaluation_table(evaluate(tmp_path / "one")))
        for table in comparison_tables(comparison):
            console.print(table)
    page = write_comparison_page([tmp_path / "one", tmp_path / "two"], out=tmp_path / "page")
    pages = [write_report(tmp_path / "one").read_text(), page.read_text()]
    for text in (capture.get(), *pages):
        assert "reward accuracy" in text.lower() and "xact match" not in text
    assert "nats per token" not in "".join(pages) and "nats per pair" in pages[0]
    assert "nan" not in capture.get()

    start(config_of(folder, chat_rows), tmp_path / "text", function=None)
    with pytest.raises(DataError, match="report different things, exact match and reward acc"):
        compare_runs([tmp_path / "one", tmp_path / "text"], 0.5)


def test_scores_that_cannot_be_those_of_pairs_are_refused(folder, tmp_path):
    config = config_of(folder)
    lies = {
        "no margin": lambda score: score.update(margin=None),
        "8 targets in": lambda score: score.update(num_tokens=8),
        "the margins of": lambda score: score.update(margin=1e9),
    }
    for number, (pattern, change) in enumerate(lies.items()):

        def lie(fields, change=change):
            metrics = fields["metrics"]
            for score in (metrics["total"], metrics["compared"], *metrics["by_category"].values()):
                change(score)

        honest = prepare_client(config, "site1", tmp_path / f"{number}-1").handle
        handlers = {
            "site0": prepare_client(config, "site0", tmp_path / f"{number}-0").handle,
            "site1": partial(altered(lie, "evaluate"), honest=honest),
        }
        run_federation(InProcessTransport(handlers), config, tmp_path / f"run{number}")
        row = timeless(tmp_path / f"run{number}")[-1]
        assert row["evaluation"]["by_client"].keys() == {"site0"}
        assert pattern in str(row["failures"]) or pattern in str(row)
