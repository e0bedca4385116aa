"""Settings of this process: interruption, other libraries' output, memory, installed versions."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# glibc's numbers of two settings of `mallopt`: how much freed memory at the end of the heap it
# keeps, and from which size on a block has a mapping of its own, which is released with the block.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
TRIM_THRESHOLD = 256 * 2**20
"""Bytes of freed memory to keep: more than the largest tensors of an aggregation."""
MMAP_THRESHOLD = 32 * 2**20
"""The most that glibc accepts."""
ADVISING_LOGGERS = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""What libraries of quantized weights write to on import; and bitsandbytes in every product."""
# After this time a signal whose exception Python has ignored is sent again.
REPEAT_SECONDS = 0.05


class Interruption:
    """Whether the user or a service manager has asked this process to end.

    Attributes:
        came: Whether a signal has been received since `listen`.
    """

    def __init__(self) -> None:
        self.came = False
        self._signal: int = signal.SIGINT

    def listen(self, *, although_ignored: bool = False) -> None:
        """Handle SIGINT and SIGTERM from now on.

        Args:
            although_ignored: Handle SIGINT also where the parent process had it ignored. A shell
                without job control starts background commands so, and a service that a script
                started with `&` could otherwise be ended by SIGKILL only.
        """
        self.came = False
        if although_ignored or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupt)
        signal.signal(signal.SIGTERM, self._interrupt)
        sys.unraisablehook = self._repeat_if_lost

    def _interrupt(self, signum: int, frame: Any) -> None:
        self.came = True
        self._signal = signum
        raise KeyboardInterrupt

    def _repeat_if_lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send the signal again if its exception was raised where Python ignores exceptions.

        That is so in finalizers and in callbacks of weak references, such as those of imports.
        """
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
            return
        timer = threading.Timer(REPEAT_SECONDS, os.kill, (os.getpid(), self._signal))
        timer.daemon = True
        timer.start()


INTERRUPTION = Interruption()


@cache
def installed_version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries' progress bars and advice off the terminal; errors still show."""
    import datasets
    import transformers

    # Unset, tokenizers warn where a process is started.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging: Any = transformers.utils.logging
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def quiet_advice() -> None:
    """Keep what libraries of quantized weights write on import off the terminal.

    transformers and PEFT import them wherever they are installed. A level that the user has set
    stays.
    """
    for name in ADVISING_LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)


def tune_malloc() -> None:
    """Let the C library keep up to `TRIM_THRESHOLD` bytes of freed memory for the next allocation.

    By default it returns a tensor's memory to the system and gets the next one's page by page, with
    zeros: a fifth of the time of an aggregation. Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
