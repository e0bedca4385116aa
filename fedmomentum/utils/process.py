"""Settings of this process: interruption, other libraries' output, memory, installed versions."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

# glibc's ids of two `mallopt` settings: how much freed memory it keeps at the top of the heap, and
# from which size on a block gets its own memory mapping, which is released with the block.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
TRIM_THRESHOLD = 256 * 2**20
"""Bytes of freed memory to keep: more than the largest tensors in an aggregation."""
MMAP_THRESHOLD = 32 * 2**20
"""The most that glibc accepts."""
ADVISING_LOGGERS = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that quantization libraries write to on import, and bitsandbytes in every product."""
WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The environment variables that control how OpenMP threads wait for one another."""
BRIEF_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""The values to set. GNU OpenMP, which torch uses on Linux, obeys the second, which is its own
default with more threads than cores. Measured in docs/appendix/performance.md.
"""
CPU_LIMITS = (
    ("/sys/fs/cgroup/cpu.max", None),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
"""Files with a container's CPU limit: quota and period in one file or in two."""
# How long until a signal that was postponed, or whose exception Python has ignored, is sent again.
REPEAT_SECONDS = 0.05
# The longest that imports postpone an interruption. Some take many seconds on a busy machine.
IMPORT_SECONDS = 20.0


class Interruption:
    """Tracks whether the user or a service manager has asked this process to end.

    Attributes:
        came: Whether a signal has been received since `listen`.
    """

    def __init__(self) -> None:
        self.came = False
        self._signal: int = signal.SIGINT
        self._raises_at: float | None = None
        self._is_repeated = False
        self._timer: threading.Timer | None = None

    def listen(self, *, although_ignored: bool = False) -> None:
        """Handle SIGINT and SIGTERM from now on.

        A signal during an import takes effect after it: in the middle of one, the exception can
        abort the process, if C++ code of a library does not expect it, or leave half a module
        behind. A second signal does not wait.

        Args:
            although_ignored: Handle SIGINT even if the parent process set it to be ignored. A shell
                without job control does that for background commands, and a service that a script
                starts with `&` could otherwise only be ended by SIGKILL.
        """
        self.came = False
        if although_ignored or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._interrupt)
        sys.unraisablehook = self._repeat_if_lost

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        is_repeated = self._is_repeated
        self._is_repeated = False
        self.came = True
        self._signal = signum
        now = time.monotonic()
        is_second = self._raises_at is not None and not is_repeated
        if self._raises_at is None:
            self._raises_at = now + IMPORT_SECONDS
        if _is_importing(frame) and not is_second and now < self._raises_at:
            self._repeat()
            return
        self._raises_at = None
        # A signal that still waits must not interrupt the cleanup.
        if self._timer is not None:
            self._timer.cancel()
        raise KeyboardInterrupt

    def _repeat_if_lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Resend the signal if its exception was raised where Python ignores exceptions.

        That happens in finalizers and in weak reference callbacks, such as those of imports.
        """
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
            return
        self._repeat()

    def _repeat(self) -> None:
        """Send the signal to this process again, after a moment."""
        self._timer = threading.Timer(REPEAT_SECONDS, self._send)
        self._timer.daemon = True
        self._timer.start()

    def _send(self) -> None:
        self._is_repeated = True
        os.kill(os.getpid(), self._signal)


INTERRUPTION = Interruption()


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a frame is part of an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@cache
def installed_version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries' progress bars and advice off the terminal, but not their errors."""
    import datasets
    import transformers

    # If unset, tokenizers warn when a process is started.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging: Any = transformers.utils.logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quiet_advice() -> None:
    """Keep the output of quantization libraries on import off the terminal.

    transformers and PEFT import them whenever they are installed. Log levels set by the user are
    kept.
    """
    for name in ADVISING_LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)


def wait_briefly() -> None:
    """Make waiting threads yield their cores to other work after a few microseconds.

    By default, an OpenMP thread that has finished its part of an operation keeps its core busy
    until the others are done. If the machine is busy, the others have to wait for cores, and every
    operation costs a scheduler time slice. Results are not affected. User settings take precedence.
    OpenMP reads the variables only once, so torch must not be loaded yet.
    """
    if not any(name in os.environ for name in WAIT_SETTINGS):
        os.environ.update(BRIEF_WAITING)


def describe_waiting() -> str:
    """Describe how this process's threads wait for one another, according to its environment."""
    given = [f"{name}={os.environ[name]}" for name in WAIT_SETTINGS if name in os.environ]
    return ", ".join(given) or "busy waiting"


def available_cpus() -> int:
    """Return the number of cores that this process may use, by its affinity and container limit."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for quota_file, period_file in CPU_LIMITS:
        try:
            numbers = Path(quota_file).read_text().split()
            if period_file is not None:
                numbers += Path(period_file).read_text().split()
            quota, period = (int(number) for number in numbers)
        # The file does not exist, or there is no limit: "max 100000".
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            count = min(count, max(1, -(-quota // period)))
    return max(1, count)


def tune_malloc() -> None:
    """Let the C library keep up to `TRIM_THRESHOLD` bytes of freed memory for reuse.

    By default, it returns a tensor's memory to the system and gets the next one's page by page,
    zeroed, which takes a fifth of an aggregation's time. Does nothing if the C library is not
    glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
