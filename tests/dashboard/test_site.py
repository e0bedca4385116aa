"""What anyone can get from the port by HTTP: the page by its own name, read-only, without slowing the run."""

import json
import re
import time

import pytest

from fedmomentum.dashboard import access as access_module
from fedmomentum.dashboard import feed, site
from fedmomentum.dashboard.process import page_url
from fedmomentum.report.live_page import LivePage
from fedmomentum.web.limits import ConnectionLimits
from tests.dashboard.serving import StaticPage, Viewer, ask, serving
from tests.report.live import EVIL, Elements, write_running

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PATHS = ("/", "/style.css", "/live.js", "/favicon.ico")


@pytest.fixture(scope="module")
def local():
    with serving(StaticPage(state="<b>all is well</b>")) as found:
        yield found


@pytest.fixture(scope="module")
def remote():
    """On all addresses of the machine, and so with a token."""
    with serving(StaticPage(state="secret"), "0.0.0.0") as found:
        yield found


def until(event, seconds=10.0):
    end = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


# ── names ──


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "127.0.0.1:{}", "localhost:8080", "LOCALHOST", "[::1]:9", "127.0.0.2:5"]
)
def test_the_page_is_served_under_the_names_of_this_machine_on_any_port(local, name):
    """Any port: through a tunnel it is another."""
    status, _, text = ask(local.port, host=name.format(local.port))
    assert status == 200 and "all is well" in text


@pytest.mark.parametrize(
    "name",
    [
        "evil.example",
        "evil.example:{}",
        "127.0.0.1.evil.example",
        "localhost.evil.example:{}",
        "evil.example#127.0.0.1",
        "192.0.2.7:{}",
        "0.0.0.0",
        "[::ffff:192.0.2.7]",
        "",
        ":{}",
        ["127.0.0.1", "evil.example"],
    ],
)
def test_nothing_is_served_under_another_name(local, name):
    """DNS rebinding: another site's name that leads here."""
    hosts = name if isinstance(name, list) else name.format(local.port)
    for path in (*PATHS, "/events"):
        status, headers, text = ask(local.port, path, host=hosts)
        assert status in (400, 421) and "well" not in text
        assert status == 400 or headers["connection"] == "close"


# ── methods, paths, headers ──


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW"]
)
def test_only_get_is_answered(local, method):
    for path in ("/", "/events"):
        status, headers, text = ask(local.port, path, method)
        # what is not HTTP at all is refused before it gets to the site
        assert status in (405, 400) and "well" not in text
        assert status == 400 or headers["allow"] == "GET"


def test_every_answer_carries_the_policy_and_nothing_lets_others_read_it(local, remote):
    answers = [
        ask(local.port, path) for path in (*PATHS, "/nothing", "/../etc/passwd", "//evil.example")
    ]
    answers += [
        ask(local.port, "/", "POST"),
        ask(local.port, host="evil.example"),
        ask(remote.port),
    ]
    assert [status for status, _, _ in answers] == [
        200,
        200,
        200,
        204,
        404,
        404,
        404,
        405,
        421,
        401,
    ]
    for status, headers, _ in answers:
        assert headers["content-security-policy"] == POLICY, status
        assert (
            headers["x-content-type-options"] == "nosniff"
            and headers["referrer-policy"] == "no-referrer"
        )
        assert headers["cache-control"] == "no-store" and headers["x-frame-options"] == "DENY"
        assert not [name for name in headers if name.startswith("access-control")]


def test_other_sites_can_link_here_and_nothing_else(local):
    for kind in ("cross-site", "same-site"):
        assert ask(local.port, "/", headers=[("Sec-Fetch-Site", kind)])[0] == 200
        for path in ("/events", "/live.js"):
            assert ask(local.port, path, headers=[("Sec-Fetch-Site", kind)])[0] == 403
    assert ask(local.port, "/live.js", headers=[("Sec-Fetch-Site", "same-origin")])[0] == 200


def test_hostile_names_are_text_on_the_wire_too(tmp_path):
    write_running(tmp_path, EVIL)
    with serving(LivePage(tmp_path, "server.log")) as found:
        page = Elements(ask(found.port)[2])
        with Viewer(found.port) as viewer:
            text = viewer.read_until("\n\n")
            text = viewer.read_until('"now"')
    sent = json.loads(re.search(r"^data: (.*)$", text, re.MULTILINE)[1])
    for html in (page, *(Elements(part) for part in sent["parts"].values())):
        assert not {tag for tag, _ in html.elements} & {"img", "iframe", "style"}
        assert not [
            name for _, attributes in html.elements for name in attributes if name.startswith("on")
        ]
    assert [attributes for tag, attributes in page.elements if tag == "script"] == [
        {"src": "/live.js", "defer": None}
    ]
    assert EVIL[0] in page.text and EVIL[0] in Elements(sent["parts"]["clients"]).text


# ── the token ──


def test_on_the_local_address_no_token_is_required(local):
    assert local.access.token is None


def test_nothing_is_served_without_the_token(remote):
    token = remote.access.token
    wrong = token[:-1] + ("A" if token[-1] != "A" else "B")
    for path in (
        "/",
        "/events",
        "/live.js",
        "/style.css",
        "/?token=",
        f"/?token={wrong}",
        f"/events?token={token}",
        f"/?Token={token}",
    ):
        status, headers, text = ask(remote.port, path)
        assert status == 401 and "secret" not in text and "set-cookie" not in headers, path
    for cookie in (
        f"fedmomentum-{remote.port}=",
        f"fedmomentum-{remote.port}={token}",
        "fedmomentum=x; a; =; ;",
    ):
        assert ask(remote.port, headers=[("Cookie", cookie)])[0] == 401


def test_the_token_moves_from_the_url_into_a_cookie(remote):
    token = remote.access.token
    status, headers, text = ask(remote.port, f"/?token={token}")
    assert status == 303 and headers["location"] == "/" and text == ""
    pair, *attributes = headers["set-cookie"].split("; ")
    assert {one.lower() for one in attributes} == {"httponly", "samesite=strict", "path=/"}
    assert pair.startswith(f"fedmomentum-{remote.port}=") and token not in pair and len(pair) > 50
    # the cookie is what counts from then on, beside whatever others there are
    for cookie in (pair, f"x=y; {pair}", f"fedmomentum-{remote.port}=planted; {pair}"):
        status, _, text = ask(remote.port, headers=[("Cookie", cookie)])
        assert status == 200 and "secret" in text and token not in text
    with Viewer(remote.port, f"Cookie: {pair}\r\n") as viewer:
        assert "secret" in viewer.read_until("secret")


def test_token_and_cookie_are_compared_in_constant_time(remote, monkeypatch):
    compared = []
    monkeypatch.setattr(
        access_module.hmac, "compare_digest", lambda a, b: compared.append(a) or False
    )
    assert (
        ask(remote.port, "/?token=%C3%BCnd", headers=[("Cookie", f"fedmomentum-{remote.port}=c")])[
            0
        ]
        == 401
    )
    assert b"c" in compared and len(compared) == 2


def test_with_a_token_numbers_and_the_machines_own_name_are_answered_to(remote):
    for name in ("192.0.2.7", "localhost", access_module.socket.gethostname()):
        assert ask(remote.port, host=name)[0] == 401
    assert ask(remote.port, host="evil.example")[0] == 421


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.7", False),
        ("fe80::1%eth0", False),
    ],
)
def test_which_addresses_are_this_machines_own(address, wanted):
    assert access_module.is_local(address) == wanted
    assert (access_module.Access("somewhere", [address], 1).token is None) == wanted
    assert access_module.Access("localhost", ["127.0.0.1", "192.0.2.7"], 1).token is not None


@pytest.mark.parametrize(
    ("host", "addresses", "wanted"),
    [
        ("myhost", ["127.0.1.1"], "127.0.1.1"),
        ("localhost", ["127.0.0.1", "::1"], "localhost"),
        ("127.0.0.2", ["127.0.0.2"], "127.0.0.2"),
        ("::1", ["::1"], "::1"),
        ("0.0.0.0", ["0.0.0.0"], "0.0.0.0"),
        ("fed.example.org", ["192.0.2.7"], "fed.example.org"),
    ],
)
def test_the_page_is_opened_by_a_name_that_it_answers_to(host, addresses, wanted):
    access = access_module.Access(host, addresses, 9444)
    assert access.host == wanted
    name = page_url(access.host, 9444, None).removeprefix("http://").strip("/")
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b""}
    refusal = access.refuse({**scope, "headers": [(b"host", name.encode())]})
    assert refusal is None or refusal.status_code == 401


# ── the stream ──


def test_changes_and_the_end_are_sent(monkeypatch):
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(site, "TICK_SECONDS", 0.01)
    page = StaticPage(state="one", clients="c\n\nevent: forged")
    with serving(page) as found, Viewer(found.port) as viewer:
        first = viewer.read_until('"now"')
        page.parts["state"] = "two"
        second = viewer.read_until('"two"')[len(first) :]
        viewer.read_until("event: tick")
        found.listener.call(found.feed.end(), 10.0)
        text = viewer.read_until("never")  # the stream ends
    assert "HTTP/1.1 200" in first and "text/event-stream" in first and POLICY in first
    assert "one" in first and "clients" in first and "clients" not in second
    assert not re.search("^event: forged", text, re.MULTILINE)
    assert '"ended"' in text and text.rstrip().endswith("0") and "event: end\ndata: {}" in text


def test_pages_are_rendered_only_for_viewers_and_once_for_all_of_them(monkeypatch):
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.1)
    page = StaticPage(state="one")
    with serving(page) as found:
        time.sleep(0.3)
        assert page.num_made == 0
        with Viewer(found.port) as first, Viewer(found.port) as second:
            first.read_until('"now"'), second.read_until('"now"')
            started, num_before = time.monotonic(), page.num_made
            time.sleep(0.5)
            assert 1 <= page.num_made - num_before <= (time.monotonic() - started) / 0.1 + 2
        until(lambda: found.feed.num_viewers == 0)
        time.sleep(0.3)
        num_before = page.num_made
        time.sleep(0.3)
        assert page.num_made == num_before


def test_the_number_of_viewers_is_limited(monkeypatch):
    monkeypatch.setattr(site, "MAX_VIEWERS", 2)
    with serving(StaticPage(state="x")) as found:
        with Viewer(found.port) as first, Viewer(found.port) as second:
            first.read_until('"now"'), second.read_until('"now"')
            assert ask(found.port, "/events")[0] == 503 and ask(found.port)[0] == 200
        until(lambda: found.feed.num_viewers == 0)
        with Viewer(found.port) as third:
            assert "200 OK" in third.read_until('"now"')


def test_a_viewer_that_does_not_read_is_disconnected_and_the_others_continue(monkeypatch):
    monkeypatch.setattr(site, "SEND_SECONDS", 0.3)
    monkeypatch.setattr(site, "TICK_SECONDS", 0.1)
    page = StaticPage(state="x" * 20_000_000)
    with serving(page) as found, Viewer(found.port) as slow:
        until(lambda: found.feed.num_viewers == 1)
        assert ask(found.port, "/style.css")[0] == 200  # nothing waits for it
        until(lambda: found.feed.num_viewers == 0)
        until(lambda: found.listener.num_connections() == 0)
        with pytest.raises(OSError):
            while slow.socket.recv(2**20):
                pass
            raise ConnectionResetError  # closed: what had been sent is all that came


def test_silent_connections_are_few_and_short():
    limits = ConnectionLimits(
        max_connections=8, max_strangers=4, max_per_address=4, stranger_seconds=1.0
    )
    with serving(StaticPage(state="fine"), limits=limits) as found:
        silent = [
            access_module.socket.create_connection(("127.0.0.1", found.port)) for _ in range(20)
        ]
        until(lambda: 0 < found.listener.num_connections() <= 4)
        assert "fine" in ask(found.port)[2]
        until(lambda: found.listener.num_connections() == 0)
        for one in silent:
            one.close()


def test_a_page_that_fails_ends_the_stream_and_works_again(monkeypatch):
    monkeypatch.setattr(feed, "POLL_SECONDS", 0.05)
    page = StaticPage(state="fine")
    with serving(page) as found:
        with Viewer(found.port) as viewer:
            viewer.read_until('"now"')
            page.parts = None
            viewer.read_until("never")
        page.parts = {"state": "again"}
        with Viewer(found.port) as viewer:
            assert "again" in viewer.read_until("again")
