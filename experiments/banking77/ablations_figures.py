"""The tables of ablations.py in docs/appendix/results.md.

python experiments/banking77/ablations_figures.py     prints them

The lines of moments.py have FedMomentum with nothing changed. A variant is listed when all of its
seeds are there.
"""

import ablations
import moments
from figures import TITLES, column_of, difference, interval, mean_of, percent, scores
from trials import committed_scores


def tables() -> str:
    """Return the results that are committed as Markdown."""
    lines: list[str] = []
    for setting, title in TITLES.items():
        by_method = committed_scores(f"ablations-{setting}", moments.SEEDS)
        if not by_method:
            continue
        baseline = ablations.BASELINE
        values = {}
        for name in ("exact_match", "loss", "bytes"):
            values[name] = {baseline: scores(f"moments-{setting}", name)[baseline]}
            values[name].update(column_of(by_method, name))
        exact = values["exact_match"]
        lines += [
            f"**{title}**",
            "",
            "| FedMomentum with | exact match, % | loss | to the first row, points | sent, MB |",
            "|---|---|---|---|---|",
        ]
        for method, name in {baseline: "nothing changed", **ablations.ABLATIONS}.items():
            if method in exact:
                is_baseline = method == baseline
                row = [
                    name,
                    percent(mean_of(exact[method].values())),
                    f"{mean_of(values['loss'][method].values()).mean:.3f}",
                    "" if is_baseline else interval(difference(exact, method, baseline)),
                    f"{mean_of(values['bytes'][method].values()).mean / 1e6:.0f}",
                ]
                lines.append(f"| {' | '.join(row)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
