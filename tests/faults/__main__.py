"""Run the fault suite and print the result of each fault; exit code 0 only if all passed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmomentum.utils.process import quiet_libraries
from tests.faults import (
    flower_app,  # noqa: F401 (it registers its cases)
    secure_cases,  # noqa: F401 (it registers its cases)
)
from tests.faults.cases import CASES, Case, Skipped
from tests.faults.harness import Federation, hard_limit

END_SECONDS = 60.0
OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 160)


@dataclass
class Result:
    """The result of one fault; `survived` is "yes, ..." , "NO: ..." or "skipped: ..."."""

    name: str
    fault: str
    seen_by: str
    survived: str
    lost: list[str]
    seconds: float


def run_case(case: Case, folder: Path, shared: Path) -> Result:
    """Run a case, stop all that it started, and check that nothing is left of it."""
    started = time.monotonic()
    seen, survived, federation = "", "", None
    try:
        with hard_limit(case.seconds):
            federation = Federation(folder, shared, **case.sections)
            seen = case.act(federation)
            survived = f"yes: {federation.compared}"
    except Skipped as reason:
        survived = f"skipped: {reason}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        (folder / "traceback.txt").write_text(traceback.format_exc())
        survived = f"NO: {type(error).__name__}: {error}"
    finally:
        wrong = []
        if federation is not None:
            try:
                with hard_limit(END_SECONDS):
                    wrong = federation.close()
            except BaseException as error:
                wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        survived = f"NO: {'; '.join(wrong)}" + (
            f"; and {survived}" if survived.startswith("NO") else ""
        )
    lost = federation.lost if federation is not None else []
    return Result(case.name, case.fault, seen, survived, lost, round(time.monotonic() - started, 1))


def table_of(results: list[Result]) -> Table:
    """The results as a table."""
    table = Table("fault", "seen by", "survived", "lost", "seconds", show_lines=True)
    for result in results:
        style = {"y": "green", "s": "yellow", "N": "red"}[result.survived[0]]
        table.add_row(
            Text(result.fault),
            Text(result.seen_by[:160]),
            Text(result.survived[:1000], style=style),
            Text(", ".join(result.lost) or "nothing"),
            f"{result.seconds:.1f}",
        )
    return table


def main() -> int:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="a case; may be repeated")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/faults"), help="for results.json and failed cases"
    )
    parser.add_argument("--list", action="store_true", help="name the cases, and stop")
    arguments = parser.parse_args()
    known = {case.name: case for case in CASES}
    if arguments.list:
        for case in CASES:
            OUT.print(f"{case.name:<28}{case.fault}", markup=False, soft_wrap=True)
        return 0
    if unknown := set(arguments.only or ()) - known.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}; see --list")
    chosen = [known[name] for name in arguments.only] if arguments.only else CASES
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = []
    logging.getLogger("fedmomentum").addHandler(
        logging.NullHandler()
    )  # the reference runs have failures, as ordered
    logging.getLogger("flwr").setLevel(logging.WARNING)
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="faults-") as work:
        (shared := Path(work) / "shared").mkdir()
        for case in chosen:
            result = run_case(case, folder := Path(work) / case.name, shared)
            results.append(result)
            OUT.print(
                f"{case.name:<28}{result.seconds:6.1f} s  {result.survived}",
                markup=False,
                soft_wrap=True,
            )
            shutil.rmtree(kept := arguments.out / case.name, ignore_errors=True)
            if result.survived.startswith("NO"):  # all that is needed to see why, but no keys
                shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("*.key", "filler"))
            shutil.rmtree(folder)
    OUT.print(table_of(results))
    (arguments.out / "results.json").write_text(
        json.dumps([asdict(result) for result in results], indent=1) + "\n"
    )
    failed = [result.name for result in results if result.survived.startswith("NO")]
    if failed:
        summary = f"{len(failed)} of {len(results)} failed: {', '.join(failed)}; their logs are in {arguments.out}"
        OUT.print(summary, markup=False, soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
