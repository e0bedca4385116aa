"""The page of a comparison: complete, safe, reproducible; its numbers are those of the runs."""

import csv
import json
import re
import shutil

import pytest

from fedmomentum.errors import ConfigError, ModelError
from fedmomentum.report import write_comparison_page
from fedmomentum.results.comparison import read_comparison
from fedmomentum.results.method_summary import summarize_methods
from tests.report.folders import row, score, write_record, write_run
from tests.report.test_page import Page

CLIENTS = ["client-0", "client-1", "client-2"]
SECTIONS = ["scores", "rounds", "method", "clients", "settings", "commands"]
EVIL = "<script>alert(1)</script>"
SHIFT = {"one": 0, "two:split=a": 3, "centralized": 5, "local": -4}
PLOTS = {
    "exact-match-difference",
    "loss-difference",
    "exact-match",
    "loss",
    "exact-match-bytes",
    "loss-bytes",
    "retained-energy",
    "residual-rank",
    "update-cosine",
    "angle-a",
    "angle-b",
    "by-client",
}


def write_folder(
    root,
    methods=tuple(SHIFT),
    seeds=(0, 1, 2),
    rounds=4,
    config="[training]\nlocal-steps = 3\n",
    **extra,
):
    cells = []
    for k, method in enumerate(methods):
        kind = method if method in ("centralized", "local") else "federated"
        for seed in seeds:
            folders = []
            for who in CLIENTS if kind == "local" else ["all"]:
                own = CLIENTS if kind == "federated" else [who]
                rows = []
                for t in range(rounds):
                    one = row(t, own, ["a"], seed=seed)
                    level = 10 * t + SHIFT.get(method, k) * (t > 0) + 3 * seed + 5
                    one["evaluation"]["total"] = score(level, 100, 2 - level / 100)
                    one["evaluation"]["compared"] = score(level // 2, 50, 2 - level / 100)
                    if kind != "federated":
                        one["evaluation"]["by_category"] = {
                            c: score(level // 2, 50, 1.0) for c in CLIENTS
                        }
                    one["diagnostics"] = (
                        None
                        if t == 0
                        else {
                            "update_norm": 1.0,
                            "update_cosine": None if t == 1 else 0.3,
                            "client_drift": 0.5,
                            "client_cosine": {"min": 0.1, "mean": 0.2, "max": 0.3},
                            "subspace_angle": {"A": 10.0, "B": 20.0},
                            "factor_norms": {
                                "before": {"A": 1.0, "B": 2.0},
                                "after": {"A": 1.5, "B": 1.5},
                            },
                        }
                    )
                    rows.append(one | extra)
                name = f"{k}/seed-{seed}/{who}"
                write_run(root / name, rows, own, ["a"])
                (root / name / "config.toml").write_text(f"{config}[run]\nseed = {seed}\n")
                folders.append(name)
            cells.append({"method": method, "kind": kind, "seed": seed, "folders": folders})
    table = {
        "format": "fedmomentum comparison",
        "format_version": 3,
        "baseline": methods[0],
        "target": 0.3,
        "command": "fedmomentum compare x.toml --methods 'a;b'",
        "cells": cells,
        "summary": [],
    }
    write_record(root / "comparison.json", table)
    return root


class Plain(Page):
    """Its figures' data are files."""

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "download" in attributes:
            self.data[attributes["download"].removesuffix(".csv")] = attributes["href"]
        self.elements.append((tag, attributes))


def check(path):
    page = Plain(path)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert [name for name in ids if name in SECTIONS] == SECTIONS
    targets = {value[1:] for _, a in page.elements if (value := a.get("href", "")).startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", page.html))
    assert targets <= set(ids)
    assert not re.findall(r"https?:|//[a-z]", page.html)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "#0101" not in page.html and "#0102" not in page.html
    for key, link in page.data.items():
        assert link == f"comparison-data/{key}.csv"
        with (path.parent / link).open() as file:
            assert len(list(csv.DictReader(file))) >= 1
    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("whole") / "cmp")
    return root, check(write_comparison_page([root]))


def test_sections_figures_and_numbers(whole):
    root, page = whole
    assert set(page.data) == PLOTS
    text = " ".join(page.text.split())
    assert "2 methods and 2 references on lab/small-lm-135m-instruct, 3 seeds" in text
    assert "not finished" not in text and "share every setting" in text
    assert "fedmomentum compare x.toml --methods 'a;b'" in text
    two = next(
        one for one in summarize_methods(read_comparison(root)) if one.method.startswith("two")
    )
    assert two.exact_match_difference.mean == pytest.approx(0.03)
    assert "+3.0 [+3.0, +3.0]" in text and f"{100 * two.exact_match.mean:.1f} ± 3.0" in text
    assert "To 30.0 %" in text or "To 30 %" in text


def test_files_hold_the_data_of_the_figures(whole):
    root, _ = whole
    comparison = read_comparison(root)
    with (root / "comparison-data" / "exact-match.csv").open() as file:
        cells = {
            (c["method"], int(c["seed"]), int(c["round"])): float(c["exact_match"])
            for c in csv.DictReader(file)
        }
    assert len(cells) == 4 * 3 * 4
    for cell in comparison.method_runs:
        for point in cell.points:
            assert cells[cell.method, cell.seed, point.round] == point.exact_match
    with (root / "comparison-data" / "exact-match-bytes.csv").open() as file:
        assert {c["method"] for c in csv.DictReader(file)} == {
            "one",
            "two:split=a",
        }  # references send nothing
    with (root / "comparison-data" / "exact-match-difference.csv").open() as file:
        mean = next(
            c for c in csv.DictReader(file) if c["method"] == "local" and c["seed"] == "mean"
        )
    assert float(mean["difference"]) == pytest.approx(-0.04)
    with (root / "comparison-data" / "by-client.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * len(CLIENTS)


def test_same_folders_same_bytes(whole):
    root, page = whole
    assert Plain(write_comparison_page([root])).html == page.html


def test_runs_without_a_comparison_show_where_they_differ(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", ["one"], [0, 1])
    write_folder(
        tmp_path / "b",
        ["one"],
        [2],
        config='[method]\nname = "fedit"\n[training]\nlocal-steps = 9\n',
    )
    runs = [
        tmp_path / "a" / "0" / "seed-0" / "all",
        tmp_path / "a" / "0" / "seed-1" / "all",
        tmp_path / "b" / "0" / "seed-2" / "all",
    ]
    monkeypatch.chdir(tmp_path)
    path = write_comparison_page(runs, out=tmp_path / "out", target=0.2)
    page = check(path)
    assert path == tmp_path / "out" / "comparison.html"
    assert (
        "differ in more than method and seed" in page.text and "training.local-steps" in page.text
    )
    assert (
        f"fedmomentum run {runs[0]}/config.toml" in page.text and "fedmomentum report" in page.text
    )
    assert check(write_comparison_page(runs)) and (tmp_path / "comparison.html").is_file()
    with pytest.raises(ConfigError, match="not both together"):
        write_comparison_page([runs[0], tmp_path / "a"])
    with pytest.raises(ModelError, match="nowhere"):
        write_comparison_page([runs[0], tmp_path / "nowhere"])


def test_names_are_escaped(tmp_path):
    root = write_folder(tmp_path / "cmp", [EVIL, "$x$ {{ 7 * 7 }}", "=1+1"], [0])
    page = check(write_comparison_page([root]))
    assert EVIL not in page.html and EVIL in page.text and "{{ 7 * 7 }}" in page.text
    assert "'=1+1" in (root / "comparison-data" / "exact-match.csv").read_text()


@pytest.mark.parametrize(
    "extra",
    [
        {"evaluation": None},
        {"diagnostics": None, "retained_energy": None, "residual_rank": None},
        {"uplink_bytes": {}, "downlink_bytes": {}, "seconds": {}},
        {"retained_energy": 1e300, "residual_rank": 1e300},
    ],
)
def test_what_was_not_measured_is_left_out(tmp_path, extra):
    page = check(
        write_comparison_page(
            [write_folder(tmp_path / "cmp", ["one", "two"], [0], rounds=2, **extra)]
        )
    )
    if "evaluation" in extra:
        assert "No evaluation was recorded" in page.text and "No client was evaluated" in page.text


def test_one_seed_one_round_and_many_methods(tmp_path):
    check(write_comparison_page([write_folder(tmp_path / "one", ["only"], [0], rounds=1)]))
    page = check(
        write_comparison_page(
            [write_folder(tmp_path / "many", [f"m{k}" for k in range(17)], [0, 1], rounds=2)]
        )
    )
    assert "17 methods" in " ".join(page.text.split())


def test_methods_with_one_mean_are_tied(tmp_path):
    root = write_folder(tmp_path / "cmp", ["a", "b"], [0])
    shutil.rmtree(root / "1")
    shutil.copytree(root / "0", root / "1")
    text = " ".join(check(write_comparison_page([root])).text.split())
    assert text.count("2 methods, tied") == 3


def test_a_mean_over_fewer_seeds_says_so_and_the_fewest_bytes_are_of_those_that_got_there(tmp_path):
    root = write_folder(tmp_path / "cmp", ["a", "b"], [0, 1])
    for seed, levels in ((0, [9, 50, 50, 50]), (1, [9, 9, 9, 9])):
        file = root / "1" / f"seed-{seed}" / "all" / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for one, level in zip(rows, levels, strict=True):
            one["evaluation"]["compared"] = score(level, 50, 1.0)
        if seed:
            rows[-1]["evaluation"] = None
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    text = " ".join(check(write_comparison_page([root])).text.split())
    assert "(n = 1)" in text
    # b reaches the target at once, but only with one seed of two.
    assert re.search(r"Fewest bytes to 30[^a-z]*exact match a ", text)
    assert "reached with 2 of 2 seeds" in text


def test_runs_that_are_not_finished_are_named(tmp_path):
    root = write_folder(tmp_path / "cmp", ["one"], [0])
    plan = root / "0" / "seed-0" / "all" / "plan.json"
    write_record(plan, json.loads(plan.read_text()) | {"num_rounds": 9})
    assert "one, seed 0: not finished, 3 of 9 rounds" in " ".join(
        check(write_comparison_page([root])).text.split()
    )
