"""The tables and the figure of all fourteen methods in docs/appendix/results.md.

python experiments/banking77/methods_figures.py     prints the tables, draws the figure

They join the committed lines of methods.py, the five variants of moments.py, and of ablations.py
FedMomentum as it is by default. All have the same seeds and the same rule for learning rates. A
variant is listed when all of its seeds are there.
"""

from collections.abc import Sequence

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import moments
from figures import (
    TITLES,
    chosen_rates,
    column_of,
    curve,
    difference,
    interval,
    mean_of,
    percent,
    save,
    scores,
    use_style,
)
from matplotlib.axes import Axes
from trials import committed_scores

from fedmomentum.results.statistics import MeanEstimate

DEFAULT = f"fedmomentum:split=balanced;{moments.SHARED}"
NAMES = {
    "fedmomentum": "FedMomentum, balanced",
    "fedmomentum:split=balanced": "FedMomentum, balanced",
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
    "fedsalora": "FedSA-LoRA (personal)",
    "lorafair": "LoRA-FAIR",
    "fedrotlora": "FedRot-LoRA",
    "florist": "FLoRIST",
}
PERSONAL = ("fedsalora",)
"""Methods whose clients are each scored with a model of their own; not drawn beside the others."""
MEASURES = ("exact_match", "loss", "bytes", "update_cosine", "rate")
STYLES = {True: ("tab:blue", "o"), False: ("tab:orange", "^")}
"""Color and marker of shared moments, and of a new optimizer."""
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
            "| method, optimizer | learning rate | exact match, % | loss | to the default of "
            "FedMomentum, points | cosine | sent, MB |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in sorted(exact, key=lambda name: -mean_of(exact[name].values()).mean):
            mean = mean_of(exact[method].values())
            baseline = "" if method == DEFAULT else interval(difference(exact, method, DEFAULT))
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


def draw() -> None:
    """Write results/methods.svg: each method's difference to the default of FedMomentum."""
    use_style()
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 6), sharex=True, sharey=True, layout="constrained"
    )
    exact = {setting: measures(setting)["exact_match"] for setting in TITLES}
    places = place_of_each([*exact.values()])
    for axis, (setting, title) in zip(axes, TITLES.items(), strict=True):
        for method in exact[setting]:
            if method != DEFAULT and method not in PERSONAL:
                plot_difference(axis, exact[setting], method, places[title_of(method)])
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=title, xlabel="exact match against FedMomentum by default, points")
    axes[0].set_yticks(list(places.values()), list(places))
    for is_shared in (True, False):
        label = "shared moments" if is_shared else "a new optimizer every round"
        axes[0].plot([], [], STYLES[is_shared][1], color=STYLES[is_shared][0], label=label)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    save(figure, "methods")


def place_of_each(settings: Sequence[dict[str, dict[int, float]]]) -> dict[str, int]:
    """Return the height of each method in the figure: the best one of any setting is at the top."""
    best: dict[str, float] = {}
    for exact in settings:
        for method, by_seed in exact.items():
            if method in PERSONAL:
                continue
            title = title_of(method)
            best[title] = max(best.get(title, 0.0), mean_of(by_seed.values()).mean)
    return {title: place for place, title in enumerate(sorted(best, key=lambda name: best[name]))}


def plot_difference(
    axis: Axes, exact: dict[str, dict[int, float]], method: str, place: int
) -> None:
    """Draw a method's mean difference to the default of FedMomentum, and its interval."""
    mean = difference(exact, method, DEFAULT)
    assert mean.low is not None and mean.high is not None
    color, marker = STYLES[moments.SHARED in method]
    height = place + (0.15 if moments.SHARED in method else -0.15)
    axis.plot([100 * mean.low, 100 * mean.high], [height, height], color=color, linewidth=2)
    axis.plot(100 * mean.mean, height, marker, color=color)


def title_of(method: str) -> str:
    """Return a method's name, without its optimizer and the published split."""
    name = NAMES[method.partition(":")[0]].partition(",")[0]
    return f"{name}, procrustes" if "procrustes" in method else name


def gain_table() -> str:
    """Return what each method gains by shared moments, as Markdown."""
    exact = {setting: measures(setting)["exact_match"] for setting in TITLES}
    lines = [
        "| gain by shared moments, points | 2 local steps | 12 local steps |",
        "|---|---|---|",
    ]
    for method in NAMES:
        # Other than fresh, the default of FedMomentum says which split it has.
        shared = DEFAULT if method == "fedmomentum" else f"{method}:{moments.SHARED}"
        if all({method, shared} <= values.keys() for values in exact.values()):
            gains = [interval(difference(values, shared, method)) for values in exact.values()]
            lines.append(f"| {title_of(method)} | {' | '.join(gains)} |")
    return "\n".join(lines)


def level_methods(setting: str) -> list[str]:
    """Return the methods that shared moments make level with FedMomentum.

    These are the methods whose difference to FedMomentum, both with shared moments, has an
    interval that contains zero.

    Args:
        setting: `few` or `many`.
    """
    exact = measures(setting)["exact_match"]
    level = []
    for method in NAMES:
        shared = f"{method}:{moments.SHARED}"
        if shared in exact and not is_apart(difference(exact, shared, DEFAULT)):
            level.append(method)
    return level


def not_behind_as_published() -> list[str]:
    """Return the methods as published that FedMomentum by default is not ahead of.

    Methods that train a model for each client are left out.
    """
    not_behind = []
    for setting in TITLES:
        exact = measures(setting)["exact_match"]
        for method in exact:
            if moments.SHARED in method or method in PERSONAL:
                continue
            mean = difference(exact, method, DEFAULT)
            if not (is_apart(mean) and mean.mean < 0):
                not_behind.append(method)
    return not_behind


def is_apart(mean: MeanEstimate) -> bool:
    """Return whether the interval of a mean difference does not contain zero."""
    assert mean.low is not None and mean.high is not None
    return not mean.low <= 0 <= mean.high


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
    by_method = committed_scores(f"methods-{setting}", moments.SEEDS)
    by_method[DEFAULT] = committed_scores(f"ablations-{setting}", moments.SEEDS)[DEFAULT]
    for name in MEASURES:
        values[name].update(column_of(by_method, name))
    return values


if __name__ == "__main__":
    print(tables())
    print(gain_table())
    draw()
