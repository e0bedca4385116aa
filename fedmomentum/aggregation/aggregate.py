"""Aggregation of whole adapters, module by module, including their scalings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmomentum.aggregation.adapter_checks import check_offline_weights, check_same_experts
from fedmomentum.aggregation.client_updates import ClientUpdates
from fedmomentum.aggregation.method import AggregationContext, Method, ModuleAggregate
from fedmomentum.aggregation.methods.fedmomentum import FedMomentum
from fedmomentum.aggregation.weights import capped_weights
from fedmomentum.errors import AdapterError
from fedmomentum.linalg.low_rank import LowRank, result_dtype, zeros
from fedmomentum.linalg.matrix import LazySequence, Matrix, rank_bound, scale
from fedmomentum.lora.adapter import Adapter, check_size
from fedmomentum.lora.base_names import check_same_base
from fedmomentum.utils.seeding import module_seed

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined, unused-ignore]


@dataclass(frozen=True, eq=False)
class AggregationResult:
    """Whole adapters after aggregation.

    Attributes:
        adapter: The combined adapter; its product is multiplied by its own scaling.
        residual: Module to what the base weight absorbs, in effective-weight units (added with
            factor 1).
        carried: Module to what the method carries into its next round, in effective-weight units.
        findings: Module to the method's findings.
        weights: `(num_clients,)`, the weights of the sum, which add up to 1: the given weights,
            normalized, unless the method computes its own.
    """

    adapter: Adapter
    residual: Mapping[str, Matrix]
    carried: Mapping[str, Matrix]
    findings: Mapping[str, Mapping[str, float]]
    weights: Tensor

    def to(self, dtype: torch.dtype) -> AggregationResult:
        """Return the result with all its matrices cast to `dtype`."""
        modules = {module: matrix.to(dtype) for module, matrix in self.adapter.modules.items()}
        return replace(
            self,
            adapter=replace(self.adapter, modules=modules),
            residual={module: matrix.to(dtype) for module, matrix in self.residual.items()},
            carried={module: matrix.to(dtype) for module, matrix in self.carried.items()},
        )


@dataclass(frozen=True, eq=False)
class RoundContext:
    """What the server knows in a round besides the clients' updates.

    Attributes:
        ranks: Module to the rank of the combined adapter.
        scalings: Module to the scaling (`lora_alpha / rank`) of the combined adapter.
        reference: The adapter that the clients started from; None if there was none.
        carried: Module to what the last round's `AggregationResult.carried` contained.
        server_round: Number of the round, from 1.
        seed: Seed of the run, for methods that sample random numbers.
        max_weight: The largest weight of a client if the method computes weights of its own; the
            given weights are used as they are.
    """

    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    reference: Adapter | None = None
    carried: Mapping[str, Matrix] = field(default_factory=dict)
    server_round: int = 1
    seed: int = 0
    max_weight: float = 1.0

    @classmethod
    def of_round(
        cls,
        server_round: int,
        adapter: Adapter,
        carried: Mapping[str, Matrix],
        *,
        seed: int,
        max_weight: float = 1.0,
    ) -> RoundContext:
        """Return the context of a run's round that clients start with `adapter`.

        The combined adapter has its ranks and scalings.
        """
        ranks = {module: matrix.rank for module, matrix in adapter.modules.items()}
        return cls(ranks, adapter.scalings, adapter, carried, server_round, seed, max_weight)

    def for_module(self, module: str) -> AggregationContext:
        """Return what a method may know of one module, in units of the combined adapter."""
        carried = self.carried.get(module)
        if carried is not None:
            carried = scale(carried.to(torch.float64), 1 / self.scalings[module], torch.float64)
        return AggregationContext(
            rank=self.ranks[module],
            reference=self.reference.modules[module] if self.reference else None,
            carried=carried,
            server_round=self.server_round,
            seed=module_seed(self.seed, self.server_round, module),
        )


def aggregate_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: Method | None = None,
    *,
    rank: int | None = None,
    scaling: float | None = None,
    seed: int = 0,
) -> AggregationResult:
    """Combine adapters of the same base model, whatever their ranks and scalings.

    The exact result is `sum_i w_i s_i B_i A_i`. The adapters are sorted by content, so the result
    does not depend on their order. A module missing from an adapter counts as zero, with that
    adapter's weight.

    Args:
        adapters: At least one.
        weights: One positive number per adapter, normalized here; equal by default.
        method: How to combine; `FedMomentum()` by default.
        rank: The rank of the result; the largest rank of all adapters by default. A module whose
            weight is smaller than that on one side gets its full rank.
        scaling: The `lora_alpha / rank` of the result; by default the adapters' own if they all
            share one, else 1.
        seed: For methods that sample random numbers.

    Returns:
        The combined adapter (float32) and, per module, its residual: adapter + residual is the
        exact sum for an exact method.

    Raises:
        AdapterError: If there are no adapters, their base models or shapes differ, the weights are
            not positive numbers, `rank` is larger than every module allows, the method rejects the
            updates (the message names the module), or the result contains NaN or Inf.

    Example:
        >>> import torch
        >>> m = LowRank(torch.eye(3)[:, :2], torch.eye(4)[:2])
        >>> one = Adapter(modules={"q": m}, scalings={"q": 2.0})
        >>> result = aggregate_adapters([one, one], [3, 1])
        >>> torch.allclose(result.adapter.effective("q").dense(), 2 * m.dense().double())
        True
    """
    if not adapters:
        raise AdapterError("no adapters to combine; give at least one")
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    check_offline_weights(weights, len(adapters))
    for adapter in adapters:
        check_size(adapter)
    check_same_base(adapters)
    check_same_experts(adapters)
    # Default to the scaling that all adapters share.
    scalings = {s for adapter in adapters for s in adapter.scalings.values()}
    if scaling is None:
        scaling = scalings.pop() if len(scalings) == 1 else 1.0

    # A canonical order makes the result independent of the order given.
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].digest(), weights[i]))
    ranks = _module_ranks(adapters, rank)
    context = RoundContext(ranks=ranks, scalings=dict.fromkeys(ranks, scaling), seed=seed)
    result = aggregate_updates(
        [adapters[i] for i in order],
        [weights[i] for i in order],
        method or FedMomentum(),
        context,
    )
    _check_finite(result)
    return result


def aggregate_updates(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method,
    context: RoundContext,
    on_module: Callable[[int, int], None] | None = None,
) -> AggregationResult:
    """Combine the clients' adapters of a round, module by module, in the given order.

    Each module is finished before the next one begins, and factors are looked up only when needed,
    so adapters that read them from disk are never all in memory at once.

    A method receives `LowRank(B_i s_i / s, A_i)`, where s is the scaling of the combined adapter.
    In a round that trains only A, the ratio goes into A, so that the frozen factor stays the same
    for all clients. The residual and carried matrices that the method returns are multiplied by s.

    Args:
        adapters: The clients' trained adapters.
        weights: One positive number per adapter, normalized here.
        method: How to combine.
        context: What else the server knows.
        on_module: Called after each module with the number of finished modules and the total.

    Raises:
        AdapterError: If a weight is not a positive finite number, shapes differ between adapters,
            or the method rejects the updates; the message names the module.
    """
    client_weights = _client_weights(adapters, weights, method, context.max_weight)
    modules: dict[str, LowRank] = {}
    residual: dict[str, Matrix] = {}
    carried: dict[str, Matrix] = {}
    findings: dict[str, Mapping[str, float]] = {}
    for module in context.ranks:
        result = _aggregate_module(module, adapters, client_weights, method, context)
        modules[module] = result.adapter
        findings[module] = result.findings
        if result.residual is not None:
            residual[module] = result.residual
        if result.carried is not None:
            carried[module] = result.carried
        if on_module:
            on_module(len(modules), len(context.ranks))
    adapter = replace(
        adapters[0],
        modules=modules,
        scalings={module: float(context.scalings[module]) for module in modules},
        saved=_mean_saved(adapters, client_weights),
        name="aggregate",
    )
    return AggregationResult(adapter, residual, carried, findings, client_weights)


def _client_weights(
    adapters: Sequence[Adapter], weights: Sequence[float], method: Method, max_weight: float
) -> Tensor:
    """Return `(num_clients,)`, float64: the normalized weights, or the method's own, capped."""
    total = sum(weights)
    if not all(0 < w < math.inf for w in weights):
        raise AdapterError(f"weights must be positive numbers; got {list(weights)}")
    normalized = torch.tensor([w / total for w in weights], dtype=torch.float64, device="cpu")
    # Given weights were capped by the caller; those that the method computes are capped here.
    given = normalized / normalized.sum()
    own = method.client_weights(given, lambda: _norms(adapters))
    if own is given:
        return given
    capped = capped_weights(dict(enumerate(own.tolist())), max_weight)
    return torch.tensor(list(capped.values()), dtype=torch.float64, device="cpu")


def _norms(adapters: Sequence[Adapter]) -> Tensor:
    """Return `(num_clients,)`, each adapter's `sqrt(sum over modules ||s B A||_F^2)`."""
    squares = []
    for adapter in adapters:
        squares.append(sum(adapter.effective(module).norm() ** 2 for module in adapter.modules))
    return torch.tensor(squares, dtype=torch.float64, device="cpu").sqrt()


def _aggregate_module(
    module: str,
    adapters: Sequence[Adapter],
    weights: Tensor,
    method: Method,
    context: RoundContext,
) -> ModuleAggregate:
    """Aggregate one module; residual and carried are in effective-weight units."""
    scaling = context.scalings[module]
    trained = method.trained_factors(context.server_round)
    updates = ClientUpdates(_module_updates(adapters, module, scaling, trained), weights)
    try:
        result = method.aggregate(updates, context.for_module(module))
    except (ValueError, LinAlgError) as error:
        names = ", ".join(f"{i}: {adapter.name}" for i, adapter in enumerate(adapters))
        raise AdapterError(f"module {module}: {error} (updates are {names})") from error
    # Convert from units of the combined adapter to effective-weight units.
    residual = result.residual
    if residual is not None:
        residual = scale(residual, scaling, updates.dtype) if rank_bound(residual) else None
    carried = result.carried
    if carried is not None:
        carried = scale(carried, scaling, updates.dtype)
    return ModuleAggregate(result.adapter, residual, carried, result.findings)


def _module_updates(
    adapters: Sequence[Adapter], module: str, scaling: float, trained: str
) -> Sequence[LowRank]:
    """Return the clients' factors of one module in units of the combined adapter.

    A client without the module counts as zero.
    """
    present = [adapter for adapter in adapters if module in adapter.modules]
    shapes = {adapter.name: adapter.modules[module].shape for adapter in present}
    if len(set(shapes.values())) > 1:
        raise AdapterError(
            f"module {module} has different shapes: {shapes}; the adapters are of different models"
        )
    first = present[0].modules[module]
    zero = zeros(first.shape, dtype=first.dtype, device=first.device)

    def rescaled(adapter: Adapter) -> LowRank:
        factors = adapter.modules.get(module, zero)
        ratio = adapter.scalings.get(module, scaling) / scaling
        if ratio == 1:
            return factors
        factors = factors.to(result_dtype(factors.dtype))
        if trained == "A":
            return LowRank(factors.B, factors.A * ratio)
        return factors.scaled(ratio)

    return LazySequence(rescaled, adapters)


def _mean_saved(adapters: Sequence[Adapter], weights: Tensor) -> dict[str, Tensor]:
    """Return the weighted mean of the fully trained tensors."""
    first = adapters[0]
    expected = _saved_shapes(first)
    for adapter in adapters[1:]:
        shapes = _saved_shapes(adapter)
        if shapes != expected:
            raise AdapterError(
                f"{adapter.name} saves the modules {shapes or 'none'} and {first.name} saves "
                f"{expected or 'none'}; modules_to_save must be the same everywhere"
            )
    means = {}
    for key, tensor in first.saved.items():
        dtype = tensor.dtype
        if dtype.is_floating_point:
            # As factors: 16 bits are an input format only, so no precision is lost.
            dtype = result_dtype(*(adapter.saved[key].dtype for adapter in adapters))
        mean = torch.zeros((), dtype=torch.float64, device=tensor.device)
        for weight, adapter in zip(weights, adapters, strict=True):
            mean = mean + weight * adapter.saved[key].to(torch.float64)
        means[key] = mean.to(dtype)
    return means


def _saved_shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in adapter.saved.items()}


def largest_rank(adapters: Sequence[Adapter]) -> int:
    """Return the largest rank of any module of the adapters."""
    return max(matrix.rank for adapter in adapters for matrix in adapter.modules.values())


def _module_ranks(adapters: Sequence[Adapter], rank: int | None) -> dict[str, int]:
    """Return module to the rank of its result, which is at most the module's full rank.

    Args:
        adapters: The adapters.
        rank: The rank that is requested; None for the largest of the adapters.

    Raises:
        AdapterError: If it is larger than the full rank of every module.
    """
    full_ranks = {}
    for adapter in adapters:
        for module, matrix in adapter.modules.items():
            full_ranks[module] = min(matrix.shape)
    largest = max(full_ranks.values())
    if rank is not None and rank > largest:
        raise AdapterError(
            f"rank must be from 1 to {largest}, the full rank of the largest module; got {rank}"
        )
    # PEFT allows ranks above a module's full rank.
    wanted = largest_rank(adapters) if rank is None else rank
    return {module: min(wanted, full) for module, full in sorted(full_ranks.items())}


def _check_finite(result: AggregationResult) -> None:
    """Reject a result that contains NaN or Inf before it is written.

    Raises:
        AdapterError: If a matrix or tensor is not finite; the message names it.
    """
    for kind, matrices in (
        ("adapter", result.adapter.modules),
        ("residual", result.residual),
        ("tail", result.carried),
    ):
        for module, matrix in matrices.items():
            tensors = (matrix.B, matrix.A) if isinstance(matrix, LowRank) else (matrix,)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                raise AdapterError(
                    f"module {module}: the {kind} of the sum holds NaN or Inf; nothing was written"
                )
    for name, tensor in result.adapter.saved.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {name}: the mean holds NaN or Inf; nothing was written")
