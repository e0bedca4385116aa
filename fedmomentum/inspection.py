"""`fedmomentum inspect`: what a folder holds, as tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from fedmomentum.adapter import Adapter
from fedmomentum.errors import ModelError
from fedmomentum.folders import MANIFEST, find_manifest, is_adapter, kept_rounds
from fedmomentum.global_model import GlobalModel
from fedmomentum.lowrank import LowRank
from fedmomentum.peft_io import read_adapter
from fedmomentum.report.text import human_bytes
from fedmomentum.results import checkpoint_state, whose_factors
from fedmomentum.schema import printable


def describe(folder: Path) -> Iterator[Table]:
    """Tables for a PEFT adapter's folder, a global model's, or a run's.

    Raises:
        ModelError: none of the three.
        AdapterError: a PEFT adapter that cannot be read.
    """
    if is_adapter(folder):
        adapter = read_adapter(folder)
        yield _facts(
            ("kind", "PEFT adapter"),
            ("base model", str(adapter.config.get("base_model_name_or_path"))),
            ("numbers", f"{adapter.num_numbers():,}"),
            ("content SHA-256", adapter.digest()),
            *(("saved in full", name) for name in sorted(adapter.saved)),
        )
        yield _modules(adapter, None)
        return
    rounds = kept_rounds(folder)
    if not rounds and not (folder / MANIFEST).is_file():
        raise ModelError(
            f"{folder} is neither a run (rounds/), nor a global model ({MANIFEST}), nor a PEFT adapter "
            "(adapter_config.json)"
        )
    model = GlobalModel.load(folder)
    yield _facts(
        ("kind", "run" if rounds else "global model"),
        *([("rounds kept", ", ".join(map(str, rounds)))] if rounds else []),
        ("round", str(model.server_round)),
        ("method", model.method),
        *_personal(folder, model),
        ("base model", f"{model.base.name}{f' @ {model.base.revision}' if model.base.revision else ''}"),
        ("base SHA-256", model.base.sha256 or "unknown: combined without the base at hand"),
        ("tokenizer SHA-256", model.base.tokenizer_sha256 or "unknown"),
        ("version", model.version),
        *(
            (f"adapter, {kind}", f"{blob.name}, {human_bytes(len(blob.data))}")
            for kind, blob in model.adapter_objects.items()
        ),
        *(("base update", f"{blob.name}, {human_bytes(len(blob.data))}") for blob in model.base_update),
        *([("carried", f"a tail in {len(model.carried)} modules, not part of the model")] if model.carried else []),
    )
    yield _modules(model.adapter, model)


def _personal(folder: Path, model: GlobalModel) -> Iterator[tuple[str, str]]:
    """Say that there is no one global model, and whose own factors are at hand."""
    if not model.personal:
        return
    yield "personal factors", f"{model.personal} stays with each client; there is no one global model (--client NAME)"
    if kept_rounds(folder):
        run = checkpoint_state(find_manifest(folder, "last"))
        here = whose_factors(folder, run)
        for client, rounds in here.items():
            yield f"  {printable(client, 80)}", f"after the rounds {', '.join(map(str, rounds))}"
        elsewhere = sorted(set(run.held) - here.keys())
        if elsewhere:
            yield "  not here", ", ".join(printable(client, 80) for client in elsewhere)


def _facts(*facts: tuple[str, str]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts:
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return table


def _modules(adapter: Adapter, model: GlobalModel | None) -> Table:
    """A row a module: its form, its norms in effective weights, how its energy lies."""
    more = ("merged rank", "merged norm") if model else ()
    table = Table(
        Column("module", overflow="fold", min_width=24),
        "out x in",
        "rank",
        "scaling",
        "norm",
        "energy in the first",
        *more,
    )
    for module, matrix in adapter.modules.items():
        S = matrix.svd()[1]
        energy = S.square().cumsum(0) / S.square().sum() if float(S.square().sum()) else S * 0
        marks = [str(i) for i in (1, 2, 4, 8, 16, 32, 64) if i < len(S)]
        row: list[Text | str] = [
            Text(module), f"{matrix.shape[0]} x {matrix.shape[1]}", str(matrix.rank), f"{adapter.scalings[module]:g}",
            f"{adapter.effective(module).norm():.4g}",
            "  ".join(f"{m}: {float(energy[int(m) - 1]):.1%}" for m in marks),
        ]  # fmt: skip
        if model:
            merged = model.merged(module)
            row += (
                [str(merged.rank), f"{merged.norm():.4g}"]
                if isinstance(merged, LowRank)
                else ["dense", f"{merged.norm():.4g}"]
            )
        table.add_row(*row)
    return table
