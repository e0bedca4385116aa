"""What the benchmarks share: alternating timings, the machine's own limits, and targets met or not.

    from common import Target, alternate, environment, finish, machine_limits, medians,
    print_targets, write_json

A ratio is measured within one process: `alternate` runs the sides in turn, so that a machine that
slows down slows all of them, and medians are compared.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fedmomentum

CONFIG = Path(fedmomentum.__file__).with_name("configs") / "default.toml"
"""The configuration of the demonstration, which comes with the package."""

Sides = Mapping[str, Callable[[], Any]]
"""Label to what is timed under it."""
Clock = Callable[[], float]
"""Returns seconds: of wall time, or of processor time."""


def alternate(
    sides: Sides, repeats: int, *, warmups: int = 1, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Return seconds of every run of every side, in turn, after `warmups` unmeasured turns.

    On a GPU each side is waited for, so that the time is that of the work and not of its launch. On
    a machine that has other work, `time.thread_time` on one thread counts this work only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmups + repeats):
        for name, side in sides.items():
            started = clock()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmups:
                seconds[name].append(clock() - started)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the median of each side."""
    return {name: statistics.median(times) for name, times in seconds.items()}


# ── the machine ──


@dataclass(frozen=True)
class Limits:
    """What this machine can do, best of several runs, with the threads that torch has now.

    Attributes:
        copy: GB/s of `a = b` over arrays that no cache holds, read and write counted (STREAM's
            copy).
        triad: GB/s of `a = b + s c`, two reads and a write counted (STREAM's triad).
        float32: GFLOP/s of a 2048 x 2048 x 2048 matrix product.
        float64: the same in float64.
    """

    copy: float
    triad: float
    float32: float
    float64: float

    def seconds(
        self, *, gigabytes: float = 0.0, float32: float = 0.0, float64: float = 0.0
    ) -> float:
        """Return the least time for this memory traffic and these GFLOP, without overlap."""
        return gigabytes / self.triad + float32 / self.float32 + float64 / self.float64


def machine_limits(*, repeats: int = 5, clock: Clock = time.perf_counter) -> Limits:
    """Measure `Limits`; about two seconds."""
    a, b, c = (torch.ones(2**26) for _ in range(3))  # 256 MB each
    copy = _best(lambda: a.copy_(b), repeats, clock)
    triad = _best(lambda: torch.add(b, c, alpha=0.5, out=a), repeats, clock)
    size = a.numel() * a.element_size() / 1e9
    rates = {}
    for dtype in (torch.float32, torch.float64):
        x, y = (torch.rand(2048, 2048, dtype=dtype) for _ in range(2))
        rates[dtype] = 2 * 2048**3 / 1e9 / _best(partial(torch.matmul, x, y), repeats, clock)
    return Limits(2 * size / copy, 3 * size / triad, rates[torch.float32], rates[torch.float64])


def _best(run: Callable[[], Any], repeats: int, clock: Clock) -> float:
    return min(alternate({"": run}, repeats, clock=clock)[""])


def environment(*packages: str) -> dict[str, Any]:
    """Describe what a measurement depends on: processor, threads, versions of the packages."""
    versions = {}
    for package in ("torch", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


# ── targets ──


@dataclass(frozen=True)
class Target:
    """Something that was wanted of a measurement.

    Attributes:
        name: what is measured, and of what.
        wanted: the bound as text, such as `at least 20`.
        got: the measured number.
        met: whether it keeps the bound.
    """

    name: str
    wanted: str
    got: float
    met: bool

    @classmethod
    def at_least(cls, name: str, bound: float, got: float) -> Target:
        """Return a target that is met where `got >= bound`."""
        return cls(name, f"at least {bound:g}", got, got >= bound)

    @classmethod
    def at_most(cls, name: str, bound: float, got: float) -> Target:
        """Return a target that is met where `got <= bound`."""
        return cls(name, f"at most {bound:g}", got, got <= bound)


def print_targets(
    targets: Sequence[Target], *, title: str = "Targets", console: Console | None = None
) -> None:
    """Print a table of the targets: wanted, got, met or not."""
    table = Table("target", "wanted", "got", "met", title=title, title_justify="left")
    for column in table.columns[1:3]:
        column.justify = "right"
    for target in targets:
        verdict = "[green]met[/]" if target.met else "[red]not met[/]"
        table.add_row(target.name, target.wanted, f"{target.got:.4g}", verdict)
    (console or Console()).print(table)


def write_json(
    path: str | Path, *, targets: Sequence[Target | Mapping[str, Any]] = (), **measured: Any
) -> None:
    """Write `measured` and the targets as JSON; dataclasses become tables, NaN null."""
    payload = {**measured, "targets": list(targets)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(_plain(payload), indent=1, sort_keys=False) + "\n")


def finish(
    targets: Sequence[Target], file: Path | None, console: Console, *packages: str, **measured: Any
) -> None:
    """Print a benchmark's targets, met or not, and write everything as JSON to `file`, if given."""
    if targets:
        print_targets(targets, console=console)
    if file:
        write_json(file, targets=targets, environment=environment(*packages), **measured)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
