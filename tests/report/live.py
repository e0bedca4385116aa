"""A directory of a run in progress, as its server writes it, and what a page made of it holds."""

from html.parser import HTMLParser

import msgspec

from fedmomentum.report.live_page import LivePage
from fedmomentum.server.status import StatusWriter
from tests.report.folders import records, row, write_run

CLIENTS = ["north", "south", "east", "west"]
EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' autofocus onfocus=alert(1) '",
    "n" * 256,
    "abc\u202egnp.exe",
]


def write_running(folder, clients=CLIENTS, *, num_rounds=3, reason="no answer within 60 s", **more):
    """Three rounds of ten are done; in the fourth the first is late, the last failed, one answered."""
    rows = [
        row(k, clients, ["a", "b"], failures={clients[1]: reason} if k == 2 else None)
        for k in range(num_rounds + 1)
    ]
    for one in rows:
        one |= more
    write_run(folder, rows, clients, num_rounds=10)
    status = StatusWriter(folder, 10)
    status.on_nodes(clients, clients[:-1])
    for record in records(rows[1:]):
        status.on_round_end(record)
    status.on_round_begin(num_rounds + 1, clients)
    for number, client in enumerate(clients[:-1]):
        status.on_task_sent(client, 1_000_000, 900.0 if number else -5.0)
    status.on_failure(clients[-1], reason)
    status.on_reply(clients[2], 2_000_000)
    status.on_late_reply(clients[1])
    return status


class Elements(HTMLParser):
    """The elements of HTML with their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def whole_page(page: LivePage, **how) -> Elements:
    return Elements(page.page(page.update(**how)))


def withholding(withheld):
    return msgspec.to_builtins(withheld)
