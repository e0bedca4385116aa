"""Tables and the figure of the optimizer's moments in docs/appendix/results.md.

python experiments/banking77/moments_figures.py     prints the tables, draws results/moments.svg
"""

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from figures import (
    RESULTS,
    chosen_rates,
    curve,
    difference,
    interval,
    mean_of,
    percent,
    save,
    scores,
    target_table,
)
from matplotlib.ticker import MaxNLocator

FRESH = "fedmomentum"
SHARED = "fedmomentum:split=procrustes;training.optimizer-state=shared"
NAMES = {
    SHARED: "FedMomentum, procrustes, shared",
    "fedexlora:training.optimizer-state=shared": "FedEx-LoRA, shared",
    FRESH: "FedMomentum, balanced, fresh",
    "fedexlora": "FedEx-LoRA, fresh",
    "flora": "FLoRA, fresh",
}
TITLES = {"moments-few": "2 local steps, 24 rounds", "moments-many": "12 local steps, 5 rounds"}


def published() -> list[str]:
    """Return the settings whose results are here."""
    return [name for name in TITLES if (RESULTS / name / "comparison.csv").is_file()]


def tables() -> str:
    """Return the result as Markdown."""
    lines: list[str] = []
    for name in published():
        table = scores(name)
        losses = scores(name, "loss")
        sent = scores(name, "bytes")
        cosines = curve(name, "update-cosine", "update_cosine")
        chosen = chosen_rates(name)
        lines += [
            f"**{TITLES[name]}**",
            "",
            "| method, optimizer | learning rate | exact match, % | loss | to FedMomentum fresh, "
            "points | to FedMomentum shared, points | cosine | sent, MB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in sorted(table, key=lambda m: -sum(table[m].values())):
            mean = mean_of(table[method].values())
            loss = mean_of(losses[method].values())
            cosine = mean_of(cosines[method].values())
            pairs = []
            for baseline in (FRESH, SHARED):
                is_baseline = method == baseline
                pairs.append("" if is_baseline else interval(difference(table, method, baseline)))
            megabytes = mean_of(sent[method].values()).mean / 1e6
            lines.append(
                f"| {NAMES[method]} | {chosen[method]:g} | {percent(mean)} | "
                f"{loss.mean:.3f} | {pairs[0]} | {pairs[1]} | "
                f"{cosine.mean:.2f} | {megabytes:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def draw() -> None:
    """Write results/moments.svg: exact match, and the cosine with the round before, by round."""
    names = published()
    if not names:
        raise SystemExit("no results are committed; make them with moments.py --publish")
    figure, axes = plt.subplots(
        len(names), 2, figsize=(10, 3.6 * len(names)), layout="constrained", squeeze=False
    )
    for row, name in zip(axes, names, strict=True):
        for method, points in curve(name, "exact-match", "exact_match").items():
            percent = [100 * value for value in points.values()]
            row[0].plot(list(points), percent, label=NAMES[method])
        for method, points in curve(name, "update-cosine", "update_cosine").items():
            row[1].plot(list(points), list(points.values()), label=NAMES[method])
        row[1].axhline(0, color="grey", linewidth=0.8)
        row[0].set(title=TITLES[name], xlabel="round", ylabel="exact match, %")
        row[1].set(title=TITLES[name], xlabel="round", ylabel="cosine with the update before")
        row[0].legend(frameon=False, fontsize=8)
        for axis in row:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, "moments")


if __name__ == "__main__":
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "fedmomentum", "svg.fonttype": "none"})
    print(tables())
    print(target_table("moments-", NAMES))
    draw()
