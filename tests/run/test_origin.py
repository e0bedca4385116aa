"""A project that was moved resumes where it stopped; with other data or another base under the same names it does not."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from fedmomentum.config.toml import load_config, to_toml
from fedmomentum.errors import ConfigError, DataError, ModelError
from fedmomentum.run import compare
from fedmomentum.run.method_variants import parse_methods
from fedmomentum.run.origin import with_given_locations
from tests.runs import Events, chain, objects, prepare, start, timeless, tiny_config
from tests.tiny import tiny_llama

JOB = """
[model]
name = "base"
dtype = "float32"
device = "cpu"
[lora]
rank = 2
target-modules = ["q_proj"]
[data]
test-fraction = 0.25
category-column = "kind"
[data.client-files]
north = "site0.jsonl"
"a/b.c=d" = "site1.jsonl"
[training]
local-steps = 1
batch-size = 4
optimizer-state = "fresh"
[federation]
num-rounds = 2
[evaluation]
num-examples = 2
final-num-examples = 4
every = 1
[run]
threads = 1
"""


def stopped(config, out):
    """A run that was interrupted after its first round."""

    def stop(event, facts):
        if event == "row" and facts["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(config, out, observer=stop)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A project: configuration, data, base model and an interrupted run, all in one directory."""
    place = tmp_path_factory.mktemp("made") / "project"
    place.mkdir()
    tiny_config(place, num_clients=2)
    (place / "job.toml").write_text(JOB)
    stopped(load_config(place / "job.toml"), place / "runs" / "job")
    return place


@pytest.fixture
def project(original, tmp_path):
    """The project in another place, moved from where the run was started: its old paths lead nowhere."""
    hidden = original.with_name("hidden")
    new = tmp_path / "elsewhere" / "moved project"
    shutil.copytree(original, new)
    original.rename(hidden)
    yield new
    hidden.rename(original)


@pytest.fixture(scope="module")
def uninterrupted(original):
    """The same run, not interrupted."""
    start(load_config(original / "job.toml"), original.parent / "whole")
    return original.parent / "whole"


def test_a_moved_run_resumes_from_the_projects_configuration(project, uninterrupted):
    start(load_config(project / "job.toml"), project / "runs" / "job", resume=True)
    assert timeless(project / "runs" / "job") == timeless(uninterrupted)
    assert chain(project / "runs" / "job").keys() == chain(uninterrupted).keys()
    assert objects(project / "runs" / "job") == objects(uninterrupted)
    saved = load_config(project / "runs" / "job" / "config.toml")
    assert saved.model.name == str(project / "base")  # where things are now is what is saved


def test_a_moved_run_resumes_from_its_own_configuration(project, uninterrupted):
    """Its paths are those of the old place; what lay beside the run's directory then lies there now."""
    out = project / "runs" / "job"
    start(load_config(out / "config.toml"), out, resume=True)
    assert timeless(out) == timeless(uninterrupted) and objects(out) == objects(uninterrupted)


def test_a_runs_directory_alone_says_what_is_missing_and_takes_it_from_options(
    project, uninterrupted, tmp_path, call
):
    out = tmp_path / "alone"
    shutil.move(project / "runs" / "job", out)
    command = ["run", out / "config.toml", "--out", out, "--resume"]
    code, _, err = call(*command)
    assert (
        code == 2
        and "client north: there is no" in err
        and "--data NAME=FILE" in err
        and "Traceback" not in err
    )
    data = [
        "--data",
        f"north={project / 'site0.jsonl'}",
        "--data",
        f"a/b.c=d={project / 'site1.jsonl'}",
    ]
    code, _, err = call(*command, *data)
    assert code == 2 and "If the base model is somewhere else now, give --base DIR" in err
    code, _, err = call(*command, *data, "--base", project / "base")
    assert code == 0, err
    assert len(timeless(out)) == 3
    code, printed, err = call("evaluate", out)
    assert code == 0 and "7 examples" in printed, err


def test_results_of_a_moved_run_are_used_without_further_options(project, tmp_path, call):
    out = project / "runs" / "job"
    for words in (
        ["export", out, "--to", "merged", "--out", tmp_path / "merged"],
        ["export", out, "--to", "adapter", "--out", tmp_path / "adapter"],
        ["evaluate", out],
        ["generate", out, "--prompt", "ab", "--max-new-tokens", "2"],
    ):
        code, _, err = call(*words)
        assert code == 0, err
    shutil.move(project / "base", tmp_path / "base")
    for words in (
        ["export", out, "--to", "merged", "--out", tmp_path / "again"],
        ["evaluate", out],
        ["generate", out, "--prompt", "ab"],
    ):
        code, _, err = call(*words)
        assert code == 2 and "--base" in err and "Traceback" not in err
        assert call(*words, "--base", tmp_path / "base")[0] == 0


# ── other content ──


def test_other_data_under_the_same_name_is_refused(project):
    file = project / "site0.jsonl"
    rows = file.read_text().splitlines()
    out = project / "runs" / "job"
    config = load_config(project / "job.toml")
    before = (out / "config.toml").read_bytes()
    for changed in (
        rows[1:],
        rows[::-1],
        [*rows[:-1], rows[-1].replace('"question": "', '"question": "x')],
        [*rows, rows[0]],
    ):
        file.write_text("\n".join(changed) + "\n")
        with pytest.raises(
            DataError,
            match=r"made with other data; it differs for north \((training|held-out) examples",
        ):
            prepare(config, out, resume=True)
    file.write_text("\n".join(rows) + "\n")
    assert (out / "config.toml").read_bytes() == before
    prepare(config, out, resume=True).close()


def test_another_template_is_refused(project):
    template = project / "base" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|> "))
    with pytest.raises(DataError, match="the tokenizer or chat template|base model's tokenizer"):
        prepare(load_config(project / "job.toml"), project / "runs" / "job", resume=True)


def test_another_base_is_refused(project, tmp_path):
    other = tiny_llama(tmp_path / "other", seed=9)
    config = with_given_locations(load_config(project / "job.toml"), str(other), [])
    with pytest.raises(ModelError, match="base model differs"):
        prepare(config, project / "runs" / "job", resume=True)


def test_other_clients_are_refused(project):
    config = load_config(project / "job.toml")
    files = {
        "north": config.data.client_files["north"],
        "south": config.data.client_files["a/b.c=d"],
    }
    with pytest.raises(ConfigError, match="these differ: data.client-files"):
        prepare(
            replace(config, data=replace(config.data, client_files=files)),
            project / "runs" / "job",
            resume=True,
        )


def test_the_checkpoint_records_the_data_too(project):
    """data.json records where the data were; every checkpoint records what they were."""
    out = project / "runs" / "job"
    (out / "data.json").unlink()
    prepare(load_config(project / "job.toml"), out, resume=True).close()
    file = project / "site0.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(DataError, match="made with other data; it differs for north"):
        prepare(load_config(project / "job.toml"), out, resume=True)


def test_nothing_is_deleted_for_an_older_round_before_everything_is_checked(project, call):
    out = project / "runs" / "job"
    before = {
        file: file.read_bytes()
        for file in out.rglob("*")
        if file.is_file() and file.name != ".lock"
    }
    file = project / "site0.jsonl"
    rows = file.read_text()
    file.write_text("\n".join(rows.splitlines()[1:]) + "\n")
    command = ["run", project / "job.toml", "--out", out, "--resume", "--round", "0"]
    code, _, err = call(*command)
    assert code == 2 and "made with other data" in err
    assert {file: file.read_bytes() for file in before} == before
    file.write_text(rows)
    code, _, err = call("run", project / "job.toml", "--out", out, "--round", "0")
    assert code == 2 and "--round needs --resume" in err
    code, _, err = call(*command[:-1], "7")
    assert code == 2 and "keeps the rounds [0, 1]" in err
    code, _, err = call(*command)
    assert code == 0 and len(timeless(out)) == 3, err


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"directory": 5, "clients": {}}', '{"directory": "x"}', "\x00"]
)
def test_a_damaged_record_is_refused_by_name(project, damage):
    out = project / "runs" / "job"
    (out / "data.json").write_text(damage)
    with pytest.raises(ModelError, match=re.escape(str(out / "data.json"))):
        prepare(load_config(project / "job.toml"), out, resume=True)


# ── where things are ──


def test_data_is_named_by_client_or_once(original, tmp_path):
    config = load_config(original / "job.toml")
    file = tmp_path / "x=y.jsonl"
    file.write_text("x")
    moved = with_given_locations(config, "", [f"a/b.c=d={file}", f"north={file}"])
    assert moved.data.client_files == {"north": str(file), "a/b.c=d": str(file)}
    with pytest.raises(
        ConfigError,
        match="--data must be NAME=FILE with the name of a client, one of a/b.c=d, north",
    ):
        with_given_locations(config, "", [str(file)])
    shared = replace(config, data=replace(config.data, client_files={}, source="rows.jsonl"))
    assert with_given_locations(shared, "", [str(file)]).data.source == str(file)
    with pytest.raises(ConfigError, match="--data can be given once"):
        with_given_locations(shared, "", ["a", "b"])
    assert with_given_locations(config, str(original / "base"), []).model.name == str(
        original / "base"
    )
    assert with_given_locations(config, "owner/name", []).model.name == "owner/name"
    # A revision belongs to its model: it comes with the name, and goes with it.
    hub = with_given_locations(config, "owner/name@v2", []).model
    assert (hub.name, hub.revision) == ("owner/name", "v2")
    pinned = replace(config, model=hub)
    for base, expected in (
        ("owner/name", "v2"),
        ("owner/name@main", "main"),
        ("owner/other", None),
        (str(original / "base"), None),
    ):
        assert with_given_locations(pinned, base, []).model.revision == expected, base


# ── comparisons ──


def compared(config, out, only=None):
    cells = compare.plan_runs(config, parse_methods("fedit,local", config), [0], out)
    left = [cell for cell in cells if not cell.is_finished()]
    compare.start_comparison(config, out)
    for cell in left[:only]:
        compare.execute_run(cell)
    return len(left), cells


def test_a_moved_comparison_resumes(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    tiny_config(old, num_clients=2)
    (old / "job.toml").write_text(JOB)
    assert compared(load_config(old / "job.toml"), old / "out", only=1)[0] == 3
    stopped_cell = compare.plan_runs(
        load_config(old / "job.toml"),
        parse_methods("fedit,local", load_config(old / "job.toml")),
        [0],
        old / "out",
    )[1]

    def stop(event, facts):
        if event == "row" and facts["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.execute_run(stopped_cell, callbacks=[Events(stop)])
    old.rename(new)
    left, cells = compared(load_config(new / "job.toml"), new / "out")
    assert left == 2 and all(cell.is_finished() for cell in cells)
    # the next seed would be on other data than the first
    file = new / "site1.jsonl"
    file.write_text(file.read_text().replace('"ab"', '"zz"'))
    with pytest.raises(DataError, match="made with other data"):
        compared(load_config(new / "job.toml"), new / "out")


def test_a_comparison_on_another_base_is_refused(tmp_path):
    tiny_config(tmp_path, num_clients=2)
    (tmp_path / "job.toml").write_text(JOB)
    compared(load_config(tmp_path / "job.toml"), tmp_path / "out", only=1)
    shutil.rmtree(tmp_path / "base")
    tiny_llama(tmp_path / "base", seed=9)
    with pytest.raises(ModelError, match="base model differs"):
        compared(load_config(tmp_path / "job.toml"), tmp_path / "out")


def test_the_record_names_every_client(original):
    record = json.loads((original / "runs" / "job" / "data.json").read_text())
    assert record["directory"] == str(original / "runs" / "job")
    assert record["clients"].keys() == {"north", "a/b.c=d"}
    assert all(
        len(one[key]) == 64
        for one in record["clients"].values()
        for key in ("train", "held_out", "tokens")
    )


def test_a_saved_configuration_is_read_back(original):
    config = load_config(original / "job.toml")
    file = original / "again.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config
    file.unlink()
