"""What goes with the gain of shared moments: cosine, drift, energy or step size?

    python experiments/banking77/mechanism.py [--runs runs/banking77-moments]

With the directory of moments.py, collects the measures of its comparisons in
results/mechanism.csv: one row a run, each measure the mean over its rounds. Without, reads that
file. Prints the tables and draws docs/appendix/results/mechanism.svg.
"""

import argparse
import csv
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from figures import RESULTS, curve, scores, use_style
from moments_figures import FRESH, NAMES
from tuned_comparison import mean_measures, method_of  # in the directory above

from fedmomentum.results.comparison import read_comparison
from fedmomentum.results.method_run import MethodRun

TABLE = RESULTS / "mechanism.csv"
FIGURE = RESULTS.parents[2] / "docs" / "appendix" / "results" / "mechanism.svg"
SETTINGS = {"few": "2 local steps, 24 rounds", "many": "12 local steps, 5 rounds"}
MEASURES = {
    "update_cosine": "cosine with the update before",
    "client_drift": "drift of the clients",
    "retained_energy": "energy in the adapter",
    "update_norm": "norm of a round's update",
}
ADAPTER_IS_NEW = ("flora",)
"""Methods that keep nothing in the adapter, so that its energy says nothing about them."""


@dataclass(frozen=True)
class Run:
    """One run: its scores after the last round, and the means of its measures over the rounds."""

    setting: str
    method: str
    seed: int
    exact_match: float
    loss: float
    update_cosine: float
    client_drift: float
    retained_energy: float
    update_norm: float


@dataclass(frozen=True)
class Pair:
    """A run against FedMomentum with a new optimizer on the same seed.

    Attributes:
        run: The run.
        gain: Difference in exact match, in points.
        change: Difference of each measure.
    """

    run: Run
    gain: float
    change: dict[str, float]


def main() -> None:
    """Collect if asked to, print, draw."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=Path, help="the directory that moments.py wrote")
    options = parser.parse_args()
    if options.runs:
        write(collect(options.runs))
    print(tables())
    draw()


# ── the measures ──────────────────────────────────────────────────────────────────────────────────


def collect(directory: Path) -> list[Run]:
    """Read the finished comparisons of moments.py."""
    runs = []
    for setting in SETTINGS:
        folder = directory / setting
        if not (folder / "comparison.json").is_file():
            print(f"no finished comparison in {folder}; left out")
            continue
        runs += [_measure(setting, one) for one in read_comparison(folder).method_runs]
    return runs


def _measure(setting: str, method_run: MethodRun) -> Run:
    """Return the scores of a run, and the means of its measures."""
    (run,) = method_run.runs
    assert method_run.exact_match is not None and method_run.loss is not None
    return Run(
        setting,
        method_of(method_run.method),
        method_run.seed,
        method_run.exact_match,
        method_run.loss,
        **mean_measures(run.rounds, list(MEASURES)),
    )


def write(runs: list[Run]) -> None:
    """Write results/mechanism.csv."""
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, list(asdict(runs[0])), lineterminator="\n")
        table.writeheader()
        for run in runs:
            table.writerow(asdict(run))


def read() -> list[Run]:
    """Read results/mechanism.csv."""
    runs = []
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {key: float(row[key]) for key in ("exact_match", "loss", *MEASURES)}
            runs.append(Run(row["setting"], row["method"], int(row["seed"]), **numbers))
    return runs


# ── what goes with the gain ───────────────────────────────────────────────────────────────────────


def pairs(runs: list[Run]) -> list[Pair]:
    """Pair every run with the baseline's of its setting and seed."""
    baselines = {(run.setting, run.seed): run for run in runs if run.method == FRESH}
    paired = []
    for run in runs:
        if run.method == FRESH:
            continue
        baseline = baselines[run.setting, run.seed]
        change = {key: getattr(run, key) - getattr(baseline, key) for key in MEASURES}
        paired.append(Pair(run, 100 * (run.exact_match - baseline.exact_match), change))
    return paired


def group(paired: list[Pair]) -> dict[tuple[str, str], list[Pair]]:
    """Return the pairs by setting and method."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in paired:
        groups.setdefault((pair.run.setting, pair.run.method), []).append(pair)
    return groups


def between(paired: list[Pair], measure: str) -> float:
    """Correlate the mean gain with the mean change, one point a setting and method."""
    changes = []
    gains = []
    for members in group(paired).values():
        changes.append(statistics.mean(pair.change[measure] for pair in members))
        gains.append(statistics.mean(pair.gain for pair in members))
    return statistics.correlation(changes, gains)


def within(paired: list[Pair], measure: str) -> tuple[float, float, float]:
    """Correlate gain and change over the seeds of a method, with the 95 % interval.

    Every method's own mean is taken off first, so that differences between methods do not count.
    """
    changes = []
    gains = []
    groups = group(paired)
    for members in groups.values():
        middle = statistics.mean(pair.change[measure] for pair in members)
        mean_gain = statistics.mean(pair.gain for pair in members)
        for pair in members:
            changes.append(pair.change[measure] - middle)
            gains.append(pair.gain - mean_gain)
    correlation = statistics.correlation(changes, gains)
    # Fisher's transformation; a mean a group has been estimated.
    error = 1.96 / math.sqrt(len(gains) - len(groups) - 2)
    center = math.atanh(correlation)
    return correlation, math.tanh(center - error), math.tanh(center + error)


def usable(paired: list[Pair], measure: str) -> list[Pair]:
    """Leave out the methods of which the measure says nothing."""
    if measure != "retained_energy":
        return paired
    return [pair for pair in paired if pair.run.method not in ADAPTER_IS_NEW]


def tables() -> str:
    """Return the measures of every method, and the correlations, as Markdown."""
    runs = read()
    paired = pairs(runs)
    lines = [
        "| setting | method, optimizer | exact match, % | cosine | drift | energy | norm |",
        "|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        cells.setdefault((run.setting, run.method), []).append(run)
    for (setting, method), members in cells.items():
        means = {
            key: statistics.mean(getattr(run, key) for run in members)
            for key in ("exact_match", *MEASURES)
        }
        energy = "–" if method in ADAPTER_IS_NEW else f"{means['retained_energy']:.2f}"
        lines.append(
            f"| {SETTINGS[setting]} | {NAMES[method]} | {100 * means['exact_match']:.1f} | "
            f"{means['update_cosine']:.2f} | {means['client_drift']:.2f} | {energy} | "
            f"{means['update_norm']:.2f} |"
        )
    lines += [
        "",
        "| measure | between methods, r | within a method, over seeds, r [95 % interval] |",
        "|---|---|---|",
    ]
    for measure, name in MEASURES.items():
        points = usable(paired, measure)
        correlation, low, high = within(points, measure)
        lines.append(
            f"| {name} | {between(points, measure):+.2f} | {correlation:+.2f} "
            f"[{low:+.2f}, {high:+.2f}] |"
        )
    lines += ["", *fresh_lines()]
    return "\n".join(lines)


def fresh_lines() -> list[str]:
    """Correlate exact match with cosine and energy over the nine methods of experiment.py."""
    lines = [
        "| nine methods, new optimizer every round | exact match and cosine, r | and energy, r |",
        "|---|---|---|",
    ]
    for setting, title in SETTINGS.items():
        table = scores(setting)
        exact = {method: statistics.mean(by_seed.values()) for method, by_seed in table.items()}
        cells = []
        for file in ("update-cosine", "retained-energy"):
            by_method = curve(setting, file, file.replace("-", "_"))
            methods = [m for m in exact if m in by_method and usable_energy(m, file)]
            middles = [statistics.mean(by_method[method].values()) for method in methods]
            r = statistics.correlation(middles, [exact[method] for method in methods])
            cells.append(f"{r:+.2f} ({len(methods)})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def usable_energy(method: str, file: str) -> bool:
    """Whether a file's measure says anything about a method."""
    return file != "retained-energy" or method not in ADAPTER_IS_NEW


def draw() -> None:
    """Write the figure: the gain of every run against the change of each measure."""
    use_style()
    paired = pairs(read())
    colors = dict(zip(NAMES, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    markers = {"few": "o", "many": "^"}
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.6), sharey=True, layout="constrained")
    # Circles for few local steps, triangles for many.
    for axis, (measure, name) in zip(axes, MEASURES.items(), strict=True):
        for (setting, method), members in group(usable(paired, measure)).items():
            axis.scatter(
                [pair.change[measure] for pair in members],
                [pair.gain for pair in members],
                s=14,
                alpha=0.7,
                linewidths=0,
                marker=markers[setting],
                color=colors[method],
                label=f"{NAMES[method]}, {SETTINGS[setting].partition(',')[0]}",
            )
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(xlabel=f"change of the {name}")
    axes[0].set(ylabel="gain in exact match, points")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
