"""Draw what `aggregation_speed.py --sweeps --json FILE` measured.

    python benchmarks/plots.py FILE [--out docs/appendix/performance]

Writes `aggregation-cost.svg`: milliseconds for one module against the number of clients, the rank
and the width.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIDES = {  # key: (label, color, marker)
    "published": ("published randomized SVD", "#b5651d", "s"),
    "common start": ("ours, clients with a common start", "#1f5fa8", "o"),
    "apart": ("ours, clients apart", "#6aa84f", "^"),
}
USUAL = {"clients": "10 clients", "rank": "rank 16", "width": "4096 x 4096"}


def draw(measured: Mapping[str, Any], target: Path) -> None:
    """Draw the sweeps side by side."""
    sweeps = measured["sweeps"]
    figure, axes = plt.subplots(
        1, len(sweeps), figsize=(11, 3.6), sharey=True, layout="constrained"
    )
    for axis, (name, points) in zip(axes, sweeps.items(), strict=True):
        x = [point[name] for point in points]
        for key, (label, color, marker) in SIDES.items():
            y = [point[key] * 1e3 for point in points]
            axis.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(x, [str(value) for value in x])
        axis.minorticks_off()
        axis.set_xlabel(
            {"clients": "clients", "rank": "rank of a client", "width": "width of a square module"}[
                name
            ]
        )
        axis.set_title(", ".join(text for key, text in USUAL.items() if key != name), fontsize=9)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("milliseconds for one module")
    axes[0].legend(frameon=False, fontsize=8)
    target.mkdir(parents=True, exist_ok=True)
    figure.savefig(target / "aggregation-cost.svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Draw the file that is named."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--out", default="docs/appendix/performance")
    chosen = parser.parse_args()
    plt.rcParams["svg.hashsalt"] = "fedmomentum"  # the same bytes for the same numbers
    draw(json.loads(Path(chosen.file).read_text()), Path(chosen.out))


if __name__ == "__main__":
    main()
