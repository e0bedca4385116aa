"""How PEFT stores the factors of experts and embeddings, and how they map to B and A.

For a 3-D parameter with E experts, PEFT (since 0.19.1) trains one `lora_A` of shape `(E r, in)` and
one `lora_B` of shape `(out, r E)`; the weight of expert e changes by

    scaling * lora_B.reshape(out, r, E)[:, :, e] @ lora_A.reshape(E, r, in)[e]

Two adapted parameters of one module have nested wrappers, and the tensors of the inner one are
named `<module>.base_layer.lora_A.weight`. An embedding changes by `scaling * (B A)^T`, stored here
as the product of `A^T` and `B^T`, so that the factor that starts at zero is always B.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import re2
from torch import Tensor

from fedmomentum.errors import AdapterError
from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.lora.adapter import PREFIX, Adapter
from fedmomentum.lora.module_names import (
    EMBEDDING,
    expert_name,
    is_embedding,
    split_expert,
    wrapping_order,
)
from fedmomentum.lora.target_names import is_called
from fedmomentum.utils.text import printable

# PEFT versions known to store experts as above: the first one, and the end (exclusive).
KNOWN_VERSIONS = ((0, 19, 1), (0, 22, 0))
BASE_LAYER = ".base_layer"
MAX_EXPERTS = 100_000
# Maximum number of distinct parameter names in one adapter; models have two or three.
MAX_PARAMETER_NAMES = 16
_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")


def nested_path(module: str, depth: int) -> str:
    """Return the path of PEFT's wrapper that lies `depth` wrappers inside the outermost one."""
    return module + BASE_LAYER * depth


# ── of one tensor ─────────────────────────────────────────────────────────────────────────────────


def expert_factor(kind: str, stacked: Tensor, num_experts: int, index: int) -> Tensor:
    """Return the factor `B` or `A` of one expert, as a view of PEFT's tensor."""
    if kind == "A":
        return stacked.view(num_experts, -1, stacked.shape[1])[index]
    return stacked.view(stacked.shape[0], -1, num_experts)[:, :, index]


def stack_factors(kind: str, factors: Sequence[Tensor]) -> Tensor:
    """Stack the factors of all experts, which have the same rank, as PEFT does."""
    first = factors[0]
    rows, columns = first.shape
    num_experts = len(factors)
    shape = (num_experts * rows, columns) if kind == "A" else (rows, columns * num_experts)
    stacked = first.new_empty(shape)
    for index, factor in enumerate(factors):
        expert_factor(kind, stacked, num_experts, index).copy_(factor)
    return stacked


def split_stack(matrix: LowRank, rank: int, parameter: str, name: str) -> dict[str, LowRank]:
    """Split PEFT's stacked factors into those of each expert, by the expert's name.

    Args:
        matrix: PEFT's `lora_B` and `lora_A`.
        rank: The rank of one expert.
        parameter: The path of the 3-D parameter.
        name: The adapter's name in messages.

    Raises:
        AdapterError: If the total rank is not a multiple of `rank`, or there are too many experts.
    """
    num_experts, remainder = divmod(matrix.rank, rank)
    if remainder or num_experts > MAX_EXPERTS:
        raise AdapterError(
            f"{name}: the experts of {parameter} have rank {matrix.rank} together and the "
            f"configuration says {rank} for each, which does not divide it; correct r or "
            "rank_pattern in adapter_config.json"
        )
    experts = {}
    for index in range(num_experts):
        B = expert_factor("B", matrix.B.contiguous(), num_experts, index)
        A = expert_factor("A", matrix.A.contiguous(), num_experts, index)
        experts[expert_name(parameter, index)] = LowRank(B.contiguous(), A.contiguous())
    return experts


# ── of a whole adapter ────────────────────────────────────────────────────────────────────────────


def stacks(modules: Iterable[str], name: str) -> dict[str, list[str]]:
    """Return the names of the experts of every 3-D parameter, in order.

    Raises:
        AdapterError: If an expert is missing or duplicated, so that PEFT could not store them.
    """
    indexes: dict[str, list[int]] = {}
    for module in modules:
        parameter, index = split_expert(module)
        if index is not None:
            indexes.setdefault(parameter, []).append(index)
    result = {}
    for parameter, found in sorted(indexes.items()):
        if sorted(found) != list(range(len(found))):
            missing = sorted(set(range(max(found))) - set(found))
            raise AdapterError(
                f"{name}: expert {missing[0] if missing else max(found)} of {parameter} is missing "
                "or there twice; wanted the experts from 0 on, each once"
            )
        result[parameter] = [expert_name(parameter, index) for index in range(len(found))]
    return result


def with_equal_experts(adapter: Adapter) -> Adapter:
    """Return the adapter with the same rank and scaling for all experts of a parameter.

    PEFT requires this. B is padded with zero columns and A with zero rows; if scalings differ, the
    ratio is multiplied into B.
    """
    modules = dict(adapter.modules)
    scalings = dict(adapter.scalings)
    for experts in stacks(adapter.modules, adapter.name).values():
        rank = max(modules[expert].rank for expert in experts)
        scaling = scalings[experts[0]]
        for expert in experts:
            matrix = modules[expert]
            if scalings[expert] != scaling:
                matrix = matrix.scaled(scalings[expert] / scaling)
                scalings[expert] = scaling
            if matrix.rank < rank:
                out_size, in_size = matrix.shape
                missing = rank - matrix.rank
                zero = LowRank(
                    matrix.B.new_zeros(out_size, missing), matrix.A.new_zeros(missing, in_size)
                )
                matrix = matrix.concatenate(zero)
            modules[expert] = matrix
    return replace(adapter, modules=modules, scalings=scalings)


def to_peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter with equal experts as PEFT names and stores them.

    Raises:
        AdapterError: If several parameters of a module are adapted and PEFT's order is unknown.
    """
    tensors = {PREFIX + key: tensor.contiguous() for key, tensor in adapter.saved.items()}
    for module, matrix in adapter.modules.items():
        if is_embedding(module):
            path = PREFIX + module.removesuffix(EMBEDDING)
            tensors[f"{path}.lora_embedding_A"] = matrix.B.mT.contiguous()
            tensors[f"{path}.lora_embedding_B"] = matrix.A.mT.contiguous()
        elif split_expert(module)[1] is None:
            tensors[f"{PREFIX}{module}.lora_A.weight"] = matrix.A.contiguous()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = matrix.B.contiguous()
    all_stacks = stacks(adapter.modules, adapter.name)
    for parameter, path in wrapper_paths(all_stacks, adapter.name).items():
        matrices = [adapter.modules[expert] for expert in all_stacks[parameter]]
        for kind in "AB":
            factors = [matrix.A if kind == "A" else matrix.B for matrix in matrices]
            tensors[f"{PREFIX}{path}.lora_{kind}.weight"] = stack_factors(kind, factors)
    return tensors


def wrapper_paths(parameters: Collection[str], name: str) -> dict[str, str]:
    """Return the path of PEFT's wrapper for every parameter.

    Raises:
        AdapterError: If the order in which PEFT wraps them is unknown.
    """
    by_module: dict[str, list[str]] = {}
    for parameter in parameters:
        module, _, leaf = parameter.rpartition(".")
        by_module.setdefault(module, []).append(leaf)
    paths = {}
    for module, leaves in by_module.items():
        order = wrapping_order(leaves)
        if order is None:
            raise AdapterError(
                f"{name}: PEFT's order of the parameters {', '.join(sorted(leaves))} of {module} "
                "is not known, so they cannot be told apart in its files; adapt one of them"
            )
        for depth, leaf in enumerate(reversed(order)):
            paths[f"{module}.{leaf}"] = nested_path(module, depth)
    return paths


# ── which weight a tensor in a file belongs to ────────────────────────────────────────────────────


@dataclass(frozen=True)
class DeclaredTargets:
    """What PEFT's configuration says it adapts.

    Attributes:
        modules: `target_modules`: names, or a regular expression.
        parameters: `target_parameters`: endings of the paths of parameters.
    """

    modules: Sequence[str] | str | None
    parameters: Sequence[str]

    def locate(self, paths: Iterable[str], name: str) -> dict[str, str]:
        """Return the path of the parameter that each of PEFT's wrappers adapts.

        Paths of linear modules and embeddings are left out.

        Args:
            paths: The paths of the LoRA factors in PEFT's files.
            name: The adapter's name in messages.

        Raises:
            AdapterError: If it cannot be determined.
        """
        leaves = sorted({parameter.rpartition(".")[2] for parameter in self.parameters})
        if len(leaves) > MAX_PARAMETER_NAMES:
            raise AdapterError(
                f"{name}: target_parameters names {len(leaves)} different parameters; at most "
                f"{MAX_PARAMETER_NAMES} are supported"
            )
        # Each module's wrappers, sorted by depth.
        nested: dict[str, list[str]] = {}
        for path in sorted(paths, key=len):
            module = path
            while module.endswith(BASE_LAYER):
                module = module.removesuffix(BASE_LAYER)
            nested.setdefault(module, []).append(path)

        endings = set(self.parameters)
        names = set() if isinstance(self.modules, str) else set(self.modules or [])
        located = {}
        for module, wrappers in nested.items():
            found = [leaf for leaf in leaves if _ends_in(f"{module}.{leaf}", endings)]
            if wrappers == [module] and (not found or self._is_module(module, names, name)):
                continue
            order = wrapping_order(found)
            expected = [nested_path(module, depth) for depth in range(len(wrappers))]
            if order is None or len(order) != len(wrappers) or wrappers != expected:
                raise AdapterError(
                    f"{name}: module {module} has LoRA factors for {len(wrappers)} parameters, "
                    f"and target_parameters names {', '.join(map(printable, found)) or 'none'} of "
                    "it; which belongs to which cannot be determined. Name exactly the adapted "
                    "ones in adapter_config.json"
                )
            for leaf, path in zip(reversed(order), wrappers, strict=True):
                located[path] = f"{module}.{leaf}"
        self._refuse_missing(located.values(), name)
        return located

    def _refuse_missing(self, located: Iterable[str], name: str) -> None:
        """Reject an adapter without factors for a parameter that the configuration names."""
        adapted: set[str] = set()
        for parameter in located:
            parts = parameter.split(".")
            adapted |= {".".join(parts[start:]) for start in range(len(parts))}
        missing = sorted(set(self.parameters) - adapted)
        if missing:
            raise AdapterError(
                f"{name}: target_parameters names {printable(missing[0])}, and the adapter holds "
                "no factors of it. Remove it from adapter_config.json if nothing is missing"
            )

    def _is_module(self, path: str, names: Collection[str], name: str) -> bool:
        """Return whether `target_modules` includes this module; `names` is its list form."""
        if not isinstance(self.modules, str):
            return _ends_in(path, names)
        try:
            return bool(re2.fullmatch(self.modules, path))
        except re2.error as error:
            raise AdapterError(
                f"{name}: target_modules is the expression {printable(self.modules, 100)!r}, which "
                "is not supported together with target_parameters; list the modules"
            ) from error


def _ends_in(path: str, names: Collection[str]) -> bool:
    """Return whether a path equals one of the names, or ends in a dot followed by one."""
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def is_parameter_target(module: str, parameters: Iterable[str]) -> bool:
    """Return whether PEFT adapts the weight of a linear module as one of these parameters."""
    return any(is_called(f"{module}.weight", parameter) for parameter in parameters)


def check_layout_version(version: object, name: str) -> None:
    """Reject experts stored by a PEFT version whose layout is different or unknown.

    Raises:
        AdapterError: If the layout of the version is not known to match.
    """
    first, end = KNOWN_VERSIONS
    matched = _VERSION.match(version) if isinstance(version, str) else None
    if matched and first <= tuple(int(part or 0) for part in matched.groups()) < end:
        return
    stated = printable(repr(version), 40) if version else "no version"
    raise AdapterError(
        f"{name}: its experts were stored by PEFT with peft_version {stated}. Before 0.19.1 PEFT "
        "laid the factors of experts out otherwise, and later versions than 0.21 are not known. "
        "Merge the adapter with the version that trained it, or train it again"
    )
