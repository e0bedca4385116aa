"""Tables and plots of docs/appendix/results.md, from the committed numbers in results/.

python experiments/banking77/figures.py            prints the tables, draws results/*.svg
"""

import csv
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from run_table import Row  # in the directory above
from tuned_comparison import method_of

from fedmomentum.results.statistics import MeanEstimate, estimate_mean

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {
    "fedmomentum": "FedMomentum, balanced",
    "fedmomentum:split=singular": "FedMomentum, singular",
    "fedmomentum:split=aligned": "FedMomentum, aligned",
    "fedit": "FedIT",
    "flora": "FLoRA",
    "ffalora": "FFA-LoRA",
    "frlora": "FRLoRA",
    "flexlora": "FlexLoRA",
    "fedexlora": "FedEx-LoRA",
}
BASELINES = ("fedit", "fedmomentum")
TITLES = {"few": "2 local steps, 24 rounds", "many": "12 local steps, 5 rounds"}


def scores(name: str, column: str = "exact_match") -> dict[str, dict[int, float]]:
    """Return a column of comparison.csv, by method and seed."""
    table: dict[str, dict[int, float]] = {}
    for row in csv.DictReader((RESULTS / name / "comparison.csv").open()):
        table.setdefault(method_of(row["method"]), {})[int(row["seed"])] = float(row[column])
    return table


def column_of(by_method: Mapping[str, Mapping[int, Row]], name: str) -> dict[str, dict[int, float]]:
    """Return a column of the lines of runs, by method and seed; methods without it are left out."""
    table: dict[str, dict[int, float]] = {}
    for method, rows in by_method.items():
        values = {seed: float(row[name]) for seed, row in rows.items() if row[name]}
        if values:
            table[method] = values
    return table


def rates(name: str) -> dict[str, dict[float, float]]:
    """Return the tuning seeds' mean exact match, by method and learning rate."""
    table: dict[str, dict[float, float]] = {}
    for row in csv.DictReader((RESULTS / name / "learning-rates.csv").open()):
        table.setdefault(row["method"], {})[float(row["learning_rate"])] = float(
            row["mean_exact_match_of_tuning_seeds"]
        )
    return table


def chosen_rates(name: str) -> dict[str, float]:
    """Return each method's best learning rate; of equally good ones the lowest."""
    return {
        method: max(by_rate, key=lambda rate: (by_rate[rate], -rate))
        for method, by_rate in rates(name).items()
    }


def curve(name: str, file: str, column: str) -> dict[str, dict[int, float]]:
    """Return the mean over seeds of a column of the page's data, by method and round."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in csv.DictReader((RESULTS / name / "comparison-data" / f"{file}.csv").open()):
        values.setdefault(method_of(row["method"]), {}).setdefault(int(row["round"]), []).append(
            float(row[column])
        )
    return {
        m: {r: sum(v) / len(v) for r, v in sorted(rounds.items())} for m, rounds in values.items()
    }


def difference(table: dict[str, dict[int, float]], method: str, baseline: str) -> MeanEstimate:
    """Estimate the mean difference between two methods, paired by seed."""
    return mean_of(table[method][seed] - table[baseline][seed] for seed in sorted(table[method]))


def mean_of(values: Iterable[float]) -> MeanEstimate:
    """Estimate the mean of values of which there is at least one."""
    mean = estimate_mean(list(values))
    assert mean is not None
    return mean


def tables() -> str:
    """Return the result as Markdown."""
    lines = []
    for name, title in TITLES.items():
        table = scores(name)
        losses = scores(name, "loss")
        sent = scores(name, "bytes")
        chosen = chosen_rates(name)
        lines += [
            f"**{title}**",
            "",
            "| method | learning rate | exact match, % | loss | to FedIT, points | to "
            "FedMomentum, points | sent, MB |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in sorted(table, key=lambda m: -sum(table[m].values())):
            mean = mean_of(table[method].values())
            loss = mean_of(losses[method].values())
            pairs = [
                "" if method == base else interval(difference(table, method, base))
                for base in BASELINES
            ]
            megabytes = sum(sent[method].values()) / len(sent[method]) / 1e6
            lines.append(
                f"| {NAMES[method]} | {chosen[method]:g} | {percent(mean)} | "
                f"{loss.mean:.3f} | {pairs[0]} | {pairs[1]} | {megabytes:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def target_table(prefix: str, names: Mapping[str, str]) -> str:
    """Return rounds and megabytes to the target of the experiments, mean of the seeds that reach it.

    Args:
        prefix: What the directories of the comparisons begin with.
        names: Method to its name in the table.
    """
    lines = [
        "| to 70 % | few steps: seeds | rounds | MB | many steps: seeds | rounds | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, title in names.items():
        cells = [title]
        for setting in TITLES:
            rounds = reached(f"{prefix}{setting}", "rounds_to_target")[method]
            sent = reached(f"{prefix}{setting}", "bytes_to_target")[method]
            cells += [
                f"{len(rounds)}",
                f"{mean_of(rounds).mean:.1f}",
                f"{mean_of(sent).mean / 1e6:.0f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reached(name: str, column: str) -> dict[str, list[float]]:
    """Return a column of comparison.csv by method, of the seeds that reach the target."""
    table: dict[str, list[float]] = {}
    for row in csv.DictReader((RESULTS / name / "comparison.csv").open()):
        if row[column]:
            table.setdefault(method_of(row["method"]), []).append(float(row[column]))
    return table


def percent(mean: MeanEstimate) -> str:
    """Format a mean and its standard deviation, in %."""
    return f"{100 * mean.mean:.1f} ± {100 * (mean.spread or 0):.1f}"


def interval(mean: MeanEstimate) -> str:
    """Format a mean and its interval, in points."""
    assert mean.low is not None and mean.high is not None
    return f"{100 * mean.mean:+.1f} [{100 * mean.low:+.1f}, {100 * mean.high:+.1f}]"


def use_style() -> None:
    """Set the style that the figures share: small text that stays text, and the same bytes."""
    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "fedmomentum",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "figure.facecolor": "white",
        }
    )


def draw() -> None:
    """Write results/differences.svg, curves.svg, learning-rates.svg and directions.svg."""
    use_style()
    colors = dict(zip(NAMES, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
        table = scores(name)
        for place, method in enumerate(reversed([m for m in NAMES if m != "fedit"])):
            mean = difference(table, method, "fedit")
            assert mean.low is not None and mean.high is not None
            axis.plot(
                [100 * mean.low, 100 * mean.high],
                [place, place],
                color=colors[method],
                linewidth=2,
            )
            axis.plot(100 * mean.mean, place, "o", color=colors[method])
            seeds = [100 * (table[method][s] - table["fedit"][s]) for s in table[method]]
            axis.plot(seeds, [place - 0.25] * len(seeds), "|", color=colors[method], alpha=0.6)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(
            range(len(NAMES) - 1), [NAMES[m] for m in reversed([m for m in NAMES if m != "fedit"])]
        )
        axis.set(title=title, xlabel="exact match against FedIT, points")
    save(figure, "differences")

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
        for method, points in curve(name, "exact-match", "exact_match").items():
            axis.plot(
                list(points),
                [100 * v for v in points.values()],
                color=colors[method],
                label=NAMES[method],
            )
        axis.set(title=title, xlabel="round", ylabel="exact match, %")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, "curves")

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
        for method, by_rate in rates(name).items():
            axis.semilogx(
                list(by_rate),
                [100 * v for v in by_rate.values()],
                "o-",
                color=colors[method],
                label=NAMES[method],
            )
        axis.set(title=title, xlabel="learning rate", ylabel="exact match of the tuning seeds, %")
    axes[1].legend(frameon=False, fontsize=8)
    save(figure, "learning-rates")

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
        for method, points in curve(name, "update-cosine", "update_cosine").items():
            axis.plot(
                list(points), list(points.values()), color=colors[method], label=NAMES[method]
            )
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="round", ylabel="cosine with the update before")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, "directions")


def save(figure: Figure, name: str) -> None:
    """Write a figure to results/, and close it."""
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    print(tables())
    print(target_table("", NAMES))
    print(json.dumps({name: chosen_rates(name) for name in TITLES}))
    draw()
