"""The tables of cells.py in docs/appendix/results.md.

python experiments/banking77/cells_figures.py     prints them

A method is listed in a cell when all of its seeds are there. Differences are to the first variant of
FedMomentum that is.
"""

from collections.abc import Iterable, Sequence

import cells
from figures import column_of, difference, interval, mean_of, percent
from trials import committed_scores

NAMES = dict(
    zip(
        cells.METHODS,
        ("FedMomentum, balanced", "FedMomentum, procrustes", "FedEx-LoRA", "FedIT"),
        strict=True,
    )
)
TITLES = {
    "rank-1": "rank 1 instead of 4",
    "rank-2": "rank 2 instead of 4",
    "rank-16": "rank 16 instead of 4",
    "rank-32": "rank 32 instead of 4",
    "skew": "Dirichlet 0.02 instead of 0.1",
    "even": "Dirichlet 5 instead of 0.1",
    "clients": "30 clients",
    "partial": "30 clients, 10 % of them a round",
    "hundred": "100 clients, 10 % of them a round",
    "long": "50 local steps, 5 rounds",
}


def tables() -> str:
    """Return the cells that are committed as Markdown."""
    return _table((cell, cells.SEEDS) for cell in TITLES)


def replication() -> str:
    """Return the cells that were repeated on more seeds, as `tables` does."""
    return _table(cells.REPLICATED.items())


def _table(seeds_by_cell: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Return the scores of cells on the given seeds as Markdown."""
    lines = [
        "| cell | method | learning rate | exact match, % | loss | to FedMomentum, points |",
        "|---|---|---|---|---|---|",
    ]
    for cell, seeds in seeds_by_cell:
        by_method = committed_scores(f"cell-{cell}", seeds)
        exact = column_of(by_method, "exact_match")
        losses = column_of(by_method, "loss")
        rates = column_of(by_method, "rate")
        listed = [method for method in NAMES if method in exact]
        for method in listed:
            is_baseline = method == listed[0]
            row = [
                TITLES[cell],
                NAMES[method],
                f"{mean_of(rates[method].values()).mean:g}",
                percent(mean_of(exact[method].values())),
                f"{mean_of(losses[method].values()).mean:.3f}",
                "" if is_baseline else interval(difference(exact, method, listed[0])),
            ]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
    print()
    print(replication())
