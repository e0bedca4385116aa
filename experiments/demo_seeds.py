"""The default job over several seeds: FedMomentum, FedIT, and each client alone with as many steps.

    python experiments/demo_seeds.py [--seeds 0,1,2] [--config configs/default.toml] [--out runs/demo-seeds]
                                     [section.key=value ...]

Every model is scored on the held-out examples of all clients. What is done already is not done again, so it can be
stopped and started. Ends with 1 where FedMomentum does not beat the mean client alone.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedmomentum.config import load_config
from fedmomentum.evaluation import Score, evaluate
from fedmomentum.files import write_json
from fedmomentum.live import quiet_libraries
from fedmomentum.run import Run, prepare

CONSOLE = Console()


def scored(run: Run) -> dict[str, float]:
    """The run's last model on everybody's held-out examples."""
    run.local.become(run.model)
    total = Score(0.0, 0, 0, 0)
    for client in everyone(run):
        total = total + evaluate(run.local.peft, client.test, pad_token_id=run.local.tokenizer.pad_token_id).total
    return {"exact_match": total.exact_match, "loss": total.loss, "num_examples": total.num_examples}


def everyone(run: Run) -> list:
    return getattr(run, "all_clients", run.clients)


def cell(out: Path, config_file: Path, overrides: list[str], only: str | None = None) -> dict[str, float]:
    """One run, or its saved score. `only`: one client trains, alone."""
    if (out / "score.json").is_file():
        return json.loads((out / "score.json").read_text())
    config = load_config(config_file, [*overrides, "evaluation.every=0"])
    run = prepare(config, out, resume=(out / "config.toml").is_file())
    try:
        run.all_clients = run.clients  # type: ignore[attr-defined]
        if only:
            run.clients = [client for client in run.clients if client.client_id == only]
        run.model = run.start(lambda event, facts: None)
        score = scored(run)
    finally:
        run.close()
    write_json(out / "score.json", score)
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--config", type=Path, default=Path("configs/default.toml"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    rows = []
    for seed in map(int, chosen.seeds.split(",")):
        with quiet_libraries(), CONSOLE.status(f"seed {seed}"):
            base, folder = [*chosen.overrides, f"run.seed={seed}"], chosen.out / f"seed-{seed}"
            momentum = cell(folder / "fedmomentum", chosen.config, base)
            fedit = cell(folder / "fedit", chosen.config, [*base, "method.name=fedit"])
            clients = sorted(json.loads((folder / "fedmomentum" / "partition.json").read_text()))
            alone = [cell(folder / f"alone-{client}", chosen.config, base, only=client) for client in clients]
        rows.append((seed, momentum["exact_match"], fedit["exact_match"], [a["exact_match"] for a in alone]))
        CONSOLE.print(f"seed {seed} done")
    table = Table(
        "seed",
        "FedMomentum",
        "FedIT",
        "clients alone, mean",
        "alone, each",
        title="Exact match on all held-out examples",
    )
    for seed, momentum, fedit, alone in rows:
        each = "  ".join(f"{a:.1%}" for a in alone)
        table.add_row(str(seed), f"{momentum:.1%}", f"{fedit:.1%}", f"{statistics.mean(alone):.1%}", each)
    means = [
        statistics.mean(column) for column in zip(*((m, f, statistics.mean(a)) for _, m, f, a in rows), strict=True)
    ]
    table.add_section()
    table.add_row("mean", *(f"{m:.1%}" for m in means), "")
    CONSOLE.print(table)
    write_json(chosen.out / "summary.json", {"rows": rows, "mean": means})
    sys.exit(0 if means[0] > means[2] else 1)


if __name__ == "__main__":
    main()
