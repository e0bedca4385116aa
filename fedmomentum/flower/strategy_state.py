"""The state of `FedMomentumStrategy` between rounds: the global model, and its arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedmomentum.aggregation.aggregate import AggregationResult, RoundContext, aggregate_updates
from fedmomentum.aggregation.method import Method
from fedmomentum.base_model.identity import BaseIdentity
from fedmomentum.errors import AdapterError, ModelError
from fedmomentum.flower.peft_arrays import ArraySpec, read_tensors, residual_record, to_record
from fedmomentum.flower.peft_replies import AdapterForm
from fedmomentum.global_model.model import GlobalModel
from fedmomentum.global_model.objects import StoredObject, sum_objects
from fedmomentum.global_model.parts import rounding_losses
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.linalg.matrix import Matrix, norm, rank_bound
from fedmomentum.linalg.weighted_sum import exact_sum
from fedmomentum.lora.adapter import Adapter
from fedmomentum.lora.peft_config import plain_config
from fedmomentum.lora.peft_layout import to_peft_tensors


@dataclass(frozen=True, eq=False)
class StrategyState:
    """The global model `W = base + residual + scaling * B A` after some rounds.

    Attributes:
        form: The form of the arrays.
        adapter: The adapter that the arrays hold.
        residual: Module -> the sum of all rounds' residuals, in effective-weight units.
        carried: Module -> what the method adds to its next sum.
        server_round: The number of completed rounds.
    """

    form: AdapterForm
    adapter: Adapter
    residual: Mapping[str, Matrix] = field(default_factory=dict)
    carried: Mapping[str, Matrix] = field(default_factory=dict)
    server_round: int = 0

    @classmethod
    def of(cls, arrays: ArrayRecord, config: Mapping[str, object]) -> StrategyState:
        """Return the state before round 1.

        Args:
            arrays: A PEFT state dict, as `get_peft_model_state_dict` returns it.
            config: The PEFT configuration, as JSON values.

        Raises:
            PayloadError: If an array is damaged, not finite, or of an unsupported dtype.
            AdapterError: If the arrays do not match the adapter that the configuration describes.
        """
        tensors = read_tensors(arrays, "the initial arrays")
        specs = {key: ArraySpec(tuple(t.shape), t.dtype) for key, t in tensors.items()}
        form = AdapterForm(config, specs)
        state = cls(form, form.adapter(tensors, "the initial arrays"))
        # tensors must keep their names on a round trip through our adapter
        unwritten = sorted(specs.keys() ^ state.tensors().keys())
        if unwritten:
            raise AdapterError(
                f"the initial arrays hold {unwritten[0]}, which is no plain tensor of the adapter; "
                "give what get_peft_model_state_dict(model, save_embedding_layers=False) returns"
            )
        return state

    # ── what travels ──

    def tensors(self) -> dict[str, Tensor]:
        """Return the adapter's tensors with the names and dtypes of the arrays."""
        tensors = to_peft_tensors(self.adapter)
        order = {key: position for position, key in enumerate(self.form.specs)}
        cast = {}
        for key in sorted(tensors, key=lambda key: order.get(key, len(order))):
            spec = self.form.specs.get(key)
            cast[key] = tensors[key].to(spec.dtype) if spec else tensors[key]
        return cast

    def arrays(self) -> ArrayRecord:
        """Return the adapter as the arrays that are sent to clients."""
        return to_record(self.tensors())

    def residual_arrays(self) -> ArrayRecord:
        """Return the base residual as the arrays that are sent to clients; empty if none."""
        return residual_record(self.residual, self.form.dtype)

    # ── the round ──

    def advance(
        self, adapters: Sequence[Adapter], weights: Sequence[float], method: Method, seed: int
    ) -> tuple[StrategyState, dict[str, float]]:
        """Return the state after one more round, and its metrics.

        `next adapter + next residual + next carried` is `residual + carried` plus the exact
        weighted mean of the clients' `s B_i A_i`, for an exact method.

        Raises:
            AdapterError: If the method rejects the adapters, or the result is not finite.
        """
        context = RoundContext.of_round(
            self.server_round + 1, self.adapter, self.carried, seed=seed
        )
        result = aggregate_updates(adapters, weights, method, context)
        state = replace(
            self,
            adapter=replace(result.adapter, name="the global adapter"),
            carried={module: self._narrow(m) for module, m in result.carried.items()},
            server_round=self.server_round + 1,
        )
        # clients get the adapter in the arrays' dtype; the base absorbs what rounding removes
        rounded = self.form.adapter(state.tensors(), "the global adapter")
        added = dict(result.residual)
        if method.exact and self._is_half:
            for module, lost in rounding_losses(state.adapter, rounded).items():
                added[module] = self._sum([added[module], lost] if module in added else [lost])
        residual = dict(self.residual)
        for module, matrix in added.items():
            total = self._sum([residual[module], matrix] if module in residual else [matrix])
            if rank_bound(total):
                residual[module] = total
            else:
                residual.pop(module, None)
        state = replace(state, adapter=rounded, residual=residual)
        state._check_finite()
        return state, state._measure(result, added)

    @property
    def _is_half(self) -> bool:
        """Whether factors are sent in 16 bits."""
        return any(spec.dtype == torch.float16 for spec in self.form.specs.values())

    def _narrow(self, matrix: Matrix) -> Matrix:
        """Return a matrix in the dtype that is sent and saved."""
        return matrix.to(self.form.dtype)

    def _sum(self, matrices: Sequence[Matrix]) -> Matrix:
        """Return the sum in the smaller form, in the dtype that is sent and saved."""
        total = exact_sum([], [], matrices)
        if isinstance(total, LowRank):
            total = total.recompress()
        return self._narrow(total)

    def _check_finite(self) -> None:
        """Reject sums that overflowed their dtype.

        Raises:
            AdapterError: If a matrix holds NaN or Inf; the message names its module.
        """
        for matrices in (self.adapter.modules, self.residual, self.carried):
            for module, matrix in matrices.items():
                factors = (matrix.B, matrix.A) if isinstance(matrix, LowRank) else (matrix,)
                if not all(bool(torch.isfinite(factor).all()) for factor in factors):
                    raise AdapterError(f"module {module}: the aggregate holds NaN or Inf")

    def _measure(self, result: AggregationResult, added: Mapping[str, Matrix]) -> dict[str, float]:
        """Return norms over all modules in effective-weight units, and the residual's rank."""
        squares = {"adapter-norm": 0.0, "dropped-norm": 0.0}
        for module, scaling in self.adapter.scalings.items():
            squares["adapter-norm"] += self.adapter.effective(module).norm() ** 2
            dropped = result.findings[module].get("dropped_energy", 0.0)
            squares["dropped-norm"] += scaling**2 * dropped
        squares["residual-norm"] = sum(norm(matrix) ** 2 for matrix in added.values())
        squares["carried-norm"] = sum(norm(matrix) ** 2 for matrix in self.carried.values())
        measures = {key: square**0.5 for key, square in squares.items()}
        ranks = [rank_bound(matrix) for matrix in self.residual.values()]
        return {**measures, "residual-rank": max(ranks, default=0)}

    # ── directories ──

    def to_model(self, method: Method, base_model: str) -> GlobalModel:
        """Return the global model in float32, as it is saved."""
        config = plain_config(self.adapter)
        name = base_model or str(config.get("base_model_name_or_path") or "unknown")
        modules = {m: matrix.to(torch.float32) for m, matrix in self.adapter.modules.items()}
        base_update = (StoredObject.of(self.residual),) if self.residual else ()
        carried = {module: matrix.to(torch.float32) for module, matrix in self.carried.items()}
        config["base_model_name_or_path"] = name
        return GlobalModel(
            base=BaseIdentity(name, self.adapter.config.get("revision")),
            adapter=replace(self.adapter, modules=modules, config=config),
            base_update=base_update,
            carried=carried,
            server_round=self.server_round,
            method=repr(method),
        )

    @classmethod
    def load(cls, directory: Path | str, form: AdapterForm, method: Method) -> StrategyState:
        """Load the state saved in a directory.

        Args:
            directory: A directory written by `GlobalModel.save`.
            form: The form of the arrays.
            method: The strategy's method.

        Raises:
            ModelError: If it is missing or damaged, or belongs to another method or a different
                form of adapter.
        """
        model = GlobalModel.load(directory)
        if model.method != repr(method):
            raise ModelError(
                f"{directory} was made by {model.method}, and this strategy has {method!r}"
            )
        tensors = to_peft_tensors(model.adapter)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if shapes != {key: spec.shape for key, spec in form.specs.items()}:
            raise ModelError(f"{directory} holds an adapter of other modules, ranks or shapes")
        adapter = form.adapter(
            {key: tensors[key].to(spec.dtype) for key, spec in form.specs.items()},
            "the global adapter",
        )
        if adapter.scalings != dict(model.adapter.scalings):
            raise ModelError(
                f"{directory} holds an adapter of other scalings than r and lora_alpha give"
            )
        residual = sum_objects(model.base_update)
        state = cls(form, adapter, residual, model.carried, model.server_round)
        return replace(
            state,
            residual={module: state._narrow(matrix) for module, matrix in residual.items()},
            carried={module: state._narrow(matrix) for module, matrix in model.carried.items()},
        )
