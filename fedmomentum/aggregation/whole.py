"""A method over all modules of whole adapters: scalings in, scalings out. torch only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmomentum.adapter import Adapter
from fedmomentum.aggregation.base import Method, adapter_dtype
from fedmomentum.aggregation.unequal import with_tail
from fedmomentum.errors import AdapterError
from fedmomentum.lowrank import LowRank, zeros
from fedmomentum.sums import Each, Matrix, rank_of, scaled

MAX_NORM = 1e18
"""Of a factor, and of what an adapter adds to a module. The square of it is still a float32 number."""


@dataclass(frozen=True, eq=False)
class AdapterAggregate:
    """Whole adapters after aggregation.

    Attributes:
        adapter: the combined adapter; its product counts with its own scaling.
        residual: module to what the base must absorb, in effective-weight units (added with factor 1).
        carried: module to what the method keeps for its next round, in effective-weight units.
        findings: module to the method's findings.
        weights: `(num_clients,)`, the weights of the sum, sum 1; the shares given unless the method has its own.
    """

    adapter: Adapter
    residual: Mapping[str, Matrix]
    carried: Mapping[str, Matrix]
    findings: Mapping[str, Mapping[str, float]]
    weights: Tensor


def aggregate_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: Method | None = None,
    *,
    rank: int | None = None,
    scaling: float | None = None,
    seed: int = 0,
) -> AdapterAggregate:
    """Combine adapters of one base model: `sum_i w_i s_i B_i A_i`, whatever their ranks and scalings.

    The adapters are taken in the order of their content, so that the result does not depend on the order given.
    A module that an adapter lacks counts as zero with that adapter's weight.

    Args:
        adapters: at least one.
        weights: one positive number an adapter, normalised here; equal by default.
        method: how to combine; `FedMomentum()` by default.
        rank: the result's rank; the largest rank of all by default.
        scaling: the result's `lora_alpha / rank`; by default the adapters' own where they share one, else 1.
        seed: for methods that draw random numbers.

    Returns:
        The combined adapter (`float32`) and, per module, its residual: adapter + residual is the exact sum for
        an exact method.

    Raises:
        AdapterError: no adapters, adapters of different bases or shapes, weights that are not positive numbers, a
            rank that a module cannot hold, or what the method refuses; with the module named.

    Example:
        >>> import torch
        >>> m = LowRank(torch.eye(3)[:, :2], torch.eye(4)[:2])
        >>> one = Adapter(modules={"q": m}, scalings={"q": 2.0})
        >>> result = aggregate_adapters([one, one], [3, 1])
        >>> torch.allclose(result.adapter.effective("q").dense(), 2 * m.dense().double())
        True
    """
    from fedmomentum.aggregation.fedmomentum import FedMomentum  # the default is chosen at the edge

    if not adapters:
        raise AdapterError("no adapters to combine; give at least one")
    shares = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(shares) != len(adapters):
        raise AdapterError(f"one weight an adapter: got {len(adapters)} adapters and {len(shares)} weights")
    total = sum(shares)
    if not all(0 < share < float("inf") for share in shares) or not 0 < min(shares) / total < float("inf"):
        raise AdapterError(f"weights must be positive numbers with a finite sum; got {shares}")
    for adapter in adapters:
        check_size(adapter)
    bases = {adapter.config.get("base_model_name_or_path") for adapter in adapters}
    if len(bases) > 1:
        which = ", ".join(f"{a.name}: {a.config.get('base_model_name_or_path')}" for a in adapters)
        raise AdapterError(f"the adapters were trained on different base models ({which}); they cannot be combined")
    scalings = {s for adapter in adapters for s in adapter.scalings.values()}
    if scaling is None:
        scaling = scalings.pop() if len(scalings) == 1 else 1.0
    if rank is None:
        rank = max(matrix.rank for adapter in adapters for matrix in adapter.modules.values())
    order = sorted(range(len(adapters)), key=lambda i: (adapters[i].digest(), shares[i]))
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    result = combine(
        [adapters[i] for i in order],
        [shares[i] for i in order],
        method or FedMomentum(),
        ranks=dict.fromkeys(modules, rank),
        scalings=dict.fromkeys(modules, scaling),
        seed=seed,
    )
    _check_finite(result)
    return result


def check_size(adapter: Adapter) -> None:
    """Refuse factors whose products, squared and summed, would leave the range of float32.

    Raises:
        AdapterError: naming adapter and module.
    """
    for module, matrix in adapter.modules.items():
        scaling = adapter.scalings[module]
        norms = [float(torch.linalg.vector_norm(factor.to(torch.float64))) for factor in (matrix.B, matrix.A)]
        largest = max(*norms, scaling * norms[0], scaling * norms[0] * norms[1])
        if not largest < MAX_NORM:
            raise AdapterError(
                f"{adapter.name}: module {module} has factors of norm {norms[0]:.3g} and {norms[1]:.3g} and scaling "
                f"{scaling:.3g}, beyond what sums in float32 hold ({MAX_NORM:g}); its training diverged. Leave it out"
            )


def _check_finite(result: AdapterAggregate) -> None:
    """Refuse a result that holds NaN or Inf, before anybody writes it.

    Raises:
        AdapterError: naming the module or tensor.
    """
    for kind, parts in (("adapter", result.adapter.modules), ("residual", result.residual), ("tail", result.carried)):
        for module, matrix in parts.items():
            tensors = (matrix.B, matrix.A) if isinstance(matrix, LowRank) else (matrix,)
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                raise AdapterError(f"module {module}: the {kind} of the sum holds NaN or Inf; nothing was written")
    for name, tensor in result.adapter.saved.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {name}: the mean holds NaN or Inf; nothing was written")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method,
    *,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    reference: Adapter | None = None,
    carried: Mapping[str, Matrix] | None = None,
    server_round: int = 1,
    seed: int = 0,
    on_module: Callable[[int, int], None] | None = None,
) -> AdapterAggregate:
    """`aggregate_adapters` in the order given, for a round: see there and `Method` for the arguments.

    A module is summed before the next is begun, and an adapter's factors are looked up when they are needed: adapters
    that read them from disk (`Spool`) are never in memory together.

    Each method is handed `LowRank(B_i s_i / s, A_i)`, s being the output's scaling (or the ratio on A, in a round
    in which A alone is trained: what is shared stays shared); what leaves for the base, and what is carried, is
    multiplied by s.
    """
    total = sum(weights)
    if not all(0 < w < float("inf") for w in weights):
        raise AdapterError(f"weights must be positive numbers; got {list(weights)}")
    shares = torch.tensor([w / total for w in weights], dtype=torch.float64, device="cpu")
    shares = method.weigh(shares / shares.sum(), lambda: _norms(adapters))
    parts, residual, kept, findings = {}, {}, {}, {}
    for number, (module, rank) in enumerate(ranks.items()):
        s = scalings[module]
        updates = _updates(adapters, module, s, method.trains(server_round))
        dtype = adapter_dtype(Each(_factors_of(module), [a for a in adapters if module in a.modules]))
        held = (carried or {}).get(module)
        try:
            result = method(
                updates,
                shares,
                rank=rank,
                reference=reference.modules[module] if reference else None,
                carried=scaled(held.to(torch.float64), 1 / s, torch.float64) if held is not None else None,
                server_round=server_round,
                generator=torch.Generator().manual_seed(module_seed(seed, server_round, module)),
            )
        except (ValueError, torch.linalg.LinAlgError) as error:
            names = ", ".join(f"{i}: {a.name}" for i, a in enumerate(adapters))
            raise AdapterError(f"module {module}: {error} (updates are {names})") from error
        parts[module] = result.adapter.to(dtype)
        if result.residual is not None and rank_of(result.residual):
            residual[module] = scaled(result.residual, s, dtype)
        if result.carried is not None:
            kept[module] = scaled(result.carried, s, dtype)
        findings[module] = result.findings
        del result  # in its own units: not to be in memory beside the next module's
        if on_module:
            on_module(number + 1, len(ranks))
    adapter = replace(
        adapters[0],
        modules=parts,
        scalings={module: float(scalings[module]) for module in parts},
        saved=_mean_saved(adapters, shares),
        name="aggregate",
    )
    return AdapterAggregate(adapter, residual, kept, findings, shares)


def initialise(
    method: Method, fresh: Adapter, weight: Callable[[str], Tensor] | None = None
) -> tuple[Adapter, dict[str, LowRank]]:
    """The adapter before the first round, and what the base must absorb, in effective-weight units (factor 1).

    Args:
        method: decides; most leave the adapter as it is and change no base.
        fresh: LoRA's own initialisation.
        weight: gives a module's base weight `(out, in)`; asked only where `method.reads_base`.
    """
    modules, changes = {}, {}
    for module, matrix in fresh.modules.items():
        s = fresh.scalings[module]
        W = weight(module).to(torch.float64) / s if weight and method.reads_base else None
        modules[module], change = method.initialise(W, matrix)
        if change is not None:
            changes[module] = change.scaled(s)
    return replace(fresh, modules=modules), changes


def localise(
    method: Method, adapter: Adapter, ranks: Mapping[str, int], scalings: Mapping[str, float]
) -> tuple[Adapter, dict[str, LowRank]]:
    """A client's own adapter, in its own scaling (the ratio is on B), and its tails in effective-weight units.

    The tails belong beside the client's base where `method.keeps_tail`, and are lost to it elsewhere.

    Args:
        method: decides.
        adapter: the global one.
        ranks: module to this client's rank.
        scalings: module to this client's `lora_alpha / rank`.
    """
    modules, tails = {}, {}
    for module, matrix in adapter.modules.items():
        own, tail = method.localise(matrix, ranks[module])
        s = adapter.scalings[module]
        modules[module] = own if s == scalings[module] else own.scaled(s / scalings[module])
        if tail.rank:
            tails[module] = tail.scaled(s)
    return replace(adapter, modules=modules, scalings=dict(scalings)), tails


def start_of(
    method: Method, adapter: Adapter, modules: Collection[str], *, rank: int, scaling: float, is_mixed: bool
) -> tuple[Adapter, dict[str, LowRank]]:
    """What a client starts from: its own adapter, and what stays beside its base, in effective-weight units.

    Beside the base are the tails, where the method has clients keep them, and the whole of modules that the client
    does not adapt: they count with the effective weight they have.

    Args:
        method: decides.
        adapter: the global one.
        modules: those that this client adapts.
        rank: this client's.
        scaling: this client's `lora_alpha / rank`.
        is_mixed: whether the run's clients have different ranks; then all start in one gauge.
    """
    mine = replace(adapter, modules={m: matrix for m, matrix in adapter.modules.items() if m in modules})
    beside = {m: adapter.effective(m).to(torch.float32) for m in adapter.modules if m not in modules}
    if not is_mixed:
        return _rescaled(mine, scaling), beside
    ranks, scalings = dict.fromkeys(mine.modules, rank), dict.fromkeys(mine.modules, scaling)
    start, tails = localise(method, mine, ranks, scalings)
    return start, beside | (tails if method.keeps_tail else {})


def _rescaled(adapter: Adapter, scaling: float) -> Adapter:
    """The same products in another scaling; the ratio is on B."""
    modules = {m: matrix.scaled(adapter.scalings[m] / scaling) for m, matrix in adapter.modules.items()}
    return replace(adapter, modules=modules, scalings=dict.fromkeys(modules, scaling))


def with_tails(trained: Adapter, tails: Mapping[str, LowRank]) -> Adapter:
    """A client's trained adapter with what stayed beside its base: its whole effective product, for `combine`."""
    modules, scalings = dict(trained.modules), dict(trained.scalings)
    for module, tail in tails.items():
        if module in modules:
            modules[module] = with_tail(modules[module], tail.scaled(1 / scalings[module]))
        else:
            modules[module], scalings[module] = tail, 1.0
    return replace(trained, modules=modules, scalings=scalings)


def module_seed(seed: int, server_round: int, module: str) -> int:
    """The seed of a method's generator: one for each module and round, whatever the order of modules."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{server_round}/{module}".encode()).digest()[:7])


def _norms(adapters: Sequence[Adapter]) -> Tensor:
    """`(num_clients,)`, each adapter's `sqrt(sum over modules ||s B A||_F^2)`."""
    squares = [sum(adapter.effective(module).norm() ** 2 for module in adapter.modules) for adapter in adapters]
    return torch.tensor(squares, dtype=torch.float64, device="cpu").sqrt()


def _factors_of(module: str) -> Callable[[Adapter], LowRank]:
    return lambda adapter: adapter.modules[module]


def _updates(adapters: Sequence[Adapter], module: str, scaling: float, trained: str) -> Sequence[LowRank]:
    """The clients' factors of one module in the output's units; a client without the module counts as zero."""
    shapes = {a.name: a.modules[module].shape for a in adapters if module in a.modules}
    if len(set(shapes.values())) > 1:
        raise AdapterError(f"module {module} has different shapes: {shapes}; the adapters are of different models")
    like = next(a.modules[module] for a in adapters if module in a.modules)
    nothing = zeros(like.shape, dtype=like.dtype, device=like.device)

    def update(adapter: Adapter) -> LowRank:
        factors = adapter.modules.get(module, nothing)
        ratio = adapter.scalings.get(module, scaling) / scaling
        if ratio == 1:
            return factors
        factors = factors.to(adapter_dtype([factors]))
        return LowRank(factors.B, factors.A * ratio) if trained == "A" else factors.scaled(ratio)

    return Each(update, adapters)


def _mean_saved(adapters: Sequence[Adapter], shares: Tensor) -> dict[str, Tensor]:
    """The weighted mean of the tensors that are trained in full."""
    first = adapters[0]
    for adapter in adapters[1:]:
        theirs = {key: tuple(tensor.shape) for key, tensor in adapter.saved.items()}
        ours = {key: tuple(tensor.shape) for key, tensor in first.saved.items()}
        if theirs != ours:
            raise AdapterError(
                f"{adapter.name} saves the modules {theirs or 'none'} and {first.name} saves {ours or 'none'}; "
                "modules_to_save must be the same everywhere"
            )
    return {
        key: sum(
            (share * a.saved[key].to(torch.float64) for share, a in zip(shares, adapters, strict=True)),
            start=torch.zeros((), dtype=torch.float64, device=tensor.device),
        ).to(tensor.dtype)
        for key, tensor in first.saved.items()
    }
