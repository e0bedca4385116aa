"""`fedmomentum inspect`: the contents of a directory as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from fedmomentum.errors import ModelError
from fedmomentum.formats.directories import (
    MANIFEST,
    check_last_round,
    find_manifest,
    is_adapter_directory,
    retained_rounds,
)
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.hub_adapter import find_adapter
from fedmomentum.lora.peft_folder import read_adapter
from fedmomentum.results.formatting import human_bytes
from fedmomentum.utils.text import printable

if TYPE_CHECKING:
    from fedmomentum.lora.adapter import Adapter


Row = tuple[str, str]
ENERGY_RANKS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of directions for which to show the fraction of a module's energy."""


def summarize(directory: Path) -> Iterator[Table]:
    """Yield tables about a PEFT adapter, a global model or a run.

    Raises:
        ModelError: If the directory contains none of the three.
        AdapterError: If a PEFT adapter cannot be read.
    """
    # an adapter may be in any directory or on the Hub, so look for it first
    name = str(directory)
    directory = find_adapter(directory)
    if is_adapter_directory(directory):
        adapter = read_adapter(directory, name)
        yield _facts_table(_adapter_facts(adapter))
        yield _modules_table(adapter, None)
        return
    if not directory.exists():
        raise ModelError(f"{directory} does not exist")
    if not retained_rounds(directory) and not (directory / MANIFEST).is_file():
        check_last_round(directory, -1)
        raise ModelError(
            f"{directory} is neither a run (rounds/), nor a global model ({MANIFEST}), nor a PEFT "
            "adapter (adapter_config.json)"
        )
    model = GlobalModel.load(directory)
    yield _facts_table(_model_facts(directory, model))
    yield _modules_table(model.adapter, model)


def _adapter_facts(adapter: Adapter) -> Iterator[Row]:
    yield "kind", "PEFT adapter"
    yield "base model", str(adapter.config.get("base_model_name_or_path"))
    yield "parameters", f"{adapter.num_parameters():,}"
    yield "content SHA-256", adapter.digest()
    for name in sorted(adapter.saved):
        yield "saved in full", name


def _model_facts(directory: Path, model: GlobalModel) -> Iterator[Row]:
    """Yield facts about a global model: its round, method, base model and objects."""
    rounds = retained_rounds(directory)
    yield "kind", "run" if rounds else "global model"
    if rounds:
        yield "rounds kept", ", ".join(map(str, rounds))
    yield "round", str(model.server_round)
    yield "method", model.method
    yield from _personal_facts(directory, model)
    revision = f" @ {model.base.revision}" if model.base.revision else ""
    yield "base model", f"{model.base.name}{revision}"
    if model.base.labels:
        yield "labels", printable(", ".join(model.base.labels), 1000)
    yield "base SHA-256", model.base.sha256 or "unknown: aggregated without the base model"
    yield "tokenizer SHA-256", model.base.tokenizer_sha256 or "unknown"
    yield "version", model.version
    for kind, stored in model.adapter_objects.items():
        yield f"adapter, {kind}", f"{stored.name}, {human_bytes(len(stored.data))}"
    for stored in model.base_update:
        yield "base update", f"{stored.name}, {human_bytes(len(stored.data))}"
    if model.carried:
        yield "carried", f"a tail in {len(model.carried)} modules, not part of the model"


def _personal_facts(directory: Path, model: GlobalModel) -> Iterator[Row]:
    """Yield facts about a personalized model: that each client has its own, and whose are here."""
    from fedmomentum.run.saved_model import checkpoint_state, whose_factors

    if not model.personal:
        return
    yield (
        "personal factors",
        f"{model.personal} stays with each client; there is no one global model (--client NAME)",
    )
    if not retained_rounds(directory):
        return
    run = checkpoint_state(find_manifest(directory, "last"))
    rounds_by_client = whose_factors(directory, run)
    for client, rounds in rounds_by_client.items():
        yield f"  {printable(client, 80)}", f"after the rounds {', '.join(map(str, rounds))}"
    elsewhere = sorted(set(run.held) - rounds_by_client.keys())
    if elsewhere:
        yield "  not here", ", ".join(printable(client, 80) for client in elsewhere)


def _facts_table(facts: Iterable[Row]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts:
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return table


def _modules_table(adapter: Adapter, model: GlobalModel | None) -> Table:
    """Return a table of modules: shapes, norms of effective weights, and singular values."""
    table = Table(
        Column("module", overflow="fold", min_width=24),
        "out x in",
        "rank",
        "scaling",
        "norm",
        "energy in the first",
    )
    if model is not None:
        table.add_column("merged rank")
        table.add_column("merged norm")
    for module, matrix in adapter.modules.items():
        cells = [
            f"{matrix.shape[0]} x {matrix.shape[1]}",
            str(matrix.rank),
            f"{adapter.scalings[module]:g}",
            f"{adapter.effective(module).norm():.4g}",
            _energy_cell(matrix),
        ]
        if model is not None:
            merged = model.merged(module)
            cells.append(str(merged.rank) if isinstance(merged, LowRank) else "dense")
            cells.append(f"{merged.norm():.4g}")
        table.add_row(Text(module), *cells)
    return table


def _energy_cell(matrix: LowRank) -> str:
    """Return the fraction of the squared singular values in the leading directions."""
    squares = matrix.svd()[1].square()
    total = squares.sum()
    energy = squares.cumsum(0) / total if float(total) else squares * 0
    ranks = [rank for rank in ENERGY_RANKS if rank < len(squares)]
    return "  ".join(f"{rank}: {float(energy[rank - 1]):.1%}" for rank in ranks)
