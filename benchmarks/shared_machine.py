"""What a training step costs beside other work, by how threads wait for one another.

    python benchmarks/shared_machine.py [--threads 2] [--repeats 3] [--ways usual,passive] [--json FILE]

Every way of waiting is a process of its own, for OpenMP reads it once. The ways take turns, alone
and beside a neighbor: another process that trains with as many threads, as two jobs on one machine
do. `usual` is what OpenMP does by itself: a thread that waits for others keeps its core busy. `brief`
is what fedmomentum's command line sets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from fedmomentum.utils.process import BRIEF_WAITING, WAIT_SETTINGS

ROOT = Path(__file__).resolve().parents[1]
WAYS: dict[str, dict[str, str]] = {
    "usual": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "brief": dict(BRIEF_WAITING),
    "spin-10000": {"GOMP_SPINCOUNT": "10000"},
}
"""What is set in the environment."""
SIZE = 576
NUM_LAYERS = 4
NUM_TOKENS = 128
SETTINGS = (*WAIT_SETTINGS, "OMP_NUM_THREADS")


def train(threads: int, seconds: float) -> tuple[float, str]:
    """Train some layers of a small decoder's size, and return a step's seconds.

    Returns:
        The mean over the steps, and a hash of the weights after three: the same whatever the time,
        so that ways can be compared.
    """
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(NUM_LAYERS):
        layers += [torch.nn.Linear(SIZE, 2 * SIZE), torch.nn.SiLU()]
        layers += [torch.nn.Linear(2 * SIZE, SIZE), torch.nn.LayerNorm(SIZE)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(NUM_TOKENS, SIZE)
    print("training", flush=True)
    digest = ""
    durations: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(durations) < 4:
        start = time.perf_counter()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        durations.append(time.perf_counter() - start)
        if len(durations) == 3:
            state = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
            digest = hashlib.sha256(state).hexdigest()
    return statistics.fmean(durations[1:]), digest


def start(way: str, threads: int, seconds: float) -> subprocess.Popen[str]:
    """Start a process that trains, and waits in a way."""
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    environment |= WAYS[way]
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, "--child", str(seconds), "--threads", str(threads)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def measure(way: str, threads: int, seconds: float, neighbor: str | None) -> tuple[float, str]:
    """Return a step's seconds and the hash of the weights, alone or beside a neighbor."""
    beside = start(neighbor, threads, 3600) if neighbor is not None else None
    if beside is not None:
        assert beside.stdout is not None
        beside.stdout.readline()  # it trains
    try:
        out, _ = start(way, threads, seconds).communicate()
    finally:
        if beside is not None:
            beside.kill()
            beside.wait()
    step, digest = json.loads(out.splitlines()[-1])
    return step, digest


def main() -> None:
    """Measure all ways in turn, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--ways", default=",".join(WAYS), help="separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=float)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(train(options.threads, options.child)))
        return
    # Not in the processes that are measured.
    from common import Target, finish
    from rich.console import Console

    ways = options.ways.split(",")
    steps: dict[str, dict[str, list[float]]] = {way: {"alone": [], "beside": []} for way in ways}
    digests = set()
    for _ in range(options.repeats):
        for way in ways:
            for place, neighbor in (("alone", None), ("beside", "usual")):
                step, digest = measure(way, options.threads, options.seconds, neighbor)
                steps[way][place].append(step)
                digests.add(digest)
                print(f"{way:14} {place:7} {step:.3f} s", file=sys.stderr, flush=True)
    print("| threads wait | alone, s a step | beside a neighbor, s a step |")
    print("|---|---|---|")
    for way, places in steps.items():
        cells = [f"{statistics.median(values):.3f}" for values in places.values()]
        print(f"| {way} | {' | '.join(cells)} |")
    targets = [Target.at_most("different weights after three steps", 1, len(digests))]
    if {"usual", "brief"} <= steps.keys():
        usual, brief = (statistics.median(steps[way]["beside"]) for way in ("usual", "brief"))
        name = "time of a step beside a neighbor, brief waiting to usual"
        targets.append(Target.at_most(name, 1, brief / usual))
    finish(targets, options.json, Console(), steps=steps)


if __name__ == "__main__":
    main()
