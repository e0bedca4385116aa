"""The page: complete, safe, self-contained, the same every time, and never a crash."""

import ast
import csv
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import msgspec
import pytest

import fedmomentum.report
from fedmomentum.errors import DataError, ModelError
from fedmomentum.formats.scores import Score
from fedmomentum.formats.withheld import NOISED_ONLY, PHRASES, SUMS_ONLY
from fedmomentum.report import write_report
from fedmomentum.results.run_results import RunResults
from fedmomentum.results.summary import summarize_run
from fedmomentum.server.status import StatusWriter
from tests.report.folders import PHASES, records, row, write_record, write_run

CLIENTS = [f"client-{k}" for k in range(4)]
TASKS = ["arithmetic", "copying", "dates", "sorting", "translation", "yes-no"]
EVIL = "<script>alert(1)</script>"
SECTIONS = [
    "comparison",
    "scores",
    "method",
    "movement",
    "cost",
    "partition",
    "rounds",
    "settings",
    "commands",
]
ROUND_PLOTS = {
    "exact-match",
    "loss",
    "train-loss",
    "retained-energy",
    "residual-rank",
    "residual-norm",
    "exactness",
    "applied-share",
    "bytes",
    "bytes-sum",
    "update-cosine",
    "client-drift",
    "subspace-angle",
    "factor-norms",
}


class Page(HTMLParser):
    """The elements, attributes and text of a page, and the data of its figures."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements, self.text, self.data, self._open = [], "", {}, None
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if "download" in attributes:
            kind, _, content = attributes["href"].partition(",")
            assert kind == "data:text/csv;charset=utf-8"
            self.data[attributes["download"].removesuffix(".csv")] = list(
                csv.DictReader(io.StringIO(unquote(content)))
            )

    def handle_data(self, data):
        self.text += data

    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def page(tmp_path, rows, clients=CLIENTS, categories=TASKS, **plan):
    return Page(write_report(write_run(tmp_path / "my-run", rows, clients, categories, **plan)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    rows = [row(r, CLIENTS, TASKS, items=60 if r in (0, 5) else 24) for r in range(6)]
    return rows, page(tmp_path_factory.mktemp("whole"), rows)


def check(page):
    """What holds for every page."""
    ids = page.ids()
    assert len(ids) == len(set(ids))
    assert [name for name in ids if name in SECTIONS] == SECTIONS
    targets = {value[1:] for _, a in page.elements if (value := a.get("href", "")).startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", page.html))
    assert targets <= set(ids)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [
        name for _, attributes in page.elements for name in attributes if name.startswith("on")
    ]
    assert not re.findall(r"https?:|//[a-z]", page.html)
    assert (
        "#0101" not in page.html and "#0102" not in page.html
    )  # every stand-in color became one of the page's
    images = [
        attributes
        for tag, attributes in page.elements
        if tag == "svg" and attributes.get("role") == "img"
    ]
    assert len(images) == len(page.data) and all(image["aria-label"] for image in images)


def test_headline_sections_and_commands(whole):
    rows, page = whole
    check(page)
    text = " ".join(page.text.split())
    assert (
        "lab/small-lm-135m-instruct, fine‑tuned by 4 clients over 5 rounds with FedMomentum" in text
    )
    total = summarize_run(records(rows))[0]
    for measure in (total.base, total.federated):
        assert f"{100 * measure.exact_match:.1f}\u00a0%" in page.text
        assert (
            "{:.1f} to {:.1f}\u00a0%".format(*(100 * end for end in measure.interval)) in page.text
        )
        assert f"{measure.loss:.3f}" in page.text
    for command in (
        "fedmomentum export my-run --to merged --out my-run-merged",
        "fedmomentum export my-run --to adapter --out my-run-adapter",
        'fedmomentum generate my-run --prompt "..."',
        "fedmomentum run my-run/config.toml --resume --out my-run",
    ):
        assert command in page.text
    assert 'name = "fedmomentum"' in page.text and "2.13.0+cpu" in page.text
    assert "A round's score is over 96 to 240 examples" in page.text
    assert "still going" not in page.text


def test_a_served_run_is_resumed_by_its_server_and_used_where_the_base_is(tmp_path):
    clients = ("north", "south")
    folder = write_run(tmp_path / "run", [row(0, clients, ["a"]), row(1, clients, ["a"])], clients)
    StatusWriter(folder, 1, networked=False).close()
    assert "fedmomentum run run/config.toml --resume --out run" in write_report(folder).read_text()
    StatusWriter(folder, 1).close()
    page = write_report(folder).read_text()
    for command in (
        "fedmomentum serve run/config.toml --resume --out run --keys KEYS",
        "fedmomentum generate run --base BASE-DIRECTORY --prompt",
        "fedmomentum export run --base BASE-DIRECTORY --to merged --out run-merged",
    ):
        assert command in page


def test_data_beside_the_plots_equals_the_rows(whole):
    rows, page = whole
    data = page.data
    plots = {
        "intervals-category",
        "intervals-client",
        "seconds",
        "partition-train",
        "partition-test",
    }
    assert set(data) == ROUND_PLOTS | plots

    matches = {(int(cell["round"]), cell["client"]): cell for cell in data["exact-match"]}
    losses = {(int(cell["round"]), cell["client"]): cell for cell in data["loss"]}
    assert len(matches) == len(losses) == 6 * (1 + len(CLIENTS))
    for one in rows:
        for name, score in {
            "": one["evaluation"]["total"],
            **one["evaluation"]["by_client"],
        }.items():
            match, loss = matches[one["round"], name], losses[one["round"], name]
            assert (int(match["exact"]), int(match["items"])) == (
                score["num_exact"],
                score["num_examples"],
            )
            assert float(match["exact_match"]) == score["exact_match"]
            assert (float(loss["loss"]), float(loss["nll"])) == (score["loss"], score["nll"])

    trained = {(int(cell["round"]), cell["client"]): cell for cell in data["train-loss"]}
    for one in rows[1:]:
        assert float(trained[one["round"], ""]["loss"]) == one["train_loss"]
        for name, report in one["clients"].items():
            cell = trained[one["round"], name]
            assert [
                float(cell[key]) for key in ("loss", "first_loss", "last_loss", "steps", "tokens")
            ] == list(report.values())

    for key in ("retained-energy", "residual-rank", "residual-norm", "exactness", "applied-share"):
        name = "exactness_error" if key == "exactness" else key.replace("-", "_")
        assert [cell[name] and float(cell[name]) for cell in data[key]] == [
            "",
            *(one[name] for one in rows[1:]),
        ]

    cosines = [one["diagnostics"]["update_cosine"] for one in rows[2:]]
    assert [cell["update_cosine"] for cell in data["update-cosine"][:2]] == ["", ""]
    assert [float(cell["update_cosine"]) for cell in data["update-cosine"][2:]] == cosines
    assert [float(cell["client_cosine_mean"]) for cell in data["update-cosine"][1:]] == [
        one["diagnostics"]["client_cosine"]["mean"] for one in rows[1:]
    ]
    assert [float(cell["factor_norms_after_B"]) for cell in data["factor-norms"][1:]] == [
        one["diagnostics"]["factor_norms"]["after"]["B"] for one in rows[1:]
    ]

    assert [[float(cell[p]) for p in PHASES] for cell in data["seconds"]] == [
        list(o["seconds"].values()) for o in rows
    ]
    up = sum(sum(one["uplink_bytes"].values()) for one in rows)
    down = sum(sum(one["downlink_bytes"].values()) for one in rows)
    assert (
        int(data["bytes-sum"][-1]["uplink_bytes"]),
        int(data["bytes-sum"][-1]["downlink_bytes"]),
    ) == (up, down)
    assert sum(int(cell["uplink_bytes"]) for cell in data["bytes"]) == up


def test_data_of_summary_and_partition(whole, tmp_path):
    rows, page = whole
    summary = {(line.group, line.name): line for line in summarize_run(records(rows))}
    cells = page.data["intervals-category"] + page.data["intervals-client"]
    assert len(cells) == 2 * (2 + len(CLIENTS) + len(TASKS))
    for cell in cells:
        measure = getattr(summary[cell["group"], cell["name"]], cell["model"])
        wanted = measure.exact_match, *measure.interval, measure.loss
        assert tuple(float(cell[key]) for key in ("exact_match", "low", "high", "loss")) == wanted

    partition = RunResults.load(write_run(tmp_path / "run", rows, CLIENTS, TASKS)).partition
    for split in ("train", "test"):
        held = {
            (c["client"], c["category"]): int(c["examples"])
            for c in page.data[f"partition-{split}"]
        }
        assert held == {
            (c, t): num for c, splits in partition.items() for t, num in splits[split].items()
        }


def test_every_name_and_reason_is_escaped(tmp_path):
    clients = [
        EVIL,
        "$x_{$",
        '"><img src=x onerror=alert(1)>',
        "=1+1",
        "日本 🦊 \u202e",
        "</svg></style>",
        "a\x00\nb",
        "",
    ]
    categories = ["<b>bold</b>", "$\\frac{", "{{ 7 * 7 }}", "&amp;"]
    reason = f"refused {EVIL} {{{{ 6 * 9 }}}} " + 5000 * "x"
    rows = [
        row(0, clients, categories),
        row(1, clients, categories, failures={EVIL: reason, "]]>": ""}),
    ]
    one = page(tmp_path, rows, clients, categories, model=EVIL, method="<i>M</i>(a=1)")
    check(one)
    assert (
        EVIL not in one.html
        and "<b>bold" not in one.html
        and "<img" not in one.html
        and "<i>M" not in one.html
    )
    assert EVIL in one.text and "{{ 7 * 7 }}" in one.text and "<b>bold</b>" in one.text
    assert 700 * "x" not in one.text.split("refused")[1]
    assert "'=1+1" in {
        cell["name"] for cell in one.data["intervals-client"]
    }  # not a formula in a spreadsheet


def test_thirty_clients_seventy_seven_categories_and_failures(tmp_path):
    clients, categories = (
        [f"hospital {k} of the north" for k in range(30)],
        [f"intent_{k}" for k in range(77)],
    )
    rows = [
        row(r, clients, categories, failures={clients[r]: f"reason {r}"} if r else {})
        for r in range(8)
    ]
    rows[3]["evaluation"], rows[4]["exactness_error"], rows[5]["carried_norm"] = None, 0.0, 0.1
    one = page(tmp_path, rows, clients, categories, num_rounds=20)
    check(one)
    assert "7 of 20 rounds are finished" in one.text
    assert (
        "each of 30 clients" in one.text
        and "exactly zero" in one.text
        and "carried into" in one.text
    )
    for server_round in range(1, 8):
        assert f"reason {server_round}" in one.text
    assert "7 failed replies" in one.text
    assert len(one.data["intervals-category"]) == 2 * 78


def test_an_update_without_its_evaluation_is_in_the_model(tmp_path):
    """As is said of a client that was not sampled and did not evaluate either."""
    rows = [row(r, CLIENTS, TASKS) for r in range(2)]
    for one, client in zip(rows, ("no reply to round 0", "late"), strict=True):
        one["failures"] = {CLIENTS[0]: f"evaluation: {client}", "absent": "evaluation: away"}
    one = page(tmp_path, rows)
    check(one)
    text = " ".join(one.text.split())
    num = len(CLIENTS)
    assert f"{num} of {num} {num} clients" in text and "left out of" not in text
    assert "; not evaluated" in text and "failed absent" not in text
    assert "evaluation: late" in text and "evaluation: away" in text
    assert "evaluation: no reply to round 0" in text  # round 0 has a row for its failures


def test_many_absences_do_not_push_the_scores_away(tmp_path):
    clients = [f"c{k}" for k in range(50)]
    reasons = {client: "no answer " + 100 * "x" for client in clients[:40]}
    one = page(tmp_path, [row(r, clients, TASKS[:1], failures=reasons) for r in range(2)], clients)
    check(one)
    head, _, rest = one.html.partition("28 more</summary>")
    assert head.count("was left out of") == 12 and rest.count("was left out of") == 28


def test_pairs_whose_base_alone_was_evaluated_have_their_unit(tmp_path):
    rows = [row(0, CLIENTS, TASKS)]
    pairs = Score(60.0, 90, 90, 40, margin=12.0).to_json()
    rows[0]["evaluation"]["total"] = pairs
    one = page(tmp_path, rows, num_rounds=5)
    check(one)
    assert "nats per pair" in one.text and "token of the answers" not in one.text


def test_more_clients_than_can_be_drawn(tmp_path):
    clients = [f"c{k}" for k in range(120)]
    one = page(
        tmp_path, [row(r, clients, TASKS[:2], items=4) for r in range(2)], clients, TASKS[:2]
    )
    check(one)
    assert "10 to 90 % of 120 clients" in one.text and "The first 100 of 121" in one.text
    assert (
        len({cell["name"] for cell in one.data["intervals-client"]}) == 121
    )  # all of them and the total


def test_a_page_with_only_the_base_model_says_so(tmp_path):
    one = page(tmp_path, [row(0, CLIENTS, TASKS)], num_rounds=5)
    check(one)
    assert "0 of 5 rounds are finished" in one.text
    assert "No round after the base model has been evaluated yet" in one.text
    assert (
        "No round has been aggregated yet" in one.text and "No round has finished yet" in one.text
    )


@pytest.mark.parametrize("num_rounds", [0, 1, 3])
def test_nothing_was_evaluated_or_measured(tmp_path, num_rounds):
    rows = [row(r, CLIENTS, TASKS) for r in range(num_rounds + 1)]
    for one in rows:
        one.update(
            dict.fromkeys(
                ["evaluation", "train_loss", "retained_energy", "residual_rank", "residual_norm"]
            )
        )
        one.update(
            dict.fromkeys(["carried_norm", "exactness_error", "applied_share", "learning_rate"])
        )
        one.update(diagnostics=None)
        one.update(
            clients={}, uplink_bytes={}, downlink_bytes={}, seconds={}, weights={}, num_examples={}
        )
    one = page(tmp_path, rows)
    check(one)
    assert set(one.data) == {"partition-train", "partition-test"}
    assert (
        "No evaluation was recorded" in one.text
        and "Neither bytes nor times were recorded" in one.text
    )


def test_row_with_nothing_but_its_round_and_empty_settings(tmp_path):
    folder = write_run(tmp_path / "run", [{"round": 0}, {"round": 1}], [], [])
    write_record(folder / "environment.json", {"versions": {}, "threads": 1})
    write_record(folder / "partition.json", {"clients": {}})
    one = Page(write_report(folder))
    check(one)
    assert not one.data


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e300])
def test_extreme_values_are_drawn(tmp_path, value):
    rows = [row(r, CLIENTS[:2], TASKS[:2]) for r in range(3)]
    for name in (
        "exactness_error",
        "train_loss",
        "residual_norm",
        "retained_energy",
        "applied_share",
        "residual_rank",
    ):
        rows[1][name] = rows[2][name] = value
        rows[1]["diagnostics"]["update_cosine"] = rows[2]["diagnostics"]["client_drift"] = value
    rows[2]["evaluation"]["total"]["loss"] = value
    one = page(tmp_path, rows, CLIENTS[:2], TASKS[:2])
    check(one)
    assert "nan" not in " ".join(a.get("d", "") for tag, a in one.elements if tag == "path").lower()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_was_never_written_and_is_refused(tmp_path, value):
    rows = [row(0, CLIENTS[:2], TASKS[:2]), row(1, CLIENTS[:2], TASKS[:2]) | {"train_loss": value}]
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        page(tmp_path, rows, CLIENTS[:2], TASKS[:2])


def test_a_page_of_one_client_without_categories_leaves_both_out(tmp_path):
    one = page(tmp_path, [row(r, ["only"], [""]) for r in range(2)], ["only"], [""])
    check(one)
    assert "fine‑tuned by 1 client\n" in one.text
    assert "intervals-category" not in one.data and "no category" in one.text


def test_same_folder_same_bytes(tmp_path):
    folder = write_run(tmp_path / "run", [row(r, CLIENTS, TASKS) for r in range(3)], CLIENTS, TASKS)
    first = write_report(folder).read_bytes()
    with matplotlib.rc_context(
        {"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}
    ):  # the user's own
        assert write_report(folder).read_bytes() == first
    program = f"from fedmomentum.report import write_report; write_report({str(folder)!r})"
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={"PYTHONHASHSEED": "7", "PATH": ""},
        cwd=ROOT,
    )
    assert (folder / "report.html").read_bytes() == first
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [
            "config.toml",
            "environment.json",
            "metrics.jsonl",
            "partition.json",
            "plan.json",
            "report.html",
        ]
    )


ROOT = Path(fedmomentum.report.__file__).parents[2]


READERS = {"config", "errors", "formats", "report", "results", "utils"}
"""What a page needs of the package: readers that check a run's files, and none that needs torch."""


def test_imports_neither_torch_nor_pyplot_nor_the_rest_of_the_package():
    program = (  # a bare parent package, so that only what the report itself asks for is loaded
        "import sys, types; parent = types.ModuleType('fedmomentum'); parent.__path__ = "
        "['fedmomentum'];"
        "sys.modules['fedmomentum'] = parent; from fedmomentum.report import "
        "write_comparison_page, write_report;"
        "print([name for name in ('torch', 'peft', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
    for path in sorted((ROOT / "fedmomentum" / "report").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedmomentum"):
                assert node.module.split(".")[1] in READERS


def test_global_settings_of_matplotlib_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    page(tmp_path, [row(r, CLIENTS, TASKS) for r in range(2)])
    assert dict(matplotlib.rcParams) == before


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelError):
        write_report(tmp_path / "nowhere")


# ── what is withheld ──


def test_a_run_of_sums_says_what_it_leaves_out_and_why(tmp_path):
    """Nothing of a single client is drawn, and nothing looks as if it had gone wrong."""
    rows = [row(r, CLIENTS, TASKS) for r in range(4)]
    for one in rows:
        one.update(
            weights={},
            num_examples={},
            clients={},
            screening={},
            diagnostics=None,
            exactness_error=None,
            applied_share=None,
            withheld=msgspec.to_builtins(SUMS_ONLY),
        )
        one["evaluation"] |= {"by_client": {}, "by_category": {}}
    folder = write_run(tmp_path / "my-run", rows, CLIENTS, TASKS)
    write_record(folder / "partition.json", {"clients": {}})
    one = Page(write_report(folder))
    check(one)
    assert "Secure aggregation: the server has sums over the clients" in one.text
    for phrase in PHRASES.values():
        assert phrase in one.text
    assert "The numbers of examples stay with the clients" in one.text
    assert "in the sum" in one.text and "weight" not in one.text.split("Participants")[-1][:400]
    assert {"exact-match", "loss", "train-loss", "retained-energy", "bytes"} <= set(one.data)
    assert not set(one.data) & {"client-drift", "exactness", "partition-train"}
    plain = page(tmp_path / "plain", [row(r, CLIENTS, TASKS) for r in range(4)])
    assert "Left out on purpose" not in plain.text


def test_scores_that_are_withheld_are_not_said_to_be_missing(tmp_path):
    """A run with differential privacy has no evaluation, and that is on purpose."""
    rows = [row(r, CLIENTS, TASKS) for r in range(3)]
    for one in rows:
        one["evaluation"] = None
    plain = page(tmp_path / "plain", rows).text
    assert "No evaluation was recorded" in plain and "Left out on purpose" not in plain
    for one in rows:
        one["withheld"] = msgspec.to_builtins(NOISED_ONLY)
    private = page(tmp_path / "private", rows).text
    section = private.split("Base model against federated model")[1]
    assert "Left out on purpose; the top of the page says why" in section.split("By round")[0]
    assert "No evaluation was recorded" not in private
