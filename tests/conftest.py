"""No test uses the network, and tiny models are fastest on one thread; the command line runs in this process."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import signal
import sys

import pytest
import torch

from fedmomentum.cli import main as cli
from fedmomentum.cli.options import OUT
from tests.hub_double import point_to, serve_hub

torch.set_num_threads(1)
# No test cuts the power, and waiting for the disk would take a tenth of the time of the tests.
os.fsync = lambda handle: None


def pytest_configure():
    """Make Ctrl-C work in tests that run in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Leave what the imports made out of garbage collections; it is never garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def call(monkeypatch, capsys):
    """The command in this process: `call(*words)` gives (exit code, standard output, standard error)."""
    monkeypatch.setattr(OUT, "_width", 200)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["fedmomentum", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on 127.0.0.1 that this process is logged in to; see `tests.hub_double`."""
    with serve_hub() as double:
        point_to(double, tmp_path, monkeypatch)
        yield double
