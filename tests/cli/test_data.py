"""`data` shows what a file is taken for and what is learned; `init` writes what a run of it needs."""

import json

import datasets
import pytest
import typer

from fedmomentum.cli.main import app
from fedmomentum.cli.options import OUT
from fedmomentum.config.toml import load_config
from fedmomentum.data import load_clients
from fedmomentum.errors import ConfigError, ModelError
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


def show(capsys, *words):
    code = 0
    try:
        code = app(["data", *map(str, words)], standalone_mode=False) or 0
    except typer.Exit as stop:
        code = stop.exit_code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_length_of_zero_is_refused_and_not_taken_for_the_default(tmp_path, call):
    file = tmp_path / "north.jsonl"
    file.write_text('{"question": "Q?", "answer": "A"}\n')
    code, _, err = call("data", file, "--max-length", 0)
    assert code == 2 and "data.max-length must be at least 2; got 0" in err


def test_what_a_run_of_the_configuration_would_refuse_is_refused(base, tmp_path, capsys):
    row = {"question": "Q?", "answer": "A", "office": "north", "topic": "forms", "id": 1}
    write(tmp_path / "d.jsonl", row, {**row, "question": "R?", "office": "south"})
    write(tmp_path / "t.jsonl", {"text": "a", "label": "x", "topic": "forms"})
    config = tmp_path / "c.toml"

    def described(*lines):
        config.write_text("\n".join((f'model.name = "{base}"', *lines)) + "\n")
        code, out, err = show(capsys, "--config", config)
        return code, " ".join(out.split()), " ".join(err.split())

    source = 'data.source = "d.jsonl"'
    code, out, _ = described(
        source, 'data.client-column = "office"', 'data.category-column = "topic"'
    )
    assert code == 0 and "not read id rows 2 of clients north 1, south 1" in out
    code, _, err = described(source, 'data.client-column = "branch"')
    assert code == 2 and "no column 'branch'" in err
    code, _, err = described(source, 'training.objective = "dpo"')
    assert code == 2 and "needs rows of prompt, chosen and rejected" in err
    with pytest.raises(ConfigError, match="data.category-column is 'topic'; with model.task"):
        described(
            'model.task = "sequence-classification"',
            'data.source = "t.jsonl"',
            'data.category-column = "topic"',
        )
    # other files than the run's need not name its clients
    config.write_text(f'model.name = "{base}"\n{source}\ndata.client-column = "branch"\n')
    other = write(tmp_path / "other.jsonl", row)
    assert show(capsys, other, "--config", config)[0] == 0


def test_what_is_recognized_learned_dropped_and_repeated_is_shown(base, tmp_path, capsys):
    row = {"q": "2+2?", "a": "4", "id": 1}
    file = write(
        tmp_path / "d.jsonl", row, row, {"q": "x" * 90, "a": "y"}, {"q": "2+", "a": "z" * 40}
    )
    words = ("--model", base, "--column", "question=q", "--column", "answer=a", "--max-length", 60)
    code, out, _ = show(capsys, file, *words)
    assert code == 0
    squeezed = " ".join(out.split())
    for line in (
        "file JSON Lines encoding UTF-8 format question+answer",
        "columns read q (as question), a (as answer) not read id rows 4",
        "<|im_start|>assistant ⟦4<|im_end|>⟧",
        "rows cut at data.max-length = 60 tokens: 1 of 4",
        "rows whose prompt alone fills data.max-length = 60 tokens: 1 (3); that is more than",
        "rows that repeat an earlier one: 1",
        "share their prompt with another: 2",
    ):
        assert line in squeezed, line
    assert "row 3" in out and "row 4" not in out


def test_turns_that_are_learned_are_marked(base, tmp_path, capsys):
    turns = [
        ("user", "a", None),
        ("assistant", "bb", 0),
        ("user", "c", None),
        ("assistant", "d", 1),
    ]
    chat = [{"role": role, "content": text, "weight": weight} for role, text, weight in turns]
    file = write(tmp_path / "d.jsonl", {"messages": chat}, {"messages": chat[:1] + chat[3:]})
    _, out, _ = show(capsys, file, "--model", base, "--loss-on", "all-assistant")
    shown = out.partition("is in ⟦…⟧:")[2]
    assert shown.count("⟦") == 2 == shown.count("⟦d<|im_end|>⟧") and "bb<|im_end|>" in shown


def test_narrow_terminals_cut_nothing_off(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(OUT, "_width", 30)
    text = "word " * 40
    file = write(tmp_path / "d.jsonl", {"prompt": text, "chosen": "yes", "rejected": "no"})
    _, out, _ = show(capsys, file, "--model", base)
    assert out.count("word") == 40 and "rejected: no" in out
    assert max(map(len, out.splitlines()[1:])) <= 30


def test_labels_are_shown_beside_texts(base, tmp_path, capsys):
    file = write(tmp_path / "d.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": "y"})
    code, out, _ = show(capsys, file, "--model", base, "--task", "sequence-classification")
    assert code == 0 and "label: x" in out and "⟦4" not in out


def test_a_broken_file_ends_with_2_and_the_others_are_shown(base, tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", {"question": "a", "answer": "b"})
    bad = write(tmp_path / "bad.jsonl", {"question": "a", "answer": "b"}, {"question": "a"})
    code, out, err = show(capsys, bad, good, "--model", base)
    assert code == 2 and "⟦b<|im_end|>⟧" in out
    assert "bad.jsonl: row 2: column 'answer' is None; it must be text" in " ".join(err.split())


def test_the_files_of_a_configuration_are_shown(base, tmp_path, capsys):
    for client in ("north", "south"):
        write(tmp_path / f"{client}.jsonl", {"Frage": client, "answer": "b"})
    config = tmp_path / "office.toml"
    config.write_text(
        f'model.name = "{base}"\n[data.client-files]\nnorth = "north.jsonl"\nsouth = "south.jsonl"\n'
        '[data.columns]\nquestion = "Frage"\n'
    )
    code, out, _ = show(capsys, "--config", config)
    assert code == 0 and "north<|im_end|>" in out and "south<|im_end|>" in out


def test_each_source_of_a_configuration_is_read_by_its_split(base, tmp_path, capsys):
    """As a run reads it: `split` of the source, `test-split` of the test source."""
    parts = {
        name: datasets.Dataset.from_list([{"question": f"{name}?", "answer": "a"}])
        for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(test=parts["test"]).save_to_disk(tmp_path / "only")
    for test_source in ("both", "only"):
        config = tmp_path / "c.toml"
        config.write_text(
            f'model.name = "{base}"\ndata.source = "both"\ndata.test-source = "{test_source}"\n'
        )
        code, out, err = show(capsys, "--config", config)
        first, second = out.split("The first examples", 2)[1:]
        assert (code, err) == (0, "")
        assert "train?" in first and "test?" in second and "train?" not in second
        assert "split" in out


# ── init ──


def begin(capsys, *words):
    app(["init", *map(str, words)], standalone_mode=False)
    return capsys.readouterr().out


def test_a_first_configuration_is_written_for_one_file_a_client(base, tmp_path, capsys):
    for client in ("north", "south"):
        rows = [{"Frage": f"{client} {i}?", "a": "b" * 70, "id": i} for i in range(40)]
        write(tmp_path / f"{client}.jsonl", *rows)
    out = tmp_path / "sub" / "first.toml"
    files = [tmp_path / "north.jsonl", tmp_path / "south.jsonl"]
    columns = ("--column", "question=Frage", "--column", "answer=a")
    output = begin(capsys, *files, "--model", base, "--out", out, *columns)
    assert f"fedmomentum data --config {out}" in output.replace("\n", "")
    text = out.read_text()
    assert "# columns that are not read: id" in text and "40 rows, question+answer" in text
    config = load_config(out)
    assert config.data.client_files == {
        client: str(tmp_path / f"{client}.jsonl") for client in ("north", "south")
    }
    assert config.data.columns == {"question": "Frage", "answer": "a"}
    assert config.data.max_length == 128 and config.training.local_steps == 5
    assert [len(client.train) for client in load_clients(config.data, 0)] == [36, 36]
    with pytest.raises(ConfigError, match="is there already"):
        begin(capsys, *files, "--out", out)


@pytest.mark.parametrize(
    ("content", "words", "section", "settings"),
    [
        (
            [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(8)],
            (),
            "training",
            {"objective": "dpo", "local_steps": 1},
        ),
        (
            [{"text": f"t{i}", "label": "xy"[i % 2]} for i in range(8)],
            ("--task", "sequence-classification"),
            "model",
            {"task": "sequence-classification"},
        ),
        ([{"text": f"t{i}"} for i in range(3)], (), "data", {"num_clients": 1, "max_length": 64}),
    ],
)
def test_a_first_configuration_fits_what_is_in_the_file(
    content, words, section, settings, base, tmp_path, capsys
):
    file = write(tmp_path / 'a "b".jsonl', *content)
    out = tmp_path / "c.toml"
    begin(capsys, file, "--model", base, "--out", out, *words)
    config = load_config(out)
    assert config.data.source == str(file)
    for name, value in settings.items():
        assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("num_rows", "num_clients"),
    [(1, 1), (7, 1), (8, 1), (15, 1), (16, 2), (31, 3), (32, 4), (90, 4)],
)
def test_a_first_configuration_can_be_run_however_few_rows_there_are(
    num_rows, num_clients, base, tmp_path, capsys
):
    rows = [{"question": f"{i}?", "answer": "a"} for i in range(num_rows)]
    file = write(tmp_path / "d.jsonl", *rows)
    begin(capsys, file, "--model", base, "--out", tmp_path / "c.toml")
    config = load_config(tmp_path / "c.toml")
    clients = load_clients(config.data, 0)
    assert len(clients) == num_clients
    assert sum(len(client.train) + len(client.test) for client in clients) == num_rows


def test_files_that_do_not_identify_their_clients_are_refused(base, tmp_path, capsys):
    row = {"question": "a", "answer": "b"}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "d.jsonl", row)
    files = [tmp_path / "a" / "d.jsonl", tmp_path / "b" / "d.jsonl"]
    begin(capsys, *files, "--model", base, "--out", tmp_path / "c.toml")
    assert sorted(load_config(tmp_path / "c.toml").data.client_files) == ["a", "b"]
    with pytest.raises(ConfigError, match="do not tell their clients apart"):
        begin(capsys, files[0], files[0], "--model", base, "--out", tmp_path / "e.toml")
    other = write(tmp_path / "x.jsonl", {"text": "a"})
    with pytest.raises(ConfigError, match="different formats"):
        begin(capsys, files[0], other, "--model", base, "--out", tmp_path / "e.toml")
    assert not (tmp_path / "e.toml").exists()


def test_a_model_of_the_hub_is_named_with_its_revision(hub, base, tmp_path, capsys):
    files = {file.name: file.read_bytes() for file in base.iterdir()}
    repository = hub.add("org/model", files)
    repository.refs["v1"] = repository.refs["main"]
    repository.commit({"README.md": b"emptied"})
    file = write(
        tmp_path / "rows.jsonl", *({"question": f"{i}?", "answer": "4"} for i in range(12))
    )
    out = tmp_path / "job.toml"
    app(
        ["init", str(file), "--model", "org/model@v1", "--out", str(out)],
        standalone_mode=False,
    )
    assert load_config(out).model.name == "org/model"
    assert load_config(out).model.revision == "v1"
    # Weights are no part of it; another model does not have the revision of the configuration's.
    assert not hub.asked("GET", "safetensors") and not hub.asked("GET", "/objects/")
    capsys.readouterr()
    assert show(capsys, file, "--config", out)[0] == 0
    assert show(capsys, file, "--config", out, "--model", str(base))[0] == 0
    with pytest.raises(ModelError, match="org/model"):
        show(capsys, file, "--config", out, "--model", "org/model@v9")
