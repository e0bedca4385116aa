"""The table of cells.py in docs/appendix/results.md.

python experiments/banking77/cells_figures.py     prints it
"""

from figures import RESULTS, chosen_rates, difference, interval, mean_of, percent, scores

OURS = "fedmomentum:split=procrustes;training.optimizer-state=shared"
THEIRS = "fedexlora:training.optimizer-state=shared"
TITLES = {
    "rank-1": "rank 1 instead of 4",
    "rank-2": "rank 2 instead of 4",
    "skew": "Dirichlet 0.02 instead of 0.1",
    "partial": "30 clients, 10 % of them a round",
    "long": "50 local steps, 5 rounds",
}


def tables() -> str:
    """Return the cells that are committed as Markdown."""
    lines = [
        "| cell | FedMomentum, exact match, % | loss | FedEx-LoRA, exact match, % | loss | "
        "difference, points | learning rates |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, title in TITLES.items():
        if not (RESULTS / f"cell-{cell}" / "comparison.csv").is_file():
            continue
        table = scores(f"cell-{cell}")
        losses = scores(f"cell-{cell}", "loss")
        cells = [title]
        for method in (OURS, THEIRS):
            exact = mean_of(table[method].values())
            loss = mean_of(losses[method].values())
            cells.append(percent(exact))
            cells.append(f"{loss.mean:.3f}")
        cells.append(interval(difference(table, OURS, THEIRS)))
        rates = chosen_rates(f"cell-{cell}")
        cells.append(f"{rates[OURS]:g}, {rates[THEIRS]:g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
