"""Runs a program written by a model in an isolated sandbox.

Each program runs in its own process in Linux namespaces: no network, no other processes, no files
but Python's own libraries, an empty environment, limits on memory, time and open files, and no
system calls that reach outside. `check_sandbox` tests these barriers before anything is scored; if
one does not hold, no program is run.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmomentum.errors import ConfigError

CHILD = Path(__file__).with_name("sandbox_child.py")
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
NAMESPACES = ("--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts")
# More than a verdict needs; a program that writes more is stopped.
MAX_VERDICT_BYTES = 4096
READY = b"ready\n"


@dataclass(frozen=True)
class Limits:
    """The resource limits of a program.

    Attributes:
        cpu_seconds: CPU time, so that programs do not fail on a busy machine.
        wall_seconds: Wall-clock time, for programs that wait.
        memory_bytes: Address space.
        open_files: Number of files open at a time.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 60.0
    memory_bytes: int = 2**30
    open_files: int = 64


LIMITS = Limits()
PROBES = {
    "read a file": "open({path!r}).read()",
    "see a process": "import os; assert os.listdir('/proc')",
    "open a socket": "import socket; socket.socket()",
    "start a process": "import os; os.fork()",
    "start a thread": "import threading; threading.Thread(target=print).start()",
    "write a file": "open('/file', 'w').write('x')",
    "take more memory than allowed": "bytearray({too_much})",
    "see the environment": "import os; assert os.environ",
    "leave early and count as right": "import os; os._exit(0)",
}
"""What a program must not be able to do -> a program that tries."""


def run_program(program: str, limits: Limits = LIMITS) -> bool:
    """Run a Python program in the sandbox; return whether it ended without an exception.

    Args:
        program: The source code.
        limits: Its resource limits; a program that exceeds them has failed.

    Raises:
        ConfigError: If the sandbox cannot be set up here.
    """
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="fedmomentum-") as root:
        request = {"nonce": nonce, "program": program, "root": root, "limits": asdict(limits)}
        # A program with unencodable code points is invalid, but it is not up to us to reject it.
        verdict, problem = _run_child(json.dumps(request).encode(), limits.wall_seconds)
    if not verdict.startswith(READY):
        raise ConfigError(f"--run-code: {_reason(problem)}. Nothing was run")
    return verdict == READY + nonce.encode()


def check_sandbox() -> None:
    """Raise an error if the sandbox cannot be set up or does not hold on this machine.

    Raises:
        ConfigError: If a correct program does not pass, or a probe gets through.
    """
    if not run_program("def double(x):\n    return 2 * x\nassert double(2) == 4"):
        raise ConfigError(
            "--run-code: a program that is right does not pass in the sandbox of this machine"
        )
    too_much = 2 * LIMITS.memory_bytes
    for what, probe in PROBES.items():
        if run_program(probe.format(path=str(CHILD), too_much=too_much)):
            raise ConfigError(
                f"--run-code: in the sandbox of this machine a program can {what}. Nothing of the "
                "benchmark was run; use another machine"
            )


def _run_child(request: bytes, wall_seconds: float) -> tuple[bytes, str]:
    """Run the child and return its standard output and standard error."""
    unshare = shutil.which("unshare", path=SYSTEM_PATH)
    if unshare is None:
        raise ConfigError(
            "--run-code needs Linux and the program `unshare` of util-linux, for namespaces; it is "
            "not installed"
        )
    command = [unshare, *NAMESPACES, "--fork", "--kill-child"]
    command += [sys.executable, "-I", "-S", "-X", "utf8", str(CHILD)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin and process.stdout and process.stderr
    try:
        # This cannot deadlock: the child reads everything before it writes anything.
        try:
            process.stdin.write(request)
            process.stdin.close()
        except BrokenPipeError:
            pass
        verdict = _read_until(process.stdout.fileno(), time.monotonic() + wall_seconds)
        problem = b"" if verdict.startswith(READY) else process.stderr.read(MAX_VERDICT_BYTES)
        return verdict, problem.decode(errors="replace")
    finally:
        _end(process)


def _read_until(handle: int, deadline: float) -> bytes:
    """Read a pipe until it is closed, the deadline has passed, or too much has arrived."""
    text = b""
    while len(text) <= MAX_VERDICT_BYTES:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([handle], [], [], remaining)[0]:
            break
        part = os.read(handle, MAX_VERDICT_BYTES)
        if not part:
            break
        text += part
    return text


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill `unshare` and with it everything in its namespaces."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass


def _reason(problem: str) -> str:
    """Return the last line of an error output, with advice."""
    lines = problem.strip().splitlines()
    last = lines[-1].strip() if lines else "the sandbox ended without a word"
    return (
        f"programs cannot be kept in namespaces on this machine ({last}). The kernel must allow "
        "user namespaces; containers and some distributions switch them off"
    )
