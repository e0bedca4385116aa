"""The documentation is true: its code runs, its links lead somewhere, its tables are complete."""

import dataclasses
import importlib
import json
import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import torch
import typer

from fedmomentum import (
    Adapter,
    FederatedTrainer,
    GlobalModel,
    RunResults,
    aggregate_adapters,
    load_config,
    write_adapter,
)
from fedmomentum.aggregation import Method
from fedmomentum.aggregation.registry import METHODS
from fedmomentum.cli.main import app
from fedmomentum.config.__main__ import render_reference
from fedmomentum.config.toml import from_dict
from fedmomentum.formats.scores import LabelCounts, Score
from fedmomentum.formats.withheld import SUMS_ONLY
from fedmomentum.linalg.low_rank import weighted_sum
from fedmomentum.linalg.spectral import relative_error
from fedmomentum.training.arguments import ALLOWED_ARGUMENTS, check_arguments
from fedmomentum.utils.io import sha256
from fedmomentum.utils.schema import Schema
from tests.aggregation import test_method_contract as contract
from tests.classifiers import labeled_rows, tiny_base, write_rows
from tests.helpers import TOLERANCE, random_matrix
from tests.runs import start, timeless, tiny_config
from tests.tiny import tiny_llama

ROOT = Path(__file__).parent.parent
APPENDIX = ROOT / "docs" / "appendix"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE
    )


def documented(page: Path) -> set[str]:
    """Names in backticks in the first column of a page's tables."""
    cells = re.findall(r"^\| (`[^|]*`) \|", page.read_text(), flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


# ── links and names ──


@pages
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
            }, target


@pages
def test_commands_and_their_options_exist(page):
    command_line = typer.main.get_command(app)
    for line in re.findall(
        r"(?:^|`)fedmomentum ([a-z][^`\n]*)", page.read_text(), flags=re.MULTILINE
    ):
        words = line.split()
        assert words[0] in command_line.commands, line
        command = command_line.commands[words[0]]
        if words[1:] and words[1] in getattr(command, "commands", {}):
            command = command.commands[words[1]]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_the_readme_names_every_command():
    documented_commands = set(
        re.findall(
            r"^\| `fedmomentum (\w+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE
        )
    )
    assert documented_commands == set(typer.main.get_command(app).commands)


def test_the_generated_parts_of_the_architecture_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    architecture = importlib.import_module("architecture")
    assert (ROOT / "docs" / "architecture.md").read_text() == architecture.page(), "run: make docs"
    assert architecture.FIGURE.read_text() == architecture.figure(), "run: make docs"


def test_tests_named_in_the_documentation_exist():
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", "".join(page.read_text() for page in PAGES))
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(), (file, name)


def test_configuration_page_is_made_from_the_classes():
    assert (ROOT / "docs" / "configuration.md").read_text() == render_reference(), "run: make docs"


def test_training_page_lists_the_arguments_that_can_be_set():
    (line,) = re.findall(
        r"^These can be set: (.*)\.$", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE
    )
    assert set(re.findall(r"`(\w+)`", line)) == ALLOWED_ARGUMENTS


# ── code ──


@pages
def test_toml_is_accepted(page):
    for text in blocks(page, "toml"):
        table = tomllib.loads(text)
        if not table.get("data"):
            table["data"] = {"source": "data.jsonl"}
        config = from_dict(table)
        check_arguments(config.training.arguments)


def toy_adapter(seed: int, rank: int, alpha: float, base: str = "toy") -> Adapter:
    modules = {
        f"model.layers.{i}.self_attn.q_proj": random_matrix(
            12, 10, rank, seed=seed + i, dtype=torch.float32
        )
        for i in range(2)
    }
    config = {"base_model_name_or_path": base, "r": rank, "lora_alpha": alpha}
    return Adapter(
        modules, dict.fromkeys(modules, alpha / rank), config=config, name=f"client {seed}"
    )


@pytest.fixture
def two_adapters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(toy_adapter(0, 2, 4.0), "north-adapter")
    write_adapter(toy_adapter(10, 4, 4.0), "south-adapter")
    return tmp_path


def test_the_guides_job_is_the_one_that_comes_with_the_package():
    guide = blocks(ROOT / "docs" / "deployment.md", "toml")
    (job,) = (text for text in guide if "join-timeout" in text)
    assert job in (ROOT / "fedmomentum" / "configs" / "job.toml").read_text()


def test_the_readmes_python_runs(two_adapters, capsys):
    (text,) = (t for t in blocks(ROOT / "README.md", "python") if "aggregate_adapters" in t)
    names: dict = {}
    exec(text, names)
    result, adapters = names["result"], names["adapters"]
    for module in result.adapter.modules:
        got = weighted_sum([result.adapter.effective(module), result.residual[module]], [1, 1])
        wanted = weighted_sum([adapter.effective(module) for adapter in adapters], [0.75, 0.25])
        assert relative_error(got, wanted) < TOLERANCE[torch.float32]
    assert "self_attn.q_proj" in capsys.readouterr().out


def test_the_readmes_aggregate_commands_run(two_adapters):
    lines = re.findall(
        r"^fedmomentum (aggregate .*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE
    )
    assert len(lines) == 2
    for line in lines:
        app(line.replace("--rank 16", "--rank 4").split(), standalone_mode=False)
    assert GlobalModel.load("combined").adapter.modules["model.layers.0.self_attn.q_proj"].rank == 4
    assert json.loads(Path("one-adapter/adapter_config.json").read_text())["r"] == 6


def test_the_guides_aggregate_commands_run(two_adapters, capsys):
    """And the two results are one sum."""
    text = (ROOT / "docs" / "combining.md").read_text()
    lines = re.findall(r"^fedmomentum ((?:aggregate|inspect) .*)$", text, flags=re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["aggregate", "aggregate", "inspect"]
    for line in lines:
        app(line.replace("--rank 8", "--rank 3").split(), standalone_mode=False)
    assert "residual" in capsys.readouterr().out
    assert GlobalModel.load("combined").adapter.modules["model.layers.0.self_attn.q_proj"].rank == 3
    assert json.loads(Path("one-adapter/adapter_config.json").read_text())["r"] == 6


@pytest.fixture(scope="module")
def median():
    """The method of docs/adding-a-method.md, as the module it would be."""
    (text,) = blocks(ROOT / "docs" / "adding-a-method.md", "python")
    module = ModuleType("median_from_the_docs")
    sys.modules[module.__name__] = module  # dataclasses and pickle look it up
    exec(compile(text, "docs/adding-a-method.md", "exec"), module.__dict__)
    yield module.MedianLoRA()
    del sys.modules[module.__name__]


def test_the_added_method_is_new_and_obeys_the_contract(median):
    assert type(median).__name__.lower() not in METHODS
    contract.test_it_is_a_method_that_says_whether_it_is_exact(median)
    contract.test_declarations_are_consistent(median)
    contract.test_law_2_a_single_client_is_returned_unchanged(median)
    contract.test_law_2_clients_that_agree_get_what_they_agree_on(median)
    for server_round in (1, 2):
        contract.test_factors_that_are_not_sent_are_known_to_clients_or_can_be_drawn(
            median, server_round
        )
        contract.test_law_1_what_is_lost_is_reported(median, server_round)
        contract.test_law_2_order_of_clients_does_not_matter(median, server_round)
    for dtype in TOLERANCE:
        contract.test_law_3_rank_dtype_and_shape_are_as_requested(median, dtype)
    contract.test_unequal_ranks_are_refused_where_they_have_no_meaning(median)
    contract.test_a_clients_own_adapter_and_its_tail_are_the_global_one(median)
    contract.test_inputs_are_untouched_and_calls_are_pure(median)
    contract.test_bad_input_is_refused_by_name(median)
    contract.test_repr_equality_and_pickling(median)


def test_the_added_method_withstands_an_outlier_client(median):
    honest = [toy_adapter(0, 4, 4.0)] * 4
    outlier = toy_adapter(10, 4, 4e6)
    for method, moved in ((median, False), (METHODS["fedit"](), True)):
        result = aggregate_adapters([*honest, outlier], method=method, scaling=1.0)
        for module in result.adapter.modules:
            assert (
                relative_error(result.adapter.effective(module), honest[0].effective(module)) > 1
            ) is moved


def test_the_added_method_runs(median, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "medianlora", type(median))
    run = start(
        tiny_config(tmp_path, method={"name": "medianlora"}, federation={"num_rounds": 2}),
        tmp_path / "run",
    )
    assert run.model.method == "MedianLoRA()" and not run.model.base_update
    assert all(len(row["accepted"]) == 3 for row in timeless(tmp_path / "run")[1:])


def test_declarations_in_the_docs_are_those_of_a_method():
    names = documented(ROOT / "docs" / "adding-a-method.md")
    declared = {name for name in vars(Method) if not name.startswith("_")}
    assert declared <= {name.partition("(")[0] for name in names}


def test_the_table_of_methods_is_what_they_declare():
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = {
        row[0]: row[1:]
        for row in re.findall(r"^\| `(\w+)` \|" + r" ([^|]*) \|" * 6 + "$", text, re.MULTILINE)
    }
    assert list(rows) == list(METHODS)

    def numbers(cell: str, r: int, q: int) -> list[int]:
        """The formulas of a cell, for odd and even rounds, of a 40 x 30 module."""
        formulas = [part for part in cell.split(", ") if not part.startswith("q ")]
        code = [
            f.replace("·", "*").replace("−", "-").replace("out", "40").replace("in", "30")
            for f in formulas
        ]
        return [eval(c, {"P": lambda x: x * 70, "r": r, "q": q}) for c in (code * 2)[:2]]

    for name, (paper, exact, unequal, trains, up, down) in rows.items():
        method = METHODS[name]()
        assert (
            paper.startswith(method.title) and re.search(r"\[([\w.]+)\]", paper)[1] in method.paper
        )
        assert exact.split(",")[0] == ("yes" if method.exact else "no")
        assert unequal == ("yes" if method.unequal_ranks else "no")
        assert (trains.split(", ") * 2)[:2] == [
            method.trained_factors(1),
            method.trained_factors(2),
        ]
        assert numbers(up, 4, 7) == [method.num_uplink_parameters(40, 30, 4, t) for t in (1, 2)], (
            name
        )
        # Without q, the residual's rank is fixed by the method.
        residual = 7 if "q" in down else method.max_residual_rank(4, 3)
        assert numbers(down, 4, residual) == [
            method.num_downlink_parameters(40, 30, 4, residual, t) for t in (1, 2)
        ], name
        assert re.search(rf"^## {method.title}$", text, re.MULTILINE)


def test_the_table_of_settings_is_what_the_methods_have():
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| `([^`]+)` \| ([^|]+) \|$", text, flags=re.MULTILINE
    )
    documented_settings = {}
    for method, setting, default, values in rows:
        documented_settings[method, setting] = tomllib.loads(f"x = {default}")["x"]
        # The named values are accepted; the default comes first.
        choices = [
            tomllib.loads(f"x = {choice}")["x"] for choice in re.findall("`([^`]+)`", values)
        ]
        assert choices[:1] in ([], [documented_settings[method, setting]])
        for choice in choices:
            METHODS[method](**{setting: choice})
    declared = {}
    for name, method in METHODS.items():
        for field in dataclasses.fields(method):
            declared[name, field.name] = field.default
    assert documented_settings == declared


# ── examples ──


def test_the_readmes_training_runs(tmp_path, monkeypatch, capsys):
    (text,) = (t for t in blocks(ROOT / "README.md", "python") if "FederatedTrainer" in t)
    (config,) = (t for t in blocks(ROOT / "README.md", "toml") if "[data.client-files]" in t)
    monkeypatch.chdir(tmp_path)
    for client in ("north", "south"):
        rows = [{"question": f"{client} {i}?", "answer": "ab"} for i in range(12)]
        Path(f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config.replace("smollm2-135m-instruct", str(tiny_llama(tmp_path / "base")))
    config = config.replace("local-steps = 20", "local-steps = 2")
    Path("office.toml").write_text(config.replace("num-rounds = 10", "num-rounds = 1"))
    names: dict = {}
    exec(text, names)
    assert [record.round for record in names["rounds"]] == [0, 1]
    assert names["model"].server_round == 1
    assert Path("office-merged/config.json").is_file()
    assert Path("office-adapter/adapter_config.json").is_file()
    assert capsys.readouterr().out.startswith("0 None None\n1 ")


def test_the_readmes_classifier_runs(tmp_path, monkeypatch):
    (config,) = (t for t in blocks(ROOT / "README.md", "toml") if "classification" in t)
    assert len(config.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "tickets.jsonl", labeled_rows(0, 60))
    base = tiny_base(tmp_path / "base", "bert")
    Path("tickets.toml").write_text(config.replace("path/to/an-encoder", str(base)))
    overrides = ["federation.num-rounds=1", "data.max-length=32", "training.local-steps=1"]
    trainer = FederatedTrainer(load_config("tickets.toml", overrides), "runs/tickets")
    assert trainer.train().base.labels == ("east", "north", "south")
    rows = RunResults.load("runs/tickets").rounds
    assert rows[1].evaluation.total.macro_f1 is not None


def test_the_readmes_preferences_run(tmp_path, monkeypatch):
    (config,) = (t for t in blocks(ROOT / "README.md", "toml") if '"dpo"' in t)
    (row,) = (json.loads(t) for t in blocks(ROOT / "README.md", "json") if '"rejected"' in t)
    assert len(config.strip().splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    for client in ("north", "south"):
        rows = []
        for number in range(12):
            question = {**row["prompt"][0], "content": f"{client} {number}?"}
            rows.append(row | {"prompt": [question], "chosen": "ab"})
        Path(f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("preferences.toml").write_text(config)
    base = tiny_llama(tmp_path / "base")
    overrides = [f"model.name={base}", "training.local-steps=2", "federation.num-rounds=1"]
    run = FederatedTrainer(load_config("preferences.toml", overrides), "runs/preferences")
    run.train()
    rounds = RunResults.load("runs/preferences").rounds
    assert rounds[0].evaluation.total.margin == 0 != rounds[1].evaluation.total.margin


def run_notebook(name: str, base: Path, monkeypatch) -> dict:
    """Run a notebook's code cells, in order and in one namespace, on a tiny model and one thread."""
    monkeypatch.setattr("fedmomentum.run.setup.available_cpus", lambda: 1)
    notebook = json.loads((ROOT / "examples" / name).read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict = {}
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            source = "".join(cell["source"]).replace("smollm2-135m-instruct", str(base))
            exec(compile(source, cell["id"], "exec"), names)
    return names


def test_the_quickstart_notebook_runs(tmp_path, monkeypatch, capsys):
    base = tiny_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names = run_notebook("quickstart.ipynb", base, monkeypatch)
    output = capsys.readouterr().out
    assert "Rounds: 3" in output and "tuned:" in output and "Exact match:" in output
    assert (tmp_path / "runs" / "office" / "report.html").is_file()
    assert (tmp_path / "office-merged" / "config.json").is_file()
    for module, residual in names["result"].residual.items():
        assert residual.rank >= 0 and names["result"].adapter.modules[module].rank == 4


def test_the_notebook_on_combining_runs(tmp_path, monkeypatch, capsys):
    base = tiny_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    names = run_notebook("combining.ipynb", base, monkeypatch)
    output = capsys.readouterr().out
    assert output.count(": kept ") == 3 and "both:" in output and "north: loss" in output
    # Ranks 8 and 4, and an adapter of both that leaves nothing out.
    north, south = names["adapters"]
    tolerance = TOLERANCE[torch.float32]
    for module, matrix in names["whole"].adapter.modules.items():
        assert (north.modules[module].rank, south.modules[module].rank) == (8, 4)
        assert matrix.rank == 12
        wanted = north.effective(module).dense() + south.effective(module).dense()
        found = 2 * names["whole"].adapter.effective(module).dense()
        assert float((found - wanted).norm() / wanted.norm()) < tolerance
        # What of rank 8 is left out is in the residual.
        result = names["result"]
        both = result.adapter.effective(module).dense() + result.residual[module].dense()
        assert float((2 * both - wanted).norm() / wanted.norm()) < tolerance


def test_aggregate_by_hand_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "aggregate_by_hand.py"), run_name="__main__")
    out = capsys.readouterr().out
    fedit, fedmomentum = (float(e) for e in re.findall(r"what the model gets: (\S+)", out))
    assert fedit > 0.01 and fedmomentum < 1e-12


def test_custom_training_is_shown_in_full_and_trains_a_run(tmp_path, monkeypatch):
    assert (ROOT / "examples" / "own_training.py").read_text() in blocks(
        ROOT / "docs" / "training.md", "python"
    )
    monkeypatch.chdir(ROOT / "examples")
    settings = tiny_config(
        tmp_path,
        training={"function": "own_training:train", "local_steps": 4, "learning_rate": 0.5},
        federation={"num_rounds": 2},
    )
    start(settings, tmp_path / "run", function=None)
    rows = timeless(tmp_path / "run")
    assert all(row["failures"] == {} for row in rows)
    assert rows[2]["clients"]["site1"]["num_steps"] == 4
    assert rows[2]["evaluation"]["total"]["loss"] < rows[0]["evaluation"]["total"]["loss"]
    monkeypatch.delitem(sys.modules, "own_training")


# ── tables ──


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    settings = tiny_config(
        folder,
        method={"settings": {"split": "aligned", "energy": 0.8}},
        federation={"num_rounds": 2},
    )
    start(settings, folder / "run")
    return folder / "run"


def keys_of(value, named_by_user: set[str]) -> set[str]:
    """Every key at every depth, but those that are names of clients and categories."""
    if not isinstance(value, dict):
        return set()
    return {k for k in value if k not in named_by_user}.union(
        *(keys_of(v, named_by_user) for v in value.values())
    )


def test_every_metric_is_documented(run_folder):
    documented_keys = documented(ROOT / "docs" / "metrics.md")
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    names = set(rows[2]["participants"]) | set(rows[2]["evaluation"]["by_category"])
    assert rows[2]["carried_norm"] > 0
    written = set().union(*(keys_of(row, names) for row in rows))
    # What only the scores of pairs have, and only those of a classifier.
    written |= Score(0.5, 1, 1, 1, margin=0.5).to_json().keys()
    counts = {"x": LabelCounts(1, 2, 1), "y": LabelCounts(1, 0, 0)}
    written |= keys_of(Score(0.5, 2, 2, 1, by_label=counts).to_json(), set(counts))
    # What a run without secure aggregation does not withhold.
    written |= msgspec.to_builtins(SUMS_ONLY).keys()
    assert written == documented_keys


def test_the_tables_of_metrics_are_those_of_the_record(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    page = ROOT / "docs" / "metrics.md"
    assert page.read_text() == importlib.import_module("metrics_tables").page(), "run: make docs"


def test_every_manifest_key_and_file_is_documented(run_folder):
    page = ROOT / "docs" / "file-formats.md"
    documented_keys = documented(page)
    manifest = json.loads((run_folder / "rounds" / "0002.json").read_text())
    for table in (manifest, manifest["base"], manifest["run"]):
        assert table.keys() <= documented_keys
    assert (
        manifest.keys() - {"run", "sizes", "sha256"}
        == GlobalModel.load(run_folder).manifest().keys()
    )
    for file in run_folder.iterdir():
        assert re.search(rf"^{re.escape(file.name)}\b", page.read_text(), flags=re.MULTILINE), (
            file.name
        )
    for file in (run_folder / "objects").iterdir():
        assert file.name == f"{sha256(file.read_bytes())}.safetensors"


def test_every_field_of_the_wire_format_is_documented():
    from fedmomentum.protocol import messages

    documented_fields = documented(ROOT / "docs" / "file-formats.md")
    for kind in vars(messages).values():
        if isinstance(kind, type) and issubclass(kind, Schema):
            assert set(kind.__struct_fields__) <= documented_fields, kind


def test_the_results_are_those_of_the_committed_runs(monkeypatch):
    """The tables of docs/appendix/results.md are what the script makes of the committed numbers."""
    monkeypatch.syspath_prepend(ROOT / "experiments" / "banking77")
    text = (ROOT / "docs" / "appendix" / "results.md").read_text()
    figures = importlib.import_module("figures")
    assert figures.tables().strip() in text
    assert figures.target_table("", figures.NAMES) in text
    moments = importlib.import_module("moments_figures")
    assert figures.target_table("moments-", moments.NAMES) in text
    all_methods = importlib.import_module("methods_figures")
    tables = all_methods.tables().strip()
    assert tables.count("FedMomentum, balanced, shared") == 2 and tables in text
    assert all_methods.gain_table() in text
    assert importlib.import_module("ablations_figures").tables().strip() in text
    classifier = importlib.import_module("classifier")
    published = classifier.read_scores(classifier.PUBLISHED)
    assert len(published) == len(METHODS) * len(classifier.SEEDS)
    assert classifier.table(published) in text
    private = importlib.import_module("private_figures")
    for table in private.tables(private.read_rows(private.TABLE)).split("\n\n"):
        assert table in (ROOT / "docs" / "privacy.md").read_text()
    cells = importlib.import_module("cells_figures")
    for table in (cells.tables(), cells.replication()):
        assert table.count("\n") > 1 and table in text
    monkeypatch.syspath_prepend(ROOT / "experiments" / "smollm2")
    language_model = importlib.import_module("tables")
    for comparison in language_model.TITLES:
        assert language_model.tables(comparison).strip() in text, comparison
    assert language_model.tables("methods")


def test_what_the_docs_report_of_a_gpu_was_measured_on_one(monkeypatch):
    """The section exists if its numbers do, and its tables are what the benchmark renders."""
    text, numbers = (
        (APPENDIX / "performance.md").read_text(),
        APPENDIX / "performance" / "gpu.json",
    )
    assert ("\n## On a GPU\n" in text) == numbers.is_file()
    if numbers.is_file():
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        measured = json.loads(numbers.read_text())
        assert not measured["tiny"] and measured["environment"]["device"]["driver"]
        assert importlib.import_module("gpu_tables").tables(measured).strip() in text
        readme = (ROOT / "README.md").read_text()
        for trained in measured["training"]:
            (client,) = (way for way in trained["speed"] if way["side"] == "client, train()")
            assert f" {client['ratio']:.2f}" in readme, trained["size"]


def test_the_readme_says_what_the_committed_runs_say(monkeypatch):
    """Of the gain by shared moments, and of the methods that are level with FedMomentum's."""
    monkeypatch.syspath_prepend(ROOT / "experiments" / "banking77")
    figures = importlib.import_module("methods_figures")
    readme = (ROOT / "README.md").read_text()
    for setting in figures.TITLES:
        exact = figures.measures(setting)["exact_match"]
        gain = figures.difference(exact, figures.DEFAULT, "fedmomentum")
        low, mean, high = (f"{100 * value:.1f}" for value in (gain.low, gain.mean, gain.high))
        (row,) = re.findall(rf"^\| Banking77.*, {setting} local steps \|.*$", readme, re.MULTILINE)
        assert f"| +{mean} points [{low}, {high}] |" in row
        (named,) = re.findall(r"level with (.*?) with shared moments", row)
        level = {figures.NAMES[method] for method in figures.level_methods(setting)}
        assert set(re.split(", | and ", named)) == level
    assert figures.not_behind_as_published() == []


def test_the_figures_of_quantization_are_those_of_the_committed_numbers(monkeypatch):
    text = (ROOT / "docs" / "quantization.md").read_text()
    monkeypatch.syspath_prepend(ROOT / "experiments")
    quantization = importlib.import_module("quantization")
    for table in quantization.tables().values():
        assert table in text
    # The text's claims about it are true of the numbers.
    numbers = json.loads(quantization.NUMBERS.read_text())
    held = numbers["holding"]
    assert all(held[name]["share"] < 0.01 for name in held if "nf4" in name or "int8," in name)
    assert held["bfloat16 and D in 8 bits"]["error"] < 0.01
    logits = numbers["logits"]
    stock = logits.pop("bitsandbytes' own int8")
    assert stock["padding"] > 0.01 and stock["quantization"] > 2 * logits["int8"]["quantization"]
    assert all(row["padding"] < 1e-5 for row in logits.values())


def test_the_tables_of_performance_are_those_of_the_committed_numbers(monkeypatch):
    text, folder = (APPENDIX / "performance.md").read_text(), APPENDIX / "performance"
    monkeypatch.syspath_prepend(ROOT / "experiments")
    assert importlib.import_module("energy").table() in text
    measured = json.loads((folder / "catching-up.json").read_text())
    (*rows, newcomer), busy = measured["missed"].values()
    for row in rows:
        sizes = (row["mean"], row["least"], row["most"], row["missed"] * measured["part"])
        assert f"| {row['missed']} | {' | '.join(f'{size:.2f}' for size in sizes)} |" in text
    sizes = [f"{newcomer[key]:.2f}" for key in ("mean", "least", "most")]
    assert f"| all: it is new | {' | '.join(sizes)} | |" in text
    for row, other in zip((*rows, newcomer), busy, strict=True):
        assert all(abs(row[key] - other[key]) < 1e-3 for key in ("mean", "least", "most"))
    traffic: dict[str, list[float]] = {}
    for row in json.loads((folder / "wire.json").read_text())[
        "traffic"
    ]:  # by model, then by number of clients
        traffic.setdefault(row["method"], []).extend([row["up_bytes"], row["down_bytes"]])
    for method, (up7, ten7, _, hundred7, up8, ten8, _, hundred8) in traffic.items():
        cells = " | ".join(
            f"{size / 1e9:.2f}" for size in (up7, ten7, hundred7, up8, ten8, hundred8)
        )
        assert re.search(
            rf"^\| `{method.split(',')[0]}`.* \| {re.escape(cells)} \|$", text, re.MULTILINE
        ), method


def test_the_costs_of_secure_sums_are_those_of_the_committed_numbers(monkeypatch):
    """The table of docs/privacy.md is what the benchmark renders; the claims about it are true."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("secure_sum")
    measured = json.loads((APPENDIX / "performance" / "secure-sum.json").read_text())
    text = (ROOT / "docs" / "privacy.md").read_text()
    assert f"\n{benchmark.tables(measured)}\n" in text
    assert [row["parties"] for row in measured["rows"] if not row["left"]] == [3, 10, 30, 100]
    assert f"({4 * measured['parameters'] / 1e6:.2f} MB)" in text
    errors = [row["error"] for row in measured["rows"]]
    bounds = [row["error_bound"] for row in measured["rows"]]
    assert max(errors) <= max(bounds) <= 7e-7 and "at most 7·10⁻⁷" in text
    # "twice the adapter", from what was sent
    for row in measured["rows"]:
        sent = row["up_bytes"] - row["besides_values_bytes"]
        assert sent == pytest.approx(2 * 4 * measured["parameters"], rel=1e-3)


# ── big models ──


def test_the_tables_of_big_models_are_the_plans():
    """Every model and setting has a row, and a row is what the plan computes now."""
    page = (ROOT / "docs" / "big-models.md").read_text()
    tool = runpy.run_path(str(ROOT / "tools" / "big_models_table.py"))
    for name in [*tool["MODELS"], *tool["SETTINGS"]]:
        assert f"\n| {name} | " in page, "run: make docs"
    assert f"\n{tool['model_row']('Llama 3.2 1B')}\n" in page, "run: make docs"
