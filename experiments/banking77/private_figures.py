"""The tables and the figure of accuracy against epsilon in docs/privacy.md.

python experiments/banking77/private_figures.py     prints the tables, draws the figure
"""

import math
from collections.abc import Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from figures import RESULTS, difference, interval, mean_of, percent, use_style
from methods_figures import NAMES
from run_table import Row, read_rows

TABLE = RESULTS / "private.csv"
FIGURE = RESULTS.parents[2] / "docs" / "appendix" / "results" / "private.svg"
BASELINE = "fedmomentum"
Accuracies = dict[float, dict[str, dict[int, float]]]
"""Epsilon to method to seed to accuracy."""


def accuracies(rows: Sequence[Row]) -> Accuracies:
    """Return the scores of a table, the smallest epsilon first."""
    found: Accuracies = {}
    scores = [row for row in rows if row["kind"] == "score"]
    for row in sorted(scores, key=lambda row: float(row["epsilon"])):
        by_method = found.setdefault(float(row["epsilon"]), {})
        by_method.setdefault(row["method"], {})[int(row["seed"])] = float(row["accuracy"])
    return found


def tables(rows: Sequence[Row]) -> str:
    """Return accuracies, and their differences from FedMomentum's, as Markdown."""
    by_epsilon = accuracies(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return f"{_table(by_epsilon, methods)}\n\n{_differences(by_epsilon, methods)}"


def _table(by_epsilon: Accuracies, methods: Sequence[str]) -> str:
    """Return the mean accuracies and their standard deviations over the seeds, in %."""
    lines = _head("accuracy, %", by_epsilon)
    for method in methods:
        cells = [_name(method)]
        for by_method in by_epsilon.values():
            mean = mean_of(by_method[method].values())
            cells.append(percent(mean))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(by_epsilon: Accuracies, methods: Sequence[str]) -> str:
    """Return the mean differences from FedMomentum, paired by seed, in points."""
    lines = _head("to FedMomentum, points", by_epsilon)
    for method in methods:
        if method == BASELINE:
            continue
        cells = [_name(method)]
        for by_method in by_epsilon.values():
            cells.append(interval(difference(by_method, method, BASELINE)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _head(title: str, by_epsilon: Accuracies) -> list[str]:
    epsilons = ["no privacy" if math.isinf(one) else f"ε = {one:g}" for one in by_epsilon]
    return [f"| {title} | {' | '.join(epsilons)} |", "|---" * (len(epsilons) + 1) + "|"]


def _name(method: str) -> str:
    """Return a method's name; all are as they are configured by default."""
    return NAMES[method].partition(",")[0]


def draw(rows: Sequence[Row]) -> None:
    """Draw accuracy against epsilon: the mean and every seed."""
    use_style()
    by_epsilon = accuracies(rows)
    # Without privacy is drawn beside the largest epsilon.
    finite = [epsilon for epsilon in by_epsilon if math.isfinite(epsilon)]
    places = {epsilon: epsilon for epsilon in finite} | {math.inf: 4 * finite[-1]}
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        means = []
        for by_method in by_epsilon.values():
            means.append(100 * mean_of(by_method[method].values()).mean)
        x = [places[epsilon] for epsilon in by_epsilon]
        (line,) = axis.plot(x, means, "o-", markersize=4, label=_name(method))
        for epsilon, by_method in by_epsilon.items():
            seeds = [100 * value for value in by_method[method].values()]
            axis.plot([places[epsilon]] * len(seeds), seeds, "_", color=line.get_color(), alpha=0.5)
    axis.set_xscale("log", base=2)
    axis.set_xticks([places[epsilon] for epsilon in by_epsilon])
    axis.set_xticklabels(["no privacy" if math.isinf(e) else f"{e:g}" for e in by_epsilon])
    axis.minorticks_off()
    axis.set(xlabel="epsilon", ylabel="accuracy, %")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    committed = read_rows(TABLE)
    print(tables(committed))
    draw(committed)
