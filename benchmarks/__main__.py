"""All benchmarks, one after the other, and one table of what was wanted and what came out.

    python benchmarks [--only wire scale ...] [--out runs/bench]        (`make bench`)

Each is a process of its own and writes `<name>.json` into the folder; `all.json` there holds
everything, with the machine's limits. `gpu` is left out where torch sees no GPU, unless it is asked
for. One that fails is named in the end, and the others still run. A target that is not met
is no failure.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import environment, machine_limits, write_json
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
NAMES = (
    "aggregation_speed",
    "training_speed",
    "client",
    "network",
    "scale",
    "wire",
    "secure_sum",
    "catching_up",
    "shared_machine",
    "gpu",
)
SCRIPTS = {name: HERE / f"{name}.py" for name in NAMES}


def default_names() -> list[str]:
    """Return the names of the benchmarks that can say something on this machine."""
    return [name for name in NAMES if name != "gpu" or torch.cuda.is_available()]


def run_all(scripts: Mapping[str, Path], out: Path, console: Console) -> list[str]:
    """Run every script into `out`, print and write the results; return the names of failures."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    failed: list[str] = []
    results: dict[str, dict[str, Any]] = {}
    limits = machine_limits()
    for name, script in scripts.items():
        console.rule(name)
        file = out / f"{name}.json"
        started = time.perf_counter()
        file.unlink(missing_ok=True)
        code = subprocess.run([sys.executable, str(script), "--json", str(file)]).returncode
        seconds[name] = time.perf_counter() - started
        if code or not file.is_file():
            failed.append(name)
        if file.is_file():
            results[name] = json.loads(file.read_text())
    targets = [
        {"benchmark": name, **target}
        for name, result in results.items()
        for target in result["targets"]
    ]
    total = time.perf_counter() - began
    console.rule("all")
    report(targets, console)
    console.print(
        f"This machine: copy {limits.copy:.0f} and triad {limits.triad:.0f} GB/s, matrix products "
        f"{limits.float32:.0f} (float32) and {limits.float64:.0f} (float64) GFLOP/s"
    )
    console.print(
        f"{total / 60:.1f} minutes: {', '.join(f'{name} {s:.0f} s' for name, s in seconds.items())}"
    )
    for name in failed:
        console.print(f"[red]{name} failed[/]; its output is above")
    write_json(
        out / "all.json",
        targets=targets,
        failed=failed,
        seconds=seconds,
        total_seconds=total,
        limits=limits,
        environment=environment("transformers", "peft", "flwr"),
        benchmarks=results,
    )
    console.print(f"all of it: {out / 'all.json'}")
    return failed


def report(targets: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the table of all targets, and how many are met."""
    table = Table(
        "benchmark", "target", "wanted", "got", "met", title="Targets", title_justify="left"
    )
    before = ""
    for target in targets:
        got = "not finite" if target["got"] is None else f"{target['got']:.4g}"
        verdict = "[green]met[/]" if target["met"] else "[red]not met[/]"
        name = target["benchmark"]
        shown = "" if name == before else name
        table.add_row(shown, target["name"], target["wanted"], got, verdict)
        before = name
    console.print(table)
    console.print(f"{sum(target['met'] for target in targets)} of {len(targets)} targets met")


def main() -> int:
    """Run the benchmarks that are named; return 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=default_names())
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    return int(bool(run_all({name: SCRIPTS[name] for name in chosen.only}, chosen.out, Console())))


if __name__ == "__main__":
    sys.exit(main())
