"""The live page: what it shows of a run in every state, and that foreign text in it is never HTML."""

import re

import pytest

from fedmomentum.errors import QuorumError
from fedmomentum.formats.status_file import STATUS_FILE, read_status
from fedmomentum.formats.withheld import withheld_by
from fedmomentum.report import live_page
from fedmomentum.report.live_page import LOG_TAIL_BYTES, MAX_LOG_LINES, LivePage
from fedmomentum.report.live_view import MAX_CLIENTS
from fedmomentum.results.formatting import clock, time_left
from fedmomentum.server.status import StatusWriter
from tests.report.folders import records, row, write_run
from tests.report.live import CLIENTS, EVIL, Elements, whole_page, withholding, write_running


@pytest.fixture
def plot_calls(monkeypatch):
    """Skip drawing figures, which most tests do not need; counts how often they were requested."""
    calls = []
    monkeypatch.setattr(live_page, "score_plots", lambda rounds: calls.append(len(rounds)) or [])
    monkeypatch.setattr(live_page, "traffic_plots", lambda rounds: [])
    monkeypatch.setattr(live_page, "report_section", lambda run: "<h2>the report</h2>")
    return calls


def parts(folder, **how):
    return LivePage(folder, "server.log").update(**how).parts


def cells(html):
    """The rows of a table as texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [
        [Elements(cell).text.strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", one, re.DOTALL)]
        for one in rows
    ]


# ── a run in progress ──


def test_clients_that_need_attention_come_first_and_deadlines_are_shown(tmp_path, plot_calls):
    write_running(tmp_path)
    found = parts(tmp_path)
    table = cells(found["clients"])
    assert [one[0] for one in table[1:]] == ["west", "north", "south", "east"]
    failed, late, training, answered = table[1:]
    assert failed[1:3] == ["no", "failed"] and failed[-1] == "no answer within 60 s"
    assert late[1:3] == ["yes", "late"] and re.fullmatch(r"late by 5\.\d\s+s", late[3])
    assert (
        training[2] == "training"
        and training[3].startswith(("14\xa0min", "15\xa0min 00"))
        and training[-1] == "answered too late once"
    )
    assert answered[2] == "answered" and answered[5:7] == ["1\xa0MB", "2\xa0MB"]
    state = Elements(found["state"]).text
    deadline = read_status(tmp_path).clients["south"].until
    assert (
        "Round 4 of 10: training" in state
        and "1 of 4 clients have answered, 1 failed" in re.sub(r"\s+", " ", state)
    )
    assert f"answers are due by {clock(deadline)}" in state and "3 of 4 connected" in state
    assert "1 failed, 1 late, 1 training, 1 done" in state
    assert (
        cells(found["recent"])[1][:2] == ["3", "4 of 4"]
        and "south: no answer within 60 s" in cells(found["recent"])[2][-1]
    )


def test_waiting_aggregating_and_before_the_first_round(tmp_path, plot_calls):
    page = LivePage(tmp_path, "server.log")
    assert "Before the first round" in whole_page(page).text
    status = StatusWriter(tmp_path, 10)
    status.on_message("Listening on port 9443")
    assert "Listening on port 9443" in page.update().parts["state"]
    status.on_nodes(CLIENTS, ["north"])
    status.on_waiting(CLIENTS[1:], 60.0)
    found = page.update()
    text = Elements(found.parts["state"]).text
    assert (
        found.spoken == "Waiting for clients"
        and "south, east, west until" in text
        and "left" in text
    )
    status.on_round_begin(0, [])
    assert "The base model is evaluated" in page.update().parts["state"]
    status.on_round_begin(1, ["north"])
    status._written_at = 0.0  # of events that come often
    status.on_aggregate(3, 60)
    text = Elements(page.update().parts["state"]).text
    assert "Round 1 of 10: aggregating" in text and "3 of 60 modules aggregated" in text


def test_a_run_on_this_machine_shows_its_steps(tmp_path, plot_calls):
    write_run(tmp_path, [row(0, CLIENTS, ["a"])], CLIENTS, num_rounds=2)
    status = StatusWriter(tmp_path, 2, networked=False)
    status.on_round_begin(1, CLIENTS[:3])
    status.on_step("north", 4, 4, 0.5)
    status._written_at = 0.0
    status.on_step("south", 2, 4, 0.75)
    table = cells(parts(tmp_path)["clients"])
    assert table[0] == ["Client", "State", "Accepted rounds", "Down", "Up", "What went wrong"]
    assert [one[:2] for one in table[1:]] == [
        ["south", "trainingstep 2 of 4, loss 0.750"],
        ["north", "trainedstep 4 of 4, loss 0.500"],
        ["east", "waits for its turn"],
    ]


def test_of_ten_thousand_clients_the_first_hundred_that_matter_are_listed(tmp_path, plot_calls):
    names = [f"site{k}" for k in range(10_000)]
    status = StatusWriter(tmp_path, 3)
    status.on_nodes(names, names)
    status._pause = 0.0  # after a write that took long
    status.on_failure("site9999", "x" * 10_000)
    found = parts(tmp_path)
    table = cells(found["clients"])
    assert len(table) == 1 + MAX_CLIENTS
    assert [one[0] for one in table[1:5]] == ["site9999", "site0", "site1", "site2"]
    assert "9,900 more clients" in found["clients"] and len(found["clients"]) < 60_000


# ── how a run ends ──


def test_a_finished_run_has_its_report_in_the_page(tmp_path, plot_calls):
    rows = [row(k, CLIENTS, ["a"]) for k in range(3)]
    write_run(tmp_path, rows, CLIENTS, num_rounds=2)
    with StatusWriter(tmp_path, 2) as status:
        status.on_round_begin(2, CLIENTS)
    found = LivePage(tmp_path, "server.log").update(is_ended=True)
    assert (
        "All 2 rounds are finished" in found.parts["state"]
        and found.spoken == "All 2 rounds are finished"
    )
    assert found.parts["report"] == "<h2>the report</h2>" and found.parts["curves"] == ""


def test_a_real_report_has_one_heading_of_the_first_level_and_no_id_twice(tmp_path):
    rows = [row(k, CLIENTS[:2], ["a"]) for k in range(2)]
    write_run(tmp_path, rows, CLIENTS[:2], num_rounds=1)
    found = whole_page(LivePage(tmp_path, "server.log"), is_ended=True)
    assert [tag for tag, _ in found.elements].count("h1") == 1
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 20
    # what a strict policy would block: inline styles and scripts, and handlers
    assert not [
        one
        for one in found.elements
        if one[0] == "style"
        or set(one[1]) & {"style"}
        or any(name.startswith("on") for name in one[1])
    ]
    assert [attributes for tag, attributes in found.elements if tag == "script"] == [
        {"src": "/live.js", "defer": None}
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            QuorumError("round 4: 1 of 4 <b>clients</b>"),
            "The run ended: round 4: 1 of 4 <b>clients</b>.",
        ),
        (KeyboardInterrupt(), "The run ended: it was interrupted."),
        (ValueError("a defect"), "The run ended: ValueError; the terminal"),
        (None, "The run's process is gone, and left no reason"),
    ],
)
def test_a_stopped_run_says_why(tmp_path, plot_calls, error, words):
    status = write_running(tmp_path)
    if error is not None:
        status.__exit__(type(error), error, None)
    state = Elements(parts(tmp_path, is_ended=True)["state"]).text
    assert "Stopped after round 3 of 10" in state and words in re.sub(r"\s+", " ", state)


def test_a_run_that_was_refused_leaves_no_status(tmp_path, plot_calls):
    with pytest.raises(QuorumError), StatusWriter(tmp_path, 3):
        raise QuorumError("nobody came")
    assert not (tmp_path / STATUS_FILE).exists()
    assert "ended before the run had begun" in parts(tmp_path, is_ended=True)["state"]


def test_the_status_of_an_earlier_start_is_not_shown(tmp_path, plot_calls):
    write_running(tmp_path).close()
    written = read_status(tmp_path).written
    found = LivePage(tmp_path, "server.log", since=written + 1).update()
    assert "Stopped" not in found.parts["state"] and found.parts["clients"] == ""


# ── what is shown, and what is not ──


def test_hostile_names_reasons_and_lines_are_text(tmp_path):
    clients = [*EVIL[:2], EVIL[4], EVIL[3], EVIL[2]]
    status = write_running(
        tmp_path, clients, reason="</td></tr><svg onload=alert(1)>\u202e" + "r" * 5000
    )
    status.on_waiting(EVIL, 60.0)
    status.on_message("<iframe src=//evil.example>")
    (tmp_path / "server.log").write_text(
        "<script src=//evil.example></script>\x1b[2J\u202e\n", encoding="utf-8"
    )
    page = LivePage(tmp_path, "server.log")
    html = page.page(page.update())  # the report's own escaping is tests/report/test_page.py's
    found = Elements(html)
    tags = [tag for tag, _ in found.elements]
    assert not set(tags) & {"img", "iframe", "object", "embed", "form", "input", "style"}
    assert tags.count("script") == 1 and tags.count("figure") == 5
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert not attributes.get("href", "#").startswith(("//", "http", "javascript"))
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", html)
    assert 80 * "n" not in html and 600 * "r" not in html
    assert "<script>alert(1)</script>" in found.text
    assert "<script src=//evil.example></script>\ufffd[2J\ufffd" in found.text


@pytest.mark.parametrize(("secure", "private"), [(True, False), (False, True), (True, True)])
def test_what_the_metrics_withhold_is_named_and_nowhere_shown(
    tmp_path, plot_calls, secure, private
):
    withheld = withheld_by(secure=secure, private=private)
    empty = {"train_loss": None, "evaluation": None, "clients": {}} if private else {}
    rows = [row(k, CLIENTS, ["a"]) | empty | {"withheld": withholding(withheld)} for k in range(2)]
    write_run(tmp_path, rows, CLIENTS, num_rounds=3)
    status = StatusWriter(tmp_path, 3, networked=False, withheld=withheld)
    status.on_round_begin(2, CLIENTS)
    status._written_at = 0.0
    status.on_step("north", 3, 7, 0.123)
    read = read_status(tmp_path).clients["north"]
    assert read.loss is None and (read.num_steps is None) == secure
    found = parts(tmp_path)
    state = Elements(found["state"]).text
    assert (
        "Left out on purpose" in state
        and withheld.reason[1:] in state
        and "0.123" not in str(found)
    )
    assert ("step 3 of 7" in found["clients"]) != secure
    assert cells(found["recent"])[1].count("withheld") == (3 if private else 0)
    assert ("no held-out score is revealed" in state) == private


def test_the_end_of_the_log_is_shown(tmp_path, plot_calls):
    file = tmp_path / "server.log"
    file.write_text(
        "".join(f"line {k} {'ä' * 2000}\n" for k in range(200)) + "unfinished", encoding="utf-8"
    )
    lines = Elements(parts(tmp_path)["log"]).text.split("line ")[1:]
    assert (
        10 < len(lines) <= MAX_LOG_LINES
        and lines[-1].startswith("199 ")
        and "unfinished" not in lines[-1]
    )
    assert all(len(line) <= 400 for line in lines) and file.stat().st_size > LOG_TAIL_BYTES
    file.unlink()
    assert parts(tmp_path)["log"] == ""


# ── over time ──


def test_curves_are_drawn_for_new_rounds_only_and_not_too_often(tmp_path, plot_calls):
    rows = [row(k, CLIENTS, ["a"]) for k in range(4)]
    now = [1000.0]
    page = LivePage(tmp_path, "server.log", clock=lambda: now[0])

    def slow(rounds):
        plot_calls.append(len(rounds))
        now[0] += 0.5
        return []

    live_page.score_plots = slow  # undone by the fixture
    for num_rounds, seconds in ((1, 0.0), (1, 10.0), (2, 0.0), (3, 1.0), (4, 3.0)):
        now[0] += seconds
        write_run(tmp_path, rows[:num_rounds], CLIENTS, num_rounds=9)
        page.update()
    # half a second of drawing, then five without; a round that came meanwhile is in the next drawing
    assert plot_calls == [1, 2]
    now[0] += 5.0
    page.update()
    assert plot_calls == [1, 2, 4]


def test_files_that_cannot_be_read_momentarily_keep_their_last_content(tmp_path, plot_calls):
    write_running(tmp_path)
    page = LivePage(tmp_path, "server.log")
    before = page.update().parts
    contents = {name: (tmp_path / name).read_bytes() for name in (STATUS_FILE, "metrics.jsonl")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content[: len(content) // 2] + b"\n")
    after = page.update().parts
    assert (
        after["recent"] == before["recent"]
        and "Round 4 of 10" in after["state"]
        and "no answer" in after["clients"]
    )
    rows = [row(k, CLIENTS, ["a", "b"]) for k in range(6)]
    write_run(tmp_path, rows, CLIENTS, num_rounds=10)
    assert "5 of 10 rounds finished" in page.update().parts["state"]


def test_times_are_shown_in_readable_units():
    assert (
        time_left(100.0, 58.0) == "42.0\xa0s left"
        and time_left(100.0, 175.0) == "late by 1\xa0min 15\xa0s"
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d", clock(1e9))


def test_refused_replies_are_failures_of_the_round(tmp_path, plot_calls):
    (record,) = records([row(1, CLIENTS, ["a"], failures={"east": "not an adapter"})])
    status = StatusWriter(tmp_path, 3)
    status.on_reply("east", 5)
    status.on_round_end(record)
    read = read_status(tmp_path)
    assert (
        read.clients["east"].state == "failed" and read.clients["east"].reason == "not an adapter"
    )
    assert read.clients["north"].rounds == 1 and read.clients["east"].rounds == 0
