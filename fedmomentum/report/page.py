"""One page a run: `report.html`, complete in itself."""

import json
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedmomentum.report import plots, text
from fedmomentum.report.html import render, write_page
from fedmomentum.report.participation import absences
from fedmomentum.report.run import Run, read_run
from fedmomentum.report.summary import federated_row, natural_order, summarise, untouched_row

_REASON = 600  # characters of a failure's reason


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path. The same folder gives the same bytes.

    Raises:
        ModelError: the folder, or one of the files that every run has, is missing.
        DataError: a file of the folder is damaged.
    """
    run_dir = Path(run_dir)
    content = _content(read_run(run_dir), _example_client(run_dir))
    page = render("page.html.j2", content, lambda plot: "data:text/csv;charset=utf-8," + quote(plot.csv))
    return write_page(run_dir / "report.html", page)


def _example_client(run_dir: Path) -> str | None:
    """Return a client to name in commands, where the last checkpoint says that each has a model of its own."""
    checkpoints = sorted(file for file in (run_dir / "rounds").glob("*.json") if file.stem.isdecimal())
    try:
        manifest = json.loads(checkpoints[-1].read_text(encoding="utf-8"))
        return min(manifest["run"]["held"], default="NAME") if manifest["personal"] else None
    except (IndexError, OSError, ValueError, KeyError, TypeError):
        return None  # without a checkpoint there is nothing to carry away


def _content(run: Run, client: str | None) -> dict[str, Any]:
    rows, summary = run.rows, summarise(run.rows)
    before, after = untouched_row(rows), federated_row(rows)
    done = rows[-1]["round"]
    best = [row["round"] for row in rows if row.get("is_best") and row["round"] > 0]
    planned = run.plan.get("num_rounds", done)
    categories = [line for line in summary if line.group == "category"]
    named = [line for line in categories if line.name]
    return {
        "run": run,
        "method": str(run.plan.get("method", "the method")).partition("(")[0],
        "num_clients": run.plan.get("num_clients", len(run.partition)),
        "done": done,
        "planned": planned,
        "total": summary[0],
        "groups": [("category", named), ("client", [line for line in summary if line.group == "client"])],
        "before": before,
        "after": after,
        "best": best[-1] if best else None,
        "uplink": sum(sum((row.get("uplink_bytes") or {}).values()) for row in rows),
        "downlink": sum(sum((row.get("downlink_bytes") or {}).values()) for row in rows),
        "elapsed": sum(sum(value or 0.0 for value in (row.get("seconds") or {}).values()) for row in rows),
        "interval_plots": _present(
            plots.intervals(summary, "category", "By category") if named else None,
            plots.intervals(summary, "client", "By client"),
        ),
        "score_plots": _present(plots.exact_match(rows), plots.evaluation_loss(rows), plots.train_loss(rows)),
        "method_plots": plots.aggregation(rows),
        "movement_plots": plots.movement(rows),
        "cost_plots": [*plots.traffic(rows), *_present(plots.seconds(rows))],
        "partition_plots": _present(plots.partition(run.partition, "train"), plots.partition(run.partition, "test")),
        "rounds": [_round(row) for row in rows if row["round"] > 0],
        "absences": absences(rows, run.partition),
        "num_failures": sum(len(row.get("failures") or {}) for row in rows),
        "plan": _plan(run),
        "environment": _environment(run.environment),
        "version": rows[-1].get("version"),
        "commands": _commands(run.name, finished=done >= planned, client=client),
    }


def _present(*candidates: plots.Plot | None) -> list[plots.Plot]:
    return [plot for plot in candidates if plot]


def _round(row: dict[str, Any]) -> dict[str, Any]:
    """One line of the table of rounds."""
    failures = row.get("failures") or {}
    weights, examples, clients = (row.get(key) or {} for key in ("weights", "num_examples", "clients"))
    names = sorted({*(row.get("participants") or ()), *failures}, key=natural_order)
    participants = [
        {
            "name": name,
            "weight": weights.get(name),
            "examples": examples.get(name),
            "first_loss": clients.get(name, {}).get("first_loss"),
            "last_loss": clients.get(name, {}).get("last_loss"),
            "reason": text.shorten(str(failures[name]), _REASON) if name in failures else None,
        }
        for name in names
    ]
    return {
        "round": row["round"],
        "is_best": bool(row.get("is_best")),
        "num_accepted": len(row.get("accepted") or ()),
        "participants": participants,
        "failures": [participant for participant in participants if participant["reason"] is not None],
        "learning_rate": row.get("learning_rate"),
        "train_loss": row.get("train_loss"),
        "seconds": sum(value or 0.0 for value in (row.get("seconds") or {}).values()),
    }


def _plan(run: Run) -> list[tuple[str, str]]:
    plan = run.plan
    trained, parameters = plan.get("num_trained"), plan.get("num_parameters")
    share = f" ({text.percent(trained / parameters, 2)})" if trained and parameters else ""
    return [
        ("Model", str(plan.get("model", "–"))),
        ("Method", str(plan.get("method", "–"))),
        ("Clients, rounds", f"{text.count(plan.get('num_clients'))}, {text.count(plan.get('num_rounds'))}"),
        ("Parameters", text.count(parameters)),
        ("Trained on each client", text.count(trained) + share),
        ("Planned up, a client and round", text.human_bytes(plan.get("uplink_bytes"))),
        ("Planned down, a client and round", text.human_bytes(plan.get("downlink_bytes"))),
        ("Planned memory", text.human_bytes(plan.get("memory_bytes"))),
        ("Planned disk", text.human_bytes(plan.get("disk_bytes"))),
    ]


def _environment(environment: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [(name, str(value)) for name, value in environment.items() if not isinstance(value, dict)]
    for values in environment.values():
        if isinstance(values, dict):
            facts += [(name, str(value)) for name, value in values.items()]
    return facts


def _commands(name: str, *, finished: bool, client: str | None) -> list[tuple[str, str]]:
    """What can be done with the run, as commands that can be pasted into a shell.

    Args:
        name: The run's directory.
        finished: Whether all rounds are done.
        client: One of the clients, where each has a model of its own.
    """
    whose = [] if client is None else ["--client", client]
    resume = "Go on after an interruption" if finished else "Finish this run"
    commands = [
        ("Whole model, loads anywhere", ["export", name, *whose, "--to", "merged", "--out", f"{name}-merged"]),
        ("Adapter and what it needs", ["export", name, *whose, "--to", "adapter", "--out", f"{name}-adapter"]),
        (resume, ["run", f"{name}/config.toml", "--resume", "--out", name]),
    ]
    generate = shlex.join(["fedmomentum", "generate", name, *whose])
    joined = [(title, shlex.join(["fedmomentum", *words])) for title, words in commands]
    return [("Try the model", f'{generate} --prompt "..."'), *joined]
