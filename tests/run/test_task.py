"""A classifier through whole runs: its head, its labels, its scores, and what stock libraries load."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.errors import AdapterError, ConfigError, DataError, ModelError, QuorumError
from fedmomentum.global_model.export import export_adapter, export_merged
from fedmomentum.global_model.model import GlobalModel, version_of
from fedmomentum.lora.peft_model import saved_modules
from fedmomentum.protocol.transport import InProcessTransport
from fedmomentum.run.client_setup import prepare_client
from fedmomentum.run.evaluate import evaluate_on
from fedmomentum.run.federated_trainer import FederatedTrainer
from fedmomentum.run.inference import LoadSettings, answers
from fedmomentum.run.networked import run_federation
from fedmomentum.run.saved_model import open_result
from tests.classifiers import KINDS, LABELS, classifier_config, labeled_rows, write_rows
from tests.runs import altered, chain, nudge, objects, prepare, start, timeless

SORTED = ("east", "north", "south")
NAMED = {"model": {"labels": list(SORTED)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("labeled")


@pytest.fixture(scope="module")
def finished(folder):
    """A finished run of a BERT on pairs, really trained."""
    data = folder / "pairs"
    data.mkdir()
    config = classifier_config(data, "bert", pairs=True)
    start(config, folder / "finished", function=None)
    return folder / "finished"


# ── models ──


@pytest.mark.parametrize("kind", KINDS)
def test_stock_libraries_load_both_exports_of_every_family(folder, tmp_path, kind):
    config = classifier_config(folder, kind, federation={"num_rounds": 2})
    start(config, tmp_path / "run")
    rows = timeless(tmp_path / "run")
    assert rows[-1]["exactness_error"] < 1e-5 and rows[-1]["failures"] == {}
    model = GlobalModel.load(tmp_path / "run")
    base = folder / f"base-{kind}"
    assert model.base.labels == SORTED
    # A head has moved, in all of its tensors, and the export is read back by the package itself.
    start_head = prepare(config, tmp_path / "other")
    start_head.close()
    for name, tensor in start_head.model.adapter.saved.items():
        assert not torch.equal(tensor, model.adapter.saved[name]), name
    export_adapter(model, tmp_path / "adapter", base_directory=base)
    export_merged(model, tmp_path / "merged", base_directory=base)

    # Stock libraries: the same logits for a padded batch, and the labels by name.
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert tuple(merged.config.id2label.values()) == SORTED
    stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    wrapped = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer(["ab", "a longer text"], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = merged(**batch).logits
        assert torch.allclose(wrapped(**batch).logits, wanted, atol=1e-5)
        # A decoder reads its last token that is not padding: alone it says the same.
        alone = merged(**tokenizer(["ab"], return_tensors="pt")).logits
        assert torch.allclose(alone[0], wanted[0], atol=1e-5)


def test_a_decoder_whose_tokenizer_has_no_pad_token_pads_with_its_end(folder, tmp_path):
    config = classifier_config(folder, "llama", federation={"num_rounds": 1})
    base = tmp_path / "base"
    base.mkdir()
    for file in (folder / "base-llama").iterdir():
        text = file.read_bytes()
        if file.suffix == ".json" and file.name != "tokenizer.json":
            table = json.loads(text)
            table.pop("pad_token", None)
            table.pop("pad_token_id", None)
            text = json.dumps(table).encode()
        (base / file.name).write_bytes(text)
    config = replace(config, model=replace(config.model, name=str(base)))
    start(config, tmp_path / "run")
    model = GlobalModel.load(tmp_path / "run")
    export_merged(model, tmp_path / "merged", base_directory=base)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = tokenizer(["ab", "a longer text"], padding=True, return_tensors="pt")
    with torch.no_grad():
        alone = merged(**tokenizer(["ab"], return_tensors="pt")).logits
        assert torch.allclose(merged(**batch).logits[0], alone[0], atol=1e-5)


def test_a_16_bit_base_trains_its_head_in_float32(folder, tmp_path):
    config = classifier_config(
        folder,
        "bert",
        model={"dtype": "bfloat16"},
        federation={"num_rounds": 1, "uplink_dtype": "bfloat16", "downlink_dtype": "bfloat16"},
    )
    start(config, tmp_path / "run", function=None)
    model = GlobalModel.load(tmp_path / "run")
    head = model.adapter.saved["classifier.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())
    export_merged(model, tmp_path / "merged", base_directory=folder / "base-bert")


@pytest.mark.parametrize("kind", ["roberta", "bert-mlm"])
def test_targets_that_also_name_layers_of_the_head_adapt_the_others(folder, tmp_path, kind):
    lora = {"target_modules": ["dense"]}
    run = prepare(classifier_config(folder, kind, lora=lora), tmp_path / "run")
    run.close()
    adapter = run.model.adapter
    assert len(adapter.modules) == 6  # three in each of two layers
    assert not any("classifier" in module or "pooler" in module for module in adapter.modules)
    assert {name.rpartition(".")[0] for name in adapter.saved} >= {
        "classifier.dense" if kind == "roberta" else "bert.pooler.dense"
    }


@pytest.mark.parametrize("name", ["classifier", "classifier.dense"])
def test_a_target_that_is_the_head_alone_is_refused_by_name(folder, tmp_path, name):
    lora = {"target_modules": ["query", name]}
    path = r"classifier\.dense" if "." in name else "classifier"
    kind = "roberta" if "." in name else "bert"
    with pytest.raises(
        AdapterError, match=f"{path}, which needs no adapter: the classifier's head"
    ):
        prepare(classifier_config(folder, kind, lora=lora), tmp_path / "run")


# ── the head ──


class Heads:
    """Instead of training: `nudge`, and a copy of the head that each client ends with."""

    def __init__(self):
        self.heads = []

    def __call__(self, model, examples, **keywords):
        report = nudge(model, examples, **keywords)
        (wrapper,) = saved_modules(model).values()
        state = wrapper.modules_to_save["default"].state_dict()
        self.heads.append({name: tensor.double().clone() for name, tensor in state.items()})
        return report


@pytest.mark.parametrize("name", METHODS)
def test_every_method_averages_the_head_by_weight(folder, tmp_path, name):
    """In float64, then stored: also where a method is inexact, personal, or starts from a new adapter."""
    lora = {}
    if METHODS[name]().unequal_ranks:
        lora = {"clients": {"site1": {"rank": 1, "lora-alpha": 5.0}}}
    config = classifier_config(
        folder, "bert", method={"name": name}, lora=lora, evaluation={"num_examples": 2}
    )
    heads = Heads()
    start(config, tmp_path / "run", function=heads)
    rows = timeless(tmp_path / "run")
    assert all(row["failures"] == {} for row in rows)
    for server_round in (1, 2):
        trained = heads.heads[3 * server_round - 3 : 3 * server_round]
        weights = rows[server_round]["weights"].values()
        assert len(set(weights)) == 3
        model = GlobalModel.load(tmp_path / "run", server_round)
        for key in ("weight", "bias"):
            wanted = sum(w * head[key] for w, head in zip(weights, trained, strict=True))
            got = model.adapter.saved[f"classifier.{key}"]
            assert torch.allclose(got.double(), wanted, rtol=1e-7, atol=1e-10)
            assert torch.equal(got, wanted.float())


def test_a_personal_model_has_its_own_factors_and_the_common_head(folder, tmp_path):
    config = classifier_config(folder, "bert", method={"name": "fedsalora"})
    start(config, tmp_path / "run", function=None)
    first = open_result(tmp_path / "run", client="site0").model.adapter
    other = open_result(tmp_path / "run", client="site2").model.adapter
    assert torch.equal(first.saved["classifier.weight"], other.saved["classifier.weight"])
    module = next(iter(first.modules))
    assert not torch.equal(first.modules[module].B, other.modules[module].B)
    scored = evaluate_on(
        open_result(tmp_path / "run", client="site2"), None, LoadSettings(), limit=3
    )
    assert scored.tuned.all.total.num_examples == 3


@pytest.mark.parametrize("state", ["shared", "local"])
def test_the_optimizers_moments_of_the_head_are_new_every_round(folder, tmp_path, state):
    config = classifier_config(
        folder,
        "bert",
        method={"name": "fedit"},
        training={"optimizer_state": state},
        federation={"num_rounds": 2},
        evaluation={"every": 0},
    )
    seen = []
    run = prepare(config, tmp_path / "run")
    for client in run.clients:
        work = client._train_model

        def watched(request, moments, work=work):
            report = work(request, moments)
            seen.append((set(moments), set(report.moments)))
            return report

        client._train_model = watched
    run.start()
    # What a round starts with names factors only; the head's moments begin at zero.
    assert any(given for given, _ in seen[3:])
    assert all("lora_" in name for given, _ in seen for name in given)
    start(config, tmp_path / "again", function=None)
    assert chain(tmp_path / "again") == chain(tmp_path / "run")


# ── runs ──


def test_resumed_and_repeated_rounds_are_those_of_one_run(folder, tmp_path):
    config = classifier_config(folder, "bert", federation={"num_rounds": 3})
    start(config, tmp_path / "whole", function=None)

    def stop(event, facts):
        if event == "aggregate" and len(list((tmp_path / "parts" / "rounds").iterdir())) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(config, tmp_path / "parts", function=None, observer=stop)
    start(config, tmp_path / "parts", function=None, resume=True)
    assert chain(tmp_path / "parts") == chain(tmp_path / "whole")
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    # Back to round 2, whose head the third round starts from again.
    start(config, tmp_path / "parts", function=None, resume=True, server_round=2)
    assert chain(tmp_path / "parts") == chain(tmp_path / "whole")


def test_a_resumed_run_keeps_its_labels(folder, tmp_path):
    config = classifier_config(folder, "bert", federation={"num_rounds": 1})
    start(config, tmp_path / "run")
    more = replace(
        config,
        model=replace(config.model, labels=["south", "north", "east"]),
        federation=replace(config.federation, num_rounds=2),
    )
    with pytest.raises(ConfigError, match="these differ: model.labels"):
        start(more, tmp_path / "run", resume=True)


def networked(config, folder, names=("site0", "site1", "site2")):
    """Each party with its own model, data and store."""
    clients = {}
    for name in names:
        client = prepare_client(config, name, folder / name)
        client.training_function = nudge
        clients[name] = client
    return clients


def test_parties_on_their_own_make_the_run_of_one_machine(folder, tmp_path):
    config = classifier_config(folder, "bert", **NAMED)
    clients = networked(config, tmp_path)
    handlers = {name: client.handle for name, client in clients.items()}
    server = replace(config, data=replace(config.data, client_files={}))
    run_federation(InProcessTransport(handlers), server, tmp_path / "over")
    start(config, tmp_path / "one")
    assert chain(tmp_path / "over") == chain(tmp_path / "one")
    assert timeless(tmp_path / "over") == timeless(tmp_path / "one")
    assert objects(tmp_path / "over") == objects(tmp_path / "one")
    plan = json.loads((tmp_path / "over" / "plan.json").read_text())
    assert plan["labels"] == dict.fromkeys(SORTED)
    assert plan["objective"] == "task = sequence-classification"


def test_over_a_network_the_settings_name_the_labels(folder, tmp_path):
    config = classifier_config(folder, "bert")
    with pytest.raises(ConfigError, match="model.labels is missing: over a network"):
        prepare_client(config, "site0", tmp_path / "site0")
    with pytest.raises(ConfigError, match="model.labels is missing: over a network"):
        run_federation(InProcessTransport({}), config, tmp_path / "run")


def test_a_client_with_labels_in_another_order_is_left_out_by_name(folder, tmp_path):
    config = classifier_config(folder, "bert", federation={"num_rounds": 1}, **NAMED)
    swapped = replace(config.model, labels=["south", "north", "east"])
    clients = networked(config, tmp_path, ("site0", "site1"))
    clients |= networked(replace(config, model=swapped), tmp_path, ("site2",))
    handlers = {name: client.handle for name, client in clients.items()}
    run_federation(InProcessTransport(handlers), config, tmp_path / "run")
    row = timeless(tmp_path / "run")[1]
    assert row["accepted"] == ["site0", "site1"]
    assert "the classifier's labels differ: wanted 'east', 'north'" in row["failures"]["site2"]
    with pytest.raises(QuorumError, match="site2: its classifier's labels are 'south', 'north'"):
        alone = InProcessTransport({"site2": handlers["site2"]})
        run_federation(alone, config, tmp_path / "alone")


def test_labels_are_part_of_the_version(folder, tmp_path):
    config = classifier_config(folder, "bert", federation={"num_rounds": 1})
    run = prepare(config, tmp_path / "run")
    run.close()
    base = run.model.base
    versions = {
        version_of(replace(base, labels=labels), [])
        for labels in ((), SORTED, LABELS, ("east, north", "south"))
    }
    assert len(versions) == 4 and run.model.version in versions
    with pytest.raises(ModelError, match="the classifier's labels differ"):
        base.check(replace(base, labels=LABELS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda score: score["by_label"].clear(), "has 0 counts by label; wanted counts for each"),
        (
            lambda score: score["by_label"].update(west=score["by_label"].pop("east")),
            "counts the label 'west', which is none of the run's 3",
        ),
        (
            lambda score: score["by_label"]["east"].update(num_examples=99),
            "the counts of its labels do not add up",
        ),
    ],
)
def test_scores_with_impossible_labels_are_refused(folder, tmp_path, change, message):
    config = classifier_config(folder, "bert", federation={"num_rounds": 1}, **NAMED)
    clients = networked(config, tmp_path)
    handlers = {name: client.handle for name, client in clients.items()}
    honest = handlers["site2"]
    lie = altered(lambda fields: change(fields["metrics"]["total"]), "evaluate")
    handlers["site2"] = lambda payload: lie(payload, honest)
    run_federation(InProcessTransport(handlers), config, tmp_path / "run")
    assert message in timeless(tmp_path / "run")[1]["failures"]["site2"]


def test_a_head_of_another_shape_is_refused_by_client_and_tensor(folder, tmp_path):
    config = classifier_config(folder, "bert", federation={"num_rounds": 1}, **NAMED)
    clients = networked(config, tmp_path)
    handlers = {name: client.handle for name, client in clients.items()}

    def smaller(fields):
        key = "base_model.model.classifier.bias"
        fields["tensors"][key] = fields["tensors"][key][:2].clone()

    honest = handlers["site1"]
    lie = altered(smaller, "train")
    handlers["site1"] = lambda payload: lie(payload, honest)
    run_federation(InProcessTransport(handlers), config, tmp_path / "run")
    reason = timeless(tmp_path / "run")[1]["failures"]["site1"]
    assert reason == "tensor base_model.model.classifier.bias has shape (2,); wanted (3,)"


# ── labels and data ──


def test_the_plan_counts_and_names_the_labels(folder, tmp_path):
    config = classifier_config(folder, "bert")
    plan, clients = FederatedTrainer(config, tmp_path / "run").plan()
    counts = {label: 0 for label in SORTED}
    for client in clients:
        for category in client.train.categories:
            counts[category] += 1
    assert plan.labels == counts and sum(counts.values()) == 54
    assert not [warning for warning in plan.warnings if "longest" in warning]


def test_an_unknown_label_is_refused_by_client_and_name(folder, tmp_path):
    config = classifier_config(folder, "bert", model={"labels": ["east", "north"]})
    with pytest.raises(DataError, match="site0: the label 'south' is none of the classifier's 2"):
        prepare(config, tmp_path / "run")
    with pytest.raises(DataError, match="site1: the label 'south' is none of"):
        prepare_client(config, "site1", tmp_path / "site1")


def test_one_label_is_not_enough_unless_others_are_named(folder, tmp_path):
    file = write_rows(tmp_path / "one.jsonl", labeled_rows(0, 12, ["yes"]))
    data = {"client_files": {"site0": file}}
    with pytest.raises(DataError, match="all examples have the label 'yes'"):
        prepare(classifier_config(folder, "bert", data=data), tmp_path / "run")
    model = {"labels": ["yes", "no"]}
    run = prepare(classifier_config(folder, "bert", data=data, model=model), tmp_path / "run")
    run.close()
    assert run.plan.labels == {"yes": 9, "no": 0}


@pytest.mark.parametrize(
    ("section", "table", "message"),
    [
        ("data", {"category_column": "label"}, "data.category-column is 'label'; with model.task"),
        (
            "data",
            {"client_files": {}, "source": "reasoning-gym"},
            '"reasoning-gym" has answers, not labels',
        ),
        (
            "model",
            {"task": "regression"},
            "model.task must be causal-lm or sequence-classification; got",
        ),
        ("model", {"task": "causal-lm", "labels": ["a", "b"]}, "model.labels must be left out"),
        (
            "training",
            {"objective": "dpo"},
            'training.objective = "dpo" is for the answers of language models; model.task = ',
        ),
        (
            "training",
            {"loss_on": "all-assistant"},
            'training.loss-on = "all-assistant" is for the answers of language models; model.task',
        ),
        (
            "lora",
            {"start_from": "adapter"},
            "lora.start-from cannot be used with model.task = ",
        ),
        ("model", {"labels": ["a"]}, "model.labels must be two to 10000 different names"),
        ("model", {"labels": ["a", "a"]}, "model.labels must be two to 10000 different names"),
        ("model", {"labels": ["a", " "]}, "model.labels must be two to 10000 different names"),
    ],
)
def test_settings_that_fit_no_classifier_are_refused(folder, tmp_path, section, table, message):
    with pytest.raises(ConfigError, match=message):
        prepare(classifier_config(folder, "bert", **{section: table}), tmp_path / "run")


# ── scores ──


def test_evaluate_gives_the_runs_own_scores(finished):
    last = timeless(finished)[-1]["evaluation"]
    scored = evaluate_on(open_result(finished), None, LoadSettings()).tuned
    assert scored.all.total.by_label.keys() <= set(SORTED)
    for got, row in (
        (scored.all.total, last["total"]),
        *((scored.by_client[name], last["by_client"][name]) for name in last["by_client"]),
    ):
        assert got.num_examples == row["num_examples"] == row["num_tokens"]
        assert got.exact_match == row["exact_match"]
        assert got.macro_f1 == pytest.approx(row["macro_f1"], abs=1e-12)
        assert got.loss == pytest.approx(row["loss"], abs=1e-6)
    for label, score in scored.all.by_category.items():
        assert score.num_examples == last["total"]["by_label"][label]["num_examples"]
        assert score.loss == pytest.approx(last["by_category"][label]["loss"], abs=1e-6)


def test_evaluate_reads_labeled_data_and_refuses_what_is_not_for_it(finished, tmp_path):
    result = open_result(finished)
    file = write_rows(tmp_path / "more.jsonl", labeled_rows(5, 7, pairs=True))
    scored = evaluate_on(result, file, LoadSettings()).tuned
    assert scored.all.total.num_examples == 7 and scored.all.total.macro_f1 is not None
    unknown = write_rows(tmp_path / "odd.jsonl", labeled_rows(5, 7, ["west", "east"], pairs=True))
    with pytest.raises(DataError, match="the label 'west' is none of the classifier's 3 labels"):
        evaluate_on(result, unknown, LoadSettings())
    with pytest.raises(ConfigError, match="a classifier is scored by label"):
        evaluate_on(result, file, LoadSettings(), category_column="label")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(DataError, match="is no data for sequence classification"):
        evaluate_on(result, str(pairs), LoadSettings())
    with pytest.raises(ConfigError, match="gives labels and writes no text"):
        evaluate_on(result, file, LoadSettings(), by_generation=True)
    with pytest.raises(ConfigError, match="gives labels and writes no text.*fedmomentum evaluate"):
        answers(result, ["hi"], LoadSettings(), max_new_tokens=3, plain=False)
