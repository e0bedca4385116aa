"""Paired runs: the same data for every method, cells that resume, references that take a client's steps."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest

from fedmomentum.cli.tables import comparison_tables
from fedmomentum.config.toml import from_dict, load_config, to_dict
from fedmomentum.errors import ConfigError
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.results.comparison import read_comparison
from fedmomentum.run import compare
from fedmomentum.run.compare import (
    PlannedRun,
    execute_run,
    plan_runs,
    start_comparison,
)
from fedmomentum.run.compare import write_comparison as write
from fedmomentum.run.method_variants import parse_methods, parse_seeds
from fedmomentum.run.references import POOLED
from tests.runs import (
    Events,
    objects,
    patch_default_split,
    prepare,
    start,
    timeless,
    tiny_config,
)

METHODS = "fedmomentum,fedit,fedmomentum:split=singular,centralized,local"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def settings(folder, **sections):
    return tiny_config(folder, **{"federation": {"num_rounds": 2}, **sections})


@pytest.fixture(scope="module")
def done(folder):
    """Five methods and references, two seeds, really trained."""
    config, out = settings(folder), folder / "compared"
    planned_runs = plan_runs(config, parse_methods(METHODS, config), [0, 1], out)
    start_comparison(config, out)
    for planned_run in planned_runs:
        execute_run(planned_run)
    return (
        config,
        out,
        planned_runs,
        write(out, planned_runs, baseline="fedit", target=0.0, command="fedmomentum compare x"),
    )


# ── what is asked ──


def test_methods_are_names_with_settings(folder):
    config = settings(folder, method={"settings": {"energy": 0.9}})
    asked = (
        "fedmomentum, fedmomentum:split=singular;energy=1.0,fedit,local,lorafair:objective=ridge"
    )
    variants = parse_methods(asked, config)
    assert [(e.method.name, e.method.settings, e.kind) for e in variants] == [
        ("fedmomentum", {"energy": 0.9}, "federated"),
        ("fedmomentum", {"energy": 1.0, "split": "singular"}, "federated"),
        ("fedit", {}, "federated"),
        ("fedit", {}, "local"),
        ("lorafair", {"objective": "ridge"}, "federated"),
    ]
    assert [e.directory for e in variants] == [
        "fedmomentum",
        "fedmomentum-split-singular-energy-1.0",
        "fedit",
        "local",
        "lorafair-objective-ridge",
    ]


def test_a_method_may_have_settings_of_the_run_for_itself(folder):
    config = settings(folder)
    asked = "fedit,fedit:training.learning-rate=0.5,fedmomentum:split=singular;lora.rank=1,local:training.batch-size=3"
    variants = parse_methods(asked, config)
    assert [e.overrides for e in variants] == [
        (),
        ("training.learning-rate=0.5",),
        ("lora.rank=1",),
        ("training.batch-size=3",),
    ]
    assert [e.kind for e in variants] == ["federated"] * 3 + ["local"]
    assert variants[2].method.settings == {"split": "singular"}
    planned_runs = plan_runs(config, variants, [7], folder / "own")
    assert [
        (c.config.training.learning_rate, c.config.lora.rank, c.config.training.batch_size)
        for c in planned_runs[:4]
    ] == [
        (config.training.learning_rate, config.lora.rank, config.training.batch_size),
        (0.5, config.lora.rank, config.training.batch_size),
        (config.training.learning_rate, 1, config.training.batch_size),
        (config.training.learning_rate, config.lora.rank, 3),
    ]
    assert {c.config.run.seed for c in planned_runs} == {7} and {
        c.config.data.source for c in planned_runs
    } == {config.data.source}


def test_values_may_hold_commas_semicolons_and_colons(folder):
    asked = (
        'fedit:lora.target-modules=["q_proj", "v_proj"], fedit:training.function=json:dumps;'
        "lora.rank=1,fedit:lora.target-modules=.*(q|v)_[a-z]{1,9},"
        'fedmomentum:split=singular;lora.clients={"a,b:c;d"={rank=1}},'
        "fedmomentum.aggregation.methods.fedit:FedIT:training.function=json:dumps"
    )
    variants = parse_methods(asked, settings(folder))
    assert [(one.method.name, one.overrides) for one in variants] == [
        ("fedit", ('lora.target-modules=["q_proj", "v_proj"]',)),
        ("fedit", ("training.function=json:dumps", "lora.rank=1")),
        ("fedit", ("lora.target-modules=.*(q|v)_[a-z]{1,9}",)),
        ("fedmomentum", ('lora.clients={"a,b:c;d"={rank=1}}',)),
        ("fedmomentum.aggregation.methods.fedit:FedIT", ("training.function=json:dumps",)),
    ]
    planned_runs = plan_runs(settings(folder), variants[:3], [7], folder / "values")
    assert [one.config.lora.target_modules for one in planned_runs[::2]] == [
        ["q_proj", "v_proj"],
        ".*(q|v)_[a-z]{1,9}",
    ]
    assert planned_runs[1].config.training.function == "json:dumps"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name methods"),
        (",", "must name methods"),
        ("fedit,fedit", "each once"),
        ("fedavg", "unknown method"),
        ("fedavg", "centralized, local"),
        ("fedit:energy=1", "no setting 'energy'"),
        ("local:x=1", "has no settings of its own"),
        ("fedit:run.seed=3", "can differ between methods"),
        ("fedit:federation.num-rounds=3", "can differ"),
        ('fedit:federation."num-rounds"=3', "can differ"),
        ('fedit:lora.target-modules=["q_proj",v', "--methods: a quote or a bracket is not closed"),
        ("fedit:training.rate=3", "unknown key"),
        ("fedmomentum:split", "cannot be imported"),
        ("fedmomentum:split=a;b", "is no setting"),
        ("fedmomentum:split=equal", "split must be"),
    ],
)
def test_invalid_methods_are_refused(folder, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_methods(text, settings(folder))


@pytest.mark.parametrize(
    "text",
    [
        "fedmomentum:split=equal",
        "fedit:training.rate=3",
        "fedit:training.learning-rate=fast",
        "no_such_module:Mine",
    ],
)
def test_only_an_unknown_name_is_answered_with_the_names_there_are(folder, text):
    with pytest.raises(ConfigError) as caught:
        parse_methods(text, settings(folder))
    assert "references" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "a", "0,1.5", "-1", "0,0", "0,,1"])
def test_invalid_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="--seeds must be whole numbers"):
        parse_seeds(text)


def test_seeds_are_parsed_in_the_order_given():
    assert parse_seeds("3,0, 7") == [3, 0, 7]


def test_nothing_evaluated_is_nothing_to_compare(folder, tmp_path):
    config = settings(folder, evaluation={"every": 0})
    with pytest.raises(ConfigError, match=r"evaluation\.every"):
        plan_runs(config, parse_methods("fedit", config), [0], tmp_path)


# ── runs ──


def test_cells_are_the_runs_that_the_command_run_makes(done, folder, tmp_path):
    config, out, planned_runs, _ = done
    assert [str(planned_run.directory.relative_to(out)) for planned_run in planned_runs[:7]] == [
        "fedmomentum/seed-0",
        "fedit/seed-0",
        "fedmomentum-split-singular/seed-0",
        "centralized/seed-0",
        "local/seed-0/site0",
        "local/seed-0/site1",
        "local/seed-0/site2",
    ]
    start(
        settings(folder, run={"seed": 1}, method={"name": "fedit"}), tmp_path / "run", function=None
    )
    assert timeless(out / "fedit" / "seed-1") == timeless(tmp_path / "run")


def test_a_seed_gives_every_method_the_same_start(done):
    _, out, _, _ = done
    rows = {
        name: timeless(out / name / "seed-0")
        for name in ("fedmomentum", "fedit", "fedmomentum-split-singular")
    }
    for name in rows:
        parts = [
            json.loads((out / one / "seed-0" / "partition.json").read_text())["clients"]
            for one in (name, "fedit")
        ]
        assert parts[0] == parts[1]
        for key in ("evaluation", "version"):
            assert rows[name][0][key] == rows["fedit"][0][key]
        for key in ("participants", "weights", "num_examples", "clients", "train_loss"):
            assert (
                rows[name][1][key] == rows["fedit"][1][key]
            )  # the first round's training, to the bit
    one, two = (
        GlobalModel.load(out / "fedit" / f"seed-{seed}").adapter.digest() for seed in (0, 1)
    )
    assert one != two


def test_references_are_scored_on_all_clients_items_and_take_a_clients_steps(done):
    _, out, _, _ = done
    federated = timeless(out / "fedit" / "seed-0")
    runs = [
        out / "centralized" / "seed-0",
        *(out / "local" / "seed-0" / f"site{k}" for k in range(3)),
    ]
    for run in runs:
        rows = timeless(run)
        for row, other in zip(rows, federated, strict=True):
            for key in ("total", "compared"):
                assert (
                    row["evaluation"][key]["num_examples"]
                    == other["evaluation"][key]["num_examples"]
                )
                assert (
                    row["evaluation"][key]["num_tokens"] == other["evaluation"][key]["num_tokens"]
                )
            assert (
                row["evaluation"]["by_category"].keys() == other["evaluation"]["by_client"].keys()
            )
        untouched = rows[0]["evaluation"]
        for client, score in federated[0]["evaluation"]["by_client"].items():
            assert untouched["by_category"][client]["nll"] == pytest.approx(score["nll"], rel=1e-6)
        for row, other in zip(rows[1:], federated[1:], strict=True):
            (own,) = row["clients"].values()
            assert own["num_steps"] == other["clients"]["site0"]["num_steps"] == 2
        if run.name.startswith("site"):  # a client alone starts as it does in the federation
            assert rows[1]["clients"][run.name] == federated[1]["clients"][run.name]
    (row,) = timeless(runs[0])[1]["num_examples"].items()
    assert row == (POOLED, sum(federated[1]["num_examples"].values()))


@pytest.mark.parametrize("only", [None, "site1"])
def test_epochs_of_a_reference_are_a_clients_steps(folder, tmp_path, only):
    tables = to_dict(settings(folder))
    tables["training"] = {"local-epochs": 2.0, "batch-size": 3, "learning-rate": 0.01}
    config = from_dict(tables)
    run = prepare(config, tmp_path / "run")
    run.close()
    clients = run.clients
    compare.make_reference(run, only)
    (client,) = run.clients
    per_epoch = math.ceil(len(client.train) / 3)
    steps = math.ceil(run.config.training.local_epochs * per_epoch)
    if only:
        assert run.config.training.local_epochs == 2 and len(client.train) == len(clients[1].train)
    else:
        wanted = [math.ceil(2 * math.ceil(len(one.train) / 3)) for one in clients]
        assert steps == pytest.approx(sum(wanted) / 3, abs=1) and len(client.train) == sum(
            len(o.train) for o in clients
        )
    assert run.plan.num_clients == 1 and run.config.evaluation.final_num_examples == len(
        client.test
    )


def test_references_where_clients_train_less(folder, tmp_path):
    config = settings(
        folder, lora={"clients": {"site0": {"rank": 1}}}, federation={"num_rounds": 1}
    )
    planned_runs = plan_runs(
        config, parse_methods("fedmomentum,centralized,local", config), [0], tmp_path
    )
    assert [planned_run.config.lora.rank for planned_run in planned_runs] == [2, 2, 1, 2, 2]
    for planned_run in planned_runs[:3]:
        execute_run(planned_run)
        assert planned_run.is_finished() and not timeless(planned_run.directory)[1]["failures"]
    with pytest.raises(ConfigError, match="needs every client at one rank"):
        parse_methods("fedit", config)


def test_finished_cells_are_not_run_again_and_killed_ones_resume(
    done, folder, tmp_path, monkeypatch
):
    config, finished, _, _ = done
    variants = parse_methods("fedmomentum,centralized", config)
    planned_runs = plan_runs(config, variants, [0], tmp_path)
    assert [planned_run.is_finished() for planned_run in planned_runs] == [False, False]
    for planned_run in planned_runs:
        stop = {"left": 2}

        def killed(event, facts, stop=stop):
            stop["left"] -= event == "row"
            if not stop["left"]:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            execute_run(planned_run, callbacks=[Events(killed)])
        assert not planned_run.is_finished() and len(timeless(planned_run.directory)) == 2
        execute_run(planned_run)
        assert planned_run.is_finished()
        other = finished / planned_run.directory.relative_to(tmp_path)
        assert timeless(planned_run.directory) == timeless(other) and objects(
            planned_run.directory
        ) == objects(other)
    more = plan_runs(settings(folder, federation={"num_rounds": 3}), variants, [0], tmp_path)
    assert not more[0].is_finished()
    execute_run(more[1])
    assert len(timeless(more[1].directory)) == 4 and more[1].is_finished()
    with pytest.raises(ConfigError, match="has 3 rounds and 2 are requested"):
        planned_runs[1].is_finished()


def test_references_continue_their_optimizer_and_resume_with_it(folder, tmp_path):
    config = settings(folder, training={"optimizer_state": "auto"})
    variants = parse_methods("fedmomentum,fedit,centralized,local", config)
    planned_runs = plan_runs(config, variants, [0], tmp_path / "whole")
    states = [run.config.training.optimizer_state for run in planned_runs]
    assert states == ["shared", "fresh", "local", "local", "local", "local"]
    assert compare.optimizer_states(planned_runs) == {"fedmomentum": "shared", "fedit": "fresh"}
    killed_runs = plan_runs(config, variants, [0], tmp_path / "parts")
    for uninterrupted, parts in list(zip(planned_runs, killed_runs, strict=True))[2:4]:
        execute_run(uninterrupted)

        def stop(event, facts):
            if event == "row" and facts["round"] == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            execute_run(parts, callbacks=[Events(stop)])
        execute_run(parts)
        assert timeless(parts.directory) == timeless(uninterrupted.directory)
        assert objects(parts.directory) == objects(uninterrupted.directory)
        # Not what a fresh optimizer in every round gives.
        fresh = settings(folder, training={"optimizer_state": "fresh"})
        label = uninterrupted.variant.label
        planned = plan_runs(fresh, parse_methods(label, fresh), [0], tmp_path / f"fresh-{label}")
        execute_run(planned[0])
        assert objects(planned[0].directory) != objects(uninterrupted.directory)


def test_the_directory_of_a_run_is_no_comparison(done, folder):
    config, _, planned_runs, _ = done
    with pytest.raises(ConfigError, match="holds a run; give the comparison a directory of its"):
        plan_runs(config, parse_methods("fedit", config), [0], planned_runs[0].directory)


def test_a_cell_or_a_comparison_of_other_settings_is_refused(done, folder):
    config, out, planned_runs, _ = done
    other = settings(folder, training={"learning_rate": 0.5})
    with pytest.raises(
        ConfigError, match=r"compared was made with other settings.*training\.learning-rate"
    ):
        plan_runs(other, parse_methods("fedit", other), [0], out)
    for planned_run in (planned_runs[0], planned_runs[3]):
        changed = PlannedRun(planned_run.variant, planned_run.seed, planned_run.directory, other)
        for refused in (changed.is_finished, lambda changed=changed: execute_run(changed)):
            with pytest.raises(ConfigError, match=r"other settings.*training\.learning-rate"):
                refused()
    fewer = settings(folder, evaluation={"num_examples": 1}, method={"name": "fedit"})
    with pytest.raises(ConfigError, match=r"evaluation\.num-examples"):
        execute_run(PlannedRun(planned_runs[3].variant, 0, planned_runs[3].directory, fewer))


def test_a_run_from_before_a_default_changed_is_not_taken_for_the_method_as_it_is_now(
    folder, tmp_path, monkeypatch
):
    """Neither finished nor continued under its label; with its settings in full it is continued."""

    def planned(method, num_rounds):
        config = settings(folder, federation={"num_rounds": num_rounds})
        (planned_run,) = plan_runs(config, parse_methods(method, config), [0], tmp_path / "all")
        return planned_run

    with monkeypatch.context() as patch:
        patch_default_split(patch, "procrustes")
        begun = planned("fedmomentum", 1)
        execute_run(begun)
        assert begun.is_finished()
    for num_rounds in (1, 2):
        now = planned("fedmomentum", num_rounds)
        for refused in (now.is_finished, lambda now=now: execute_run(now)):
            with pytest.raises(ConfigError, match=r"procrustes.* stand for .*balanced.* now"):
                refused()
    in_full = planned("fedmomentum:split=procrustes", 2)
    in_full = replace(in_full, directory=begun.directory)
    execute_run(in_full)
    assert in_full.is_finished()


# ── the result ──


def test_a_comparison_is_read_back_as_it_was_written(done):
    config, out, planned_runs, comparison = done
    assert comparison.methods == METHODS.split(",") and comparison.baseline == "fedit"
    assert len(comparison.method_runs) == 10
    table = json.loads((out / "comparison.json").read_text())
    local = next(one for one in table["cells"] if one["method"] == "local")
    assert (
        local["folders"] == [f"local/seed-0/site{k}" for k in range(3)] and local["kind"] == "local"
    )
    by_name = {one["method"]: one for one in table["summary"]}
    for name in ("fedmomentum", "local"):
        own = {
            planned_run.seed: planned_run.loss
            for planned_run in comparison.method_runs
            if planned_run.method == name
        }
        base = {
            planned_run.seed: planned_run.loss
            for planned_run in comparison.method_runs
            if planned_run.method == "fedit"
        }
        assert by_name[name]["loss_difference"]["mean"] == pytest.approx(
            sum(own[s] - base[s] for s in (0, 1)) / 2
        )
        assert by_name[name]["loss_difference"]["count"] == 2
    assert by_name["fedit"]["loss_difference"] is None and by_name["fedit"]["reached"] == 2
    assert (
        by_name["local"]["bytes_to_target"] is None
        and by_name["fedit"]["bytes_to_target"]["mean"] > 0
    )
    alone = [timeless(out / folder)[-1]["evaluation"] for folder in local["folders"]]
    planned_run = next(
        planned_run for planned_run in comparison.method_runs if planned_run.method == "local"
    )
    assert planned_run.loss == pytest.approx(sum(one["total"]["loss"] for one in alone) / 3)
    assert planned_run.by_client["site1"][1] == alone[1]["by_category"]["site1"]["loss"]
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    assert len(rows) == 10 and float(rows[0]["loss"]) == comparison.method_runs[0].loss
    reloaded = read_comparison(out)
    assert reloaded.method_runs == comparison.method_runs
    assert load_config(out / "config.toml") == config


def test_tables_in_the_terminal(done):
    from rich.console import Console

    console = Console(width=160, file=io.StringIO())
    for table in comparison_tables(done[3]):
        console.print(table)
    text = console.file.getvalue()
    assert (
        "Difference to fedit" in text
        and "local" in text
        and "2 of 2" in text
        and "±" in text
        and "[" in text
    )


# ── secure aggregation ──


def test_with_secure_aggregation_methods_are_refused_before_anything_runs(folder, tmp_path):
    """And references, which are one client each, have no sums."""
    config = settings(folder, privacy={"secure-aggregation": True})
    with pytest.raises(ConfigError, match="HetLoRA needs every client's update by itself"):
        plan_runs(config, parse_methods("fedmomentum,hetlora", config), [0], tmp_path)
    asked = "fedmomentum,centralized,local"
    planned_runs = plan_runs(config, parse_methods(asked, config), [0], tmp_path)
    secure = {run.title: run.config.privacy.secure_aggregation for run in planned_runs}
    assert secure.pop("fedmomentum, seed 0") and len(secure) == 4 and not any(secure.values())
    (federated, *_) = planned_runs
    assert federated.config.training.optimizer_state == "fresh"
