"""The tables of all fourteen methods in docs/appendix/results.md.

python experiments/banking77/methods_figures.py     prints them

They join the committed lines of methods.py and the five variants of moments.py, which have the same
seeds and the same rule for learning rates. A variant is listed when all of its seeds are there.
"""

import moments
from figures import (
    RESULTS,
    TITLES,
    chosen_rates,
    curve,
    difference,
    interval,
    mean_of,
    percent,
    scores,
)
from moments_figures import SHARED
from run_table import Row, read_rows

NAMES = {
    "fedmomentum": "FedMomentum, balanced",
    "fedmomentum:split=procrustes": "FedMomentum, procrustes",
    "fedit": "FedIT",
    "flora": "FLoRA",
    "ffalora": "FFA-LoRA",
    "frlora": "FRLoRA",
    "flexlora": "FlexLoRA",
    "fedexlora": "FedEx-LoRA",
    "hetlora": "HetLoRA",
    "rolora": "RoLoRA",
    "fedsvd": "FedSVD",
    "fedsalora": "FedSA-LoRA",
    "lorafair": "LoRA-FAIR",
    "fedrotlora": "FedRot-LoRA",
    "florist": "FLoRIST",
}
MEASURES = ("exact_match", "loss", "bytes", "update_cosine", "rate")
SEEDS = set(moments.SEEDS)
Values = dict[str, dict[int, float]]
"""Method to seed to value."""


def tables() -> str:
    """Return the results that are committed as Markdown."""
    lines: list[str] = []
    for setting, title in TITLES.items():
        values = measures(setting)
        exact = values["exact_match"]
        lines += [
            f"**{title}**",
            "",
            "| method, optimizer | learning rate | exact match, % | loss | to FedMomentum shared, "
            "points | cosine | sent, MB |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in sorted(exact, key=lambda name: -mean_of(exact[name].values()).mean):
            mean = mean_of(exact[method].values())
            baseline = "" if method == SHARED else interval(difference(exact, method, SHARED))
            cosines = values["update_cosine"].get(method)
            lines.append(
                f"| {name_of(method)} | {mean_of(values['rate'][method].values()).mean:g} | "
                f"{percent(mean)} | "
                f"{mean_of(values['loss'][method].values()).mean:.3f} | {baseline} | "
                f"{'–' if cosines is None else f'{mean_of(cosines.values()).mean:.2f}'} | "
                f"{mean_of(values['bytes'][method].values()).mean / 1e6:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def name_of(method: str) -> str:
    """Return a variant's name as the tables have it."""
    name, _, settings = method.partition("training.optimizer-state=")
    return f"{NAMES[name.rstrip(':;')]}, {settings or 'fresh'}"


def measures(setting: str) -> dict[str, Values]:
    """Return each measure by method and seed, of the variants with all seeds."""
    earlier = f"moments-{setting}"
    rates = chosen_rates(earlier)
    cosines = curve(earlier, "update-cosine", "update_cosine")
    values: dict[str, Values] = {name: {} for name in MEASURES}
    for name in ("exact_match", "loss", "bytes"):
        values[name] = scores(earlier, name)
    for method in values["exact_match"]:
        values["rate"][method] = {0: rates[method]}
        # By round, the mean over the seeds.
        values["update_cosine"][method] = cosines[method]
    table = RESULTS / f"methods-{setting}.csv"
    if table.is_file():
        for method, rows in complete(read_rows(table)).items():
            for name in MEASURES:
                numbers = {seed: float(row[name]) for seed, row in rows.items() if row[name]}
                if numbers:
                    values[name][method] = numbers
    return values


def complete(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Return the scores of the methods that have all seeds, by method and seed."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["kind"] == "score":
            found.setdefault(row["method"], {})[int(row["seed"])] = row
    return {method: by_seed for method, by_seed in found.items() if by_seed.keys() >= SEEDS}


if __name__ == "__main__":
    print(tables())
