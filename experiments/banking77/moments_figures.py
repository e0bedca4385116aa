"""The optimizer's moments in docs/appendix/results.md: rounds and bytes to a target, and the figure.

python experiments/banking77/moments_figures.py     prints the table, draws results/moments.svg

Their scores are in the tables of methods_figures.py.
"""

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from figures import curve, save, target_table
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


def draw() -> None:
    """Write results/moments.svg: exact match, and the cosine with the round before, by round."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.2), layout="constrained")
    for row, name in zip(axes, TITLES, strict=True):
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
    print(target_table("moments-", NAMES))
    draw()
