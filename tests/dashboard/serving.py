"""A site on a free loopback port, in this process, and raw requests to it."""

import contextlib
import http.client
import socket

from fedmomentum.dashboard.access import Access
from fedmomentum.dashboard.site import LIMITS, Site
from fedmomentum.report.live_page import LivePage, LiveUpdate
from fedmomentum.web.listener import Listener


class StaticPage:
    """A page whose parts a test sets."""

    style = staticmethod(LivePage.style)
    script = staticmethod(LivePage.script)

    def __init__(self, **parts):
        self.parts = parts
        self.num_made = 0

    def update(self, *, is_ended=False):
        self.num_made += 1
        ended = {"state": "ended"} if is_ended else {}
        return LiveUpdate(dict(self.parts) | ended, "title", "spoken", 1.0)

    def page(self, update):
        return f"<p>{update.parts}</p>"


@contextlib.contextmanager
def serving(page, host="127.0.0.1", limits=LIMITS, port=0):
    site = Site(page)
    with Listener(site, host, port, limits=limits) as listener:
        site.access = Access(host, listener.addresses(), listener.port)
        site.listener, site.port = listener, listener.port
        yield site


def ask(port, path="/", method="GET", host=None, headers=()):
    """The answer to one request: status, headers in lower case, text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    hosts = [f"127.0.0.1:{port}"] if host is None else [host] if isinstance(host, str) else host
    for name in hosts:
        connection.putheader("Host", name)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    found = {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return answer.status, found, text


class Viewer:
    """A stream of updates that a test reads; a context manager."""

    def __init__(self, port, headers=""):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.sendall(
            f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{headers}\r\n".encode()
        )
        self.text = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def read_until(self, words):
        """Return what has arrived once these words have, or once the stream has ended."""
        while words not in self.text:
            data = self.socket.recv(65536)
            if not data:
                break
            self.text += data.decode()
        return self.text
