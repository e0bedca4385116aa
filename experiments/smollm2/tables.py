"""The tables of the language model in docs/appendix/results.md.

python experiments/smollm2/tables.py     prints them as Markdown
"""

import csv
from pathlib import Path

from fedmomentum.results.statistics import MeanEstimate, estimate_mean

RESULTS = Path(__file__).resolve().parent / "results"
TITLES = {"few": "2 local steps, 16 rounds", "many": "10 local steps, 4 rounds"}
PUBLISHED = "fedmomentum:split=balanced"
SHARED = "fedmomentum:split=procrustes;training.optimizer-state=shared"
NAMES = {
    PUBLISHED: "FedMomentum as published",
    SHARED: "FedMomentum, procrustes, shared",
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
    """Return a column of comparison.csv by method and seed, and each method's learning rate."""
    table: Scores = {}
    rates = {}
    with (RESULTS / setting / "comparison.csv").open() as file:
        for row in csv.DictReader(file):
            label, _, rate = row["method"].partition("training.learning-rate=")
            method = label.rstrip(":;")
            table.setdefault(method, {})[int(row["seed"])] = float(row[column])
            rates[method] = float(rate)
    return table, rates


def difference(table: Scores, method: str, baseline: str) -> MeanEstimate:
    """Estimate the mean difference between two methods, paired by seed."""
    pairs = [table[method][seed] - table[baseline][seed] for seed in sorted(table[method])]
    estimate = estimate_mean(pairs)
    assert estimate is not None
    return estimate


def tables() -> str:
    """Return the results that are committed as Markdown, the lowest loss first."""
    lines: list[str] = []
    for setting, title in TITLES.items():
        if not (RESULTS / setting / "comparison.csv").is_file():
            continue
        losses, rates = scores(setting, "loss")
        exact_matches, _ = scores(setting, "exact_match")
        lines += [
            f"**{title}**",
            "",
            "| method, optimizer | learning rate | loss | to FedMomentum as published | to "
            "FedMomentum, shared | exact match, % |",
            "|---|---|---|---|---|---|",
        ]
        for method in sorted(losses, key=lambda name: sum(losses[name].values())):
            loss = estimate_mean(list(losses[method].values()))
            exact = estimate_mean(list(exact_matches[method].values()))
            assert loss is not None
            assert exact is not None
            cells = [
                NAMES[method],
                f"{rates[method]:g}",
                f"{loss.mean:.3f} ± {loss.spread or 0:.3f}",
            ]
            for baseline in (PUBLISHED, SHARED):
                cells.append("" if method == baseline else _interval(losses, method, baseline))
            cells.append(f"{100 * exact.mean:.1f} ± {100 * (exact.spread or 0):.1f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _interval(losses: Scores, method: str, baseline: str) -> str:
    estimate = difference(losses, method, baseline)
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


if __name__ == "__main__":
    print(tables())
