"""The tables of the language model in docs/appendix/results.md.

python experiments/smollm2/tables.py     prints them as Markdown
"""

import csv
from pathlib import Path

from fedmomentum.results.statistics import MeanEstimate, estimate_mean

RESULTS = Path(__file__).resolve().parent / "results"
TITLES = {
    "methods": {"few": "2 local steps, 16 rounds", "many": "10 local steps, 4 rounds"},
    "variants": {
        "few-variants": "2 local steps, 16 rounds",
        "many-variants": "10 local steps, 4 rounds",
    },
    "commonsense": {
        "commonsense-few": "2 local steps, 12 rounds",
        "commonsense-many": "8 local steps, 3 rounds",
    },
    "maths": {
        "maths-few": "2 local steps, 12 rounds",
        "maths-many": "8 local steps, 3 rounds",
    },
}
"""By comparison: folders of results, and their titles."""
CHOICES = "choices.csv"
MORE_VARIANTS = {"many": "many-variants"}
"""Folder of methods to that of variants of FedMomentum with the same settings and dtype."""
PUBLISHED = "fedmomentum:split=balanced"
PROCRUSTES_SHARED = "fedmomentum:split=procrustes;training.optimizer-state=shared"
DEFAULT = "fedmomentum:split=balanced;training.optimizer-state=shared"
NAMES = {
    PUBLISHED: "FedMomentum as published",
    DEFAULT: "FedMomentum, balanced, shared",
    PROCRUSTES_SHARED: "FedMomentum, procrustes, shared",
    "fedmomentum:split=procrustes;training.optimizer-state=fresh": "FedMomentum, procrustes, fresh",
    "fedexlora": "FedEx-LoRA, fresh",
    "fedexlora:training.optimizer-state=shared": "FedEx-LoRA, shared",
    "flora": "FLoRA, fresh",
    "fedit": "FedIT, fresh",
    "fedit:training.optimizer-state=shared": "FedIT, shared",
    "ffalora": "FFA-LoRA, fresh",
}
Scores = dict[str, dict[int, float]]
"""Method to seed to score."""


def scores(setting: str, column: str) -> tuple[Scores, dict[str, float]]:
    """Return a column of comparison.csv by method and seed, and each method's learning rate.

    Variants of FedMomentum that were compared in the same setting are included.
    """
    table: Scores = {}
    rates = {}
    for folder in (setting, MORE_VARIANTS.get(setting, setting)):
        file = RESULTS / folder / "comparison.csv"
        if not file.is_file():
            continue
        with file.open() as opened:
            for row in csv.DictReader(opened):
                method, rate = _method_and_rate(row["method"])
                table.setdefault(method, {})[int(row["seed"])] = float(row[column])
                rates[method] = rate
    return table, rates


def _method_and_rate(label: str) -> tuple[str, float]:
    """Split a run's label into the method and its learning rate."""
    method, _, rate = label.partition("training.learning-rate=")
    return method.rstrip(":;"), float(rate)


def choice_accuracy(setting: str) -> Scores | None:
    """Return the fraction of questions answered correctly, where there is multiple choice."""
    file = RESULTS / setting / CHOICES
    if not file.is_file():
        return None
    correct: Scores = {}
    questions: Scores = {}
    with file.open() as opened:
        for row in csv.DictReader(opened):
            method, _ = _method_and_rate(row["method"])
            seed = int(row["seed"])
            for table, column in ((correct, "correct"), (questions, "questions")):
                counts = table.setdefault(method, {})
                counts[seed] = counts.get(seed, 0) + int(row[column])
    return {
        method: {seed: count / questions[method][seed] for seed, count in counts.items()}
        for method, counts in correct.items()
    }


def difference(table: Scores, method: str, baseline: str) -> MeanEstimate:
    """Estimate the mean difference between two methods, paired by seed."""
    pairs = [table[method][seed] - table[baseline][seed] for seed in sorted(table[method])]
    estimate = estimate_mean(pairs)
    assert estimate is not None
    return estimate


def tables(comparison: str) -> str:
    """Return the committed results of a comparison as Markdown, the lowest loss first."""
    lines: list[str] = []
    for setting, title in TITLES[comparison].items():
        if (RESULTS / setting / "comparison.csv").is_file():
            lines += [f"**{title}**", "", *_table(setting), ""]
    return "\n".join(lines)


def _table(setting: str) -> list[str]:
    losses, rates = scores(setting, "loss")
    exact_matches, _ = scores(setting, "exact_match")
    accuracies = choice_accuracy(setting)
    shared = DEFAULT if DEFAULT in losses else PROCRUSTES_SHARED
    header = [
        "method, optimizer",
        "learning rate",
        "loss",
        "to FedMomentum as published",
        f"to {NAMES[shared]}",
        "exact match, %",
    ]
    if accuracies is not None:
        header.append("choices, %")
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for method in sorted(losses, key=lambda name: sum(losses[name].values())):
        loss = _estimate(losses[method])
        cells = [
            NAMES[method],
            f"{rates[method]:g}",
            f"{loss.mean:.3f} ± {loss.spread or 0:.3f}",
        ]
        for baseline in (PUBLISHED, shared):
            cells.append("" if method == baseline else _interval(losses, method, baseline))
        cells.append(_percent(exact_matches[method]))
        if accuracies is not None:
            cells.append(_percent(accuracies[method]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _estimate(by_seed: dict[int, float]) -> MeanEstimate:
    estimate = estimate_mean(list(by_seed.values()))
    assert estimate is not None
    return estimate


def _percent(by_seed: dict[int, float]) -> str:
    estimate = _estimate(by_seed)
    return f"{100 * estimate.mean:.1f} ± {100 * (estimate.spread or 0):.1f}"


def _interval(losses: Scores, method: str, baseline: str) -> str:
    estimate = difference(losses, method, baseline)
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


if __name__ == "__main__":
    print("\n".join(tables(comparison) for comparison in TITLES))
