"""`CheckpointReader`: read a round's checkpoint with everything that the next round needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fedmomentum.errors import FedMomentumError, ModelError
from fedmomentum.formats.directories import read_manifest, retained_rounds, round_file
from fedmomentum.formats.metrics_file import METRICS, check_metrics, read_metrics
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject, read_object, sum_objects
from fedmomentum.global_model.parts import split_adapter
from fedmomentum.lora.half_precision import decode_factors, dtype_of
from fedmomentum.server.diagnostics import GlobalUpdate
from fedmomentum.server.state import ServerState
from fedmomentum.utils.tensors import read_safetensors

if TYPE_CHECKING:
    from fedmomentum.formats.manifest import ModelFile
    from fedmomentum.formats.round_record import RoundRecord


class CheckpointReader:
    """Reads and checks the checkpoints of one run's directory; writes nothing.

    Args:
        path: The run's directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, server_round: int) -> tuple[ModelFile, GlobalModel, ServerState]:
        """Read a round's checkpoint with all that the next round needs, and verify all hashes."""
        file = round_file(self.path, server_round)
        manifest = read_manifest(file)
        model = GlobalModel.read(self.path, file)
        run = manifest.run
        assert run is not None  # ensured by read_manifest
        # Also read what only the next round needs: the parts of the last update and of recipes.
        for name in sorted(run.needed - manifest.needed):
            read_object(self.path, name, manifest.sizes[name])
        state = ServerState(
            run_id=run.run_id,
            held=run.held,
            best_round=run.best_round,
            best_loss=run.best_loss,
            started_from=run.started_from,
            merged=run.merged,
            ranks=run.ranks,
            recipes=run.recipes,
            splits=run.splits,
            moments=run.moments,
            outcomes=run.outcomes,
            summed_examples=run.summed_examples,
        )
        self.last_update(model, state, ())
        return manifest, model, state

    def lines(self) -> list[bytes]:
        """Return the complete lines of metrics.jsonl."""
        try:
            return read_metrics(self.path / METRICS, ModelError)
        except FileNotFoundError:
            return []

    def check_lines(self, lines: Sequence[bytes], manifest: ModelFile, last: int | None) -> None:
        """Refuse rows of metrics other than those that were committed.

        A killed run leaves at most one extra row, of the round that it was about to commit. More
        extra rows mean that checkpoints are missing, unless the rounds up to `last` will be redone.
        """
        assert manifest.run is not None
        path = self.path / METRICS
        wanted = manifest.run.metrics
        check_metrics(lines, wanted, path)
        most = wanted.rows + 1 + (last - manifest.round if last is not None else 0)
        if len(lines) > most:
            raise ModelError(
                f"{path} has rows of {len(lines)} rounds, and the last checkpoint is of round "
                f"{manifest.round}; checkpoints are missing"
            )

    def advice(self, damaged: int) -> str:
        """Return advice about a damaged round: resume from the newest older intact one, if any."""
        for server_round in reversed(retained_rounds(self.path)):
            if server_round >= damaged:
                continue
            try:
                manifest, _, _ = self.read(server_round)
                check_metrics(self.lines(), manifest.run.metrics, self.path / METRICS)  # type: ignore[union-attr]
            except FedMomentumError:
                continue
            return (
                f"Restore it from a copy; or resume from round {server_round}, which is whole, "
                f"with --round {server_round}: the rounds after it are then done again"
            )
        return "Restore it from a copy, or start over in another --out"

    def last_update(
        self, model: GlobalModel, state: ServerState, records: Sequence[RoundRecord]
    ) -> GlobalUpdate | None:
        """Return the change of the effective weights by the round that led to `model`.

        None in round 0. It is read from the objects that the state names, so that it is
        bit-identical after a kill.

        Raises:
            ModelError: If one of them is missing or damaged, or does not hold what it should.
        """
        if not state.started_from:
            return None
        where = f"the start of round {model.server_round}"
        tensors: dict[str, Tensor] = {}
        for name in state.started_from:
            tensors |= read_safetensors(read_object(self.path, name), where)[0]
        # The adapter that the last round started from, and what it merged.
        modules, _ = split_adapter(decode_factors(tensors, dtype_of(tensors), where), where)
        merged = sum_objects([StoredObject.read(self.path, name) for name in state.merged])
        diagnostics = None
        if model.server_round < len(records):
            diagnostics = records[model.server_round].diagnostics
        update_norm = None if diagnostics is None else diagnostics.update_norm
        return GlobalUpdate(
            replace(model.adapter, modules=modules), model.adapter, merged, update_norm
        )
