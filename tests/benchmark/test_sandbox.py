"""A program that a model wrote reaches nothing: no file, network, process, memory, or score of its own."""

import subprocess

import pytest

from fedmomentum.benchmark import sandbox
from fedmomentum.benchmark.programs import pass_at_1
from fedmomentum.benchmark.sandbox import LIMITS, PROBES, Limits, check_sandbox, run_program
from fedmomentum.errors import ConfigError
from tests.benchmark.files import PROGRAM


def namespaces():
    """Whether this machine allows namespaces; without them only the refusal can be tested."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except FileNotFoundError:
        return False


needs_namespaces = pytest.mark.skipif(not namespaces(), reason="no user namespaces here")


@needs_namespaces
def test_correct_programs_pass_and_wrong_ones_do_not(tmp_path):
    check_sandbox()
    imports = "math, re, random, hashlib, collections, heapq, itertools, functools, decimal, json"
    assert run_program(f"import {imports}\nhashlib.md5(b'a')\nfrom typing import List, Optional")
    for wrong in ("assert 1 == 2", "def f(:", "raise SystemExit(0)", "import sys; sys.exit()"):
        assert not run_program(wrong)
    assert pass_at_1(PROGRAM, ["    return 2 * x\n"]) == {"pass_at_1": 1.0}
    assert pass_at_1(PROGRAM, ["    return 3 * x\n"]) == {"pass_at_1": 0.0}


@needs_namespaces
@pytest.mark.parametrize(
    ("attempt", "needed"),
    [
        ("open({path!r}).read()", "FileNotFoundError"),
        ("open('/etc/passwd').read()", "FileNotFoundError"),
        ("import os; os.listdir('/proc')", "FileNotFoundError"),
        ("import os; os.listdir('/home')", "FileNotFoundError"),
        ("open('/x', 'w')", "OSError"),
        ("import os; open(os.__file__, 'a')", "OSError"),
        ("import tempfile; tempfile.TemporaryFile()", "OSError"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import socket; socket.socketpair()", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['/bin/true'])", "OSError"),
        ("import os; os.execv('/bin/true', ['true'])", "OSError"),
        ("import threading; threading.Thread(target=print).start()", "RuntimeError"),
        ("bytearray(2 ** 31)", "MemoryError"),
        ("import os; os.memfd_create('x')", "PermissionError"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
            "(ValueError, OSError)",
        ),
        ("import os; assert os.environ", "AssertionError"),
        ("import os; assert len(os.listdir('/')) > 4", "AssertionError"),
        ("import os; os.chroot('/')", "PermissionError"),
        ("import os; os.chmod(os.__file__, 0o777)", "OSError"),
        ("import os; os.mkdir('/usr/lib/new')", "OSError"),
        ("import os; os.mkdir('/new')", "OSError"),
        (
            "import ctypes, os\n"
            "if ctypes.CDLL(None, use_errno=True).unshare(0x10000000): raise OSError",
            "OSError",
        ),
        (
            "import ctypes\n"
            "if ctypes.CDLL(None).mount(b'tmpfs', b'/usr', b'tmpfs', 0, b''): raise OSError",
            "OSError",
        ),
    ],
)
def test_attempts_fail_in_the_way_they_should(tmp_path, attempt, needed):
    """The attempt alone fails, and passes where its error is caught: it ran, and the sandbox stopped it."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    attempt = attempt.format(path=str(secret)) if "{path" in attempt else attempt
    assert not run_program(attempt)
    body = "\n".join(f"    {line}" for line in attempt.splitlines())
    assert run_program(
        f"stopped = False\ntry:\n{body}\nexcept {needed}:\n    stopped = True\nassert stopped"
    )


@needs_namespaces
def test_programs_end_when_their_time_is_over_and_leave_nothing(tmp_path):
    assert not run_program("while True: pass", Limits(cpu_seconds=1))
    assert not run_program("import time; time.sleep(100)", Limits(wall_seconds=1))
    # a flood on every open file is cut off
    flood = "import os\nfor n in range(64):\n    try:\n        os.write(n, b'x' * 100000)\n    except OSError: pass"
    assert not run_program(flood, Limits(wall_seconds=5))
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "time.sleep(100)" not in running


@needs_namespaces
def test_a_program_cannot_end_the_process_and_count_as_correct():
    for early in ("os._exit(0)", "os.abort()"):
        assert not run_program(f"import os\n{early}")
    assert not run_program(
        "import os\nfor n in range(9):\n    try: os.write(n, b'passed')\n    except OSError: pass"
    )


@needs_namespaces
def test_a_sandbox_that_does_not_isolate_is_detected_before_anything_runs(monkeypatch):
    for what in PROBES:
        monkeypatch.setattr(sandbox, "PROBES", {what: "pass"})
        with pytest.raises(ConfigError, match=f"a program can {what}"):
            check_sandbox()
    assert not run_program(
        PROBES["take more memory than allowed"].format(too_much=2 * LIMITS.memory_bytes)
    )


def test_without_namespaces_it_is_refused_by_name(monkeypatch, tmp_path):
    fake = tmp_path / "unshare"
    fake.write_text(
        "#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox, "SYSTEM_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="namespaces.*Operation not permitted.*Nothing was run"):
        check_sandbox()
    monkeypatch.setattr(sandbox, "SYSTEM_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="needs Linux and the program `unshare`"):
        check_sandbox()
