"""Client names and their directories on disk."""

import re
from dataclasses import replace

import pytest

from fedmomentum.config.toml import from_dict
from fedmomentum.data.examples import ClientData, Example
from fedmomentum.errors import ConfigError, DataError
from fedmomentum.utils.names import MAX_LENGTH, check_client_name, directory_name, readable_name
from tests.data.test_client_data import load_clients

ODD = (
    "north",
    "north-2",
    "north-0002",
    "North",
    "NORTH",
    "a/b",
    "a_b",
    "a b",
    "a",
    "..",
    ".",
    "...",
    ".hidden",
    "-x",
    "*",
    "?",
    "[x]",
    "[!n]*",
    "north*",
    "~",
    "north~1",
    "é",
    "e\u0301",
    "東京",
    "🏥",
    "a" * 64,
    "a" * 65,
    "A" * 64,
    "a" * MAX_LENGTH,
    "é" * MAX_LENGTH,
    "con",
    "a.",
    "a\\b",
    "/etc/passwd",
    "../../x",
    "$HOME",
    "%41",
    "'",
    '"',
    "a:b",
    "a=b",
    "<b>",
    " north",
    "north ",
)
REFUSED = (
    "",
    " ",
    "\t",
    "a\nb",
    "a\x00b",
    "\x1b[31m",
    "a\u2028b",
    "\u202eabc",
    "\ud800",
    "a" * (MAX_LENGTH + 1),
)


def test_every_name_has_a_directory_of_its_own_on_any_file_system():
    names = [directory_name(name) for name in ODD]
    assert len({name.lower() for name in names}) == len(ODD)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._~-]*", name) and len(name) <= 73


def test_a_plain_name_is_its_own_directory_and_no_other_name_is_plain():
    plain = [name for name in ODD if directory_name(name) == name]
    assert plain == ["north", "north-2", "north-0002", "a_b", "a", "a" * 64, "con", "a."]
    assert directory_name("a/b").startswith("a_b~") and directory_name(
        directory_name("a/b")
    ) != directory_name("a/b")


@pytest.mark.parametrize("name", ODD)
def test_any_printable_name_is_accepted(name):
    check_client_name(name, "here")
    data = {"client-files": {name: "x.jsonl"}}
    assert list(
        from_dict({"data": data, "lora": {"clients": {name: {"rank": 2}}}}).data.client_files
    ) == [name]
    assert ClientData(name, (Example("q", "a"),), ()).client_id == name


@pytest.mark.parametrize("name", [*REFUSED, 5, None])
def test_invalid_names_are_refused_with_their_place(name):
    for table in (
        {"data": {"client-files": {name: "x.jsonl"}}},
        {"lora": {"clients": {name: {"rank": 2}}}},
    ):
        with pytest.raises(ConfigError, match=r"data.client-files|lora.clients") as refused:
            from_dict(table)
        assert str(refused.value).isprintable()
    with pytest.raises(DataError, match="the data"):
        ClientData(name, (Example("q", "a"),), ())


def test_a_name_in_a_column_is_refused_with_its_row(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('who,prompt,completion\nnorth,a,b\n"so\x07uth",c,d\n')
    with pytest.raises(
        DataError,
        match=r"rows.csv: row 2: column 'who' holds '\\x07', a character that cannot be shown",
    ):
        load_clients(source=file, client_column="who", test_fraction=0)
    file.write_text("who,prompt,completion\nnorth,a,b\na/../b,c,d\n")
    assert [
        client.client_id
        for client in load_clients(source=file, client_column="who", test_fraction=0)
    ] == [
        "a/../b",
        "north",
    ]


def test_a_comparisons_folders_come_from_the_same_rule(tmp_path, monkeypatch):
    from fedmomentum.run import compare
    from fedmomentum.run.method_variants import parse_methods
    from tests.runs import tiny_config

    config = tiny_config(tmp_path, num_clients=1)
    odd = ["..", "../../x", "A", "a", "a/b", "*"]
    config = replace(config, data=replace(config.data, client_files=dict.fromkeys(odd, "x.jsonl")))
    cells = compare.plan_runs(config, parse_methods("local", config), [0], tmp_path / "out")
    folders = [cell.directory for cell in cells]
    assert [cell.only for cell in cells] == sorted(odd) and len(
        {str(f).lower() for f in folders}
    ) == len(odd)
    assert all(
        folder.resolve().parent == (tmp_path / "out" / "local" / "seed-0").resolve()
        for folder in folders
    )


def test_trackers_distinguish_names_that_they_write_alike():
    from fedmomentum.run.tracking import numbers_of

    row = {
        "round": 1,
        "evaluation": {
            "by_client": {"a*": {"loss": 1.0}, "a?": {"loss": 2.0}, "a_": {"loss": 3.0}}
        },
    }
    found = numbers_of(row)
    assert list(found.values()) == [1.0, 2.0, 3.0] and len(found) == 3
    assert all(re.fullmatch(r"[\w.\-/ ]+", tag) for tag in found)


def test_labels_of_a_comparison_are_readable_and_short():
    assert (
        readable_name("fedmomentum:split=singular;energy=1.0")
        == "fedmomentum-split-singular-energy-1.0"
    )
    assert readable_name("..") == "-" and "/" not in readable_name("../../x")
    long = [readable_name("a:x=" + "1" * 400 + end) for end in "12"]
    assert len(set(long)) == 2 and max(map(len, long)) < 200


@pytest.mark.parametrize("name", ["[/red]", "[x]", "[bold", "a[/]"])
def test_a_name_is_not_read_as_markup(name):
    """A closing tag that opens nothing would end the run where its progress is drawn."""
    from io import StringIO

    from rich.console import Console

    from fedmomentum.cli.progress import RunView

    console = Console(file=StringIO(), force_terminal=True, width=120)
    with RunView(console, 2) as live:
        live.on_round_begin(1, [name])
        live.on_step(name, 1, 2, 1.5)
        live.show_replies(0, 1, f"waiting for {name}")
        live._live.refresh()
    assert f"waiting for {name}" in console.file.getvalue()
