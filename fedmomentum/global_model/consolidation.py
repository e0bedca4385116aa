"""Consolidation: `base_update` as one dense part, the snapshot, and how a client obtains it.

The snapshot of a module is `round(sum_j P_j)`: its parts summed in float64, the sum rounded to
float32. A client that has the parts can compute exactly the same bytes, although the last bits of
sums in float64 differ from machine to machine:

A part is `P_j = B_j A_j` of rank r_j, or dense (r_j = 0). Products of float32 numbers are exact in
float64, so only additions round. Whatever the order in which each part's products and then the n
parts are summed, the computed element (i, k) is within `u M_ik` of the exact one (Higham, Accuracy
and Stability, section 4.2), to first order in u = 2^-53, with

    M_ik = sum_j (r_j + n) |row i of B_j| |column k of A_j|  +  sum over dense parts of n |P_j,ik|.

Two machines differ by at most `2 u M`. Rounding is monotone: if both ends of an interval round to
the same float32 number, so does everything in between. So only elements for which `x - 4 u M` and
`x + 4 u M` round to different numbers can differ (the factor of two covers the rounding of the
bound and of the ends). These near ties, a few in ten thousand, are listed with the server's values,
and every other machine takes them from the list.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmomentum.errors import ModelError
from fedmomentum.formats.manifest import MAX_PARTS, MAX_RECIPES, Recipe
from fedmomentum.global_model.objects import StoredObject, group_by_module
from fedmomentum.linalg.low_rank import CORE_DTYPE, LowRank
from fedmomentum.utils.tensors import read_safetensors, safetensors_bytes

if TYPE_CHECKING:
    from fedmomentum.global_model.model import GlobalModel
    from fedmomentum.linalg.matrix import Matrix


# The number of elements of a sum that are computed at a time: 8 MB, which fits in cache.
BLOCK_ELEMENTS = 2**20
FLOAT32_BYTES = 4

# ── the arithmetic ────────────────────────────────────────────────────────────────────────────────


def make_snapshot(parts: Sequence[StoredObject]) -> tuple[StoredObject, StoredObject]:
    """Return the sum of the parts as one dense part, and its near ties, computed on the CPU.

    Args:
        parts: What to sum, `(out, in)` per module; a part that occurs twice counts twice.

    Returns:
        The snapshot, and the ties: for each module that has any, `<module>.index`, `(n,)` int64,
        into the flattened `(out, in)` matrix, and `<module>.value`, `(n,)` float32.
    """
    totals = {}
    ties = {}
    for module, terms in group_by_module(parts).items():
        total = torch.empty(terms[0].shape, dtype=torch.float32, device="cpu")
        error_bound = _error_bound(terms)
        indices = []
        for rows, exact in _row_blocks(terms):
            total[rows] = _round(exact)
            # A tie: the ends of the interval of possible sums round to different numbers.
            bound = error_bound(rows)
            is_tie = _round(exact + bound) != _round(exact.sub_(bound))
            indices.append(is_tie.flatten().nonzero()[:, 0] + rows.start * total.shape[1])
        _refuse_overflow(module, total)
        totals[module] = total
        index = torch.cat(indices)
        if len(index):
            ties[f"{module}.index"] = index
            ties[f"{module}.value"] = total.flatten()[index]
    return StoredObject.of(totals), StoredObject(safetensors_bytes(ties))


def rebuild_snapshot(
    parts: Sequence[StoredObject], ties: StoredObject, shapes: Mapping[str, tuple[int, int]]
) -> StoredObject:
    """Return the snapshot that `make_snapshot` made elsewhere from the same parts and ties.

    Args:
        parts: What to sum, in the same order.
        ties: The near ties, as the other machine rounded them.
        shapes: Module to `(out, in)`, for all modules that may change.

    Raises:
        ModelError: If the parts have other modules or shapes, or the ties do not fit them.
        PayloadError: If the bytes are not a safetensors file.
    """
    name = f"ties {ties.name[:16]}"
    tie_tensors, _ = read_safetensors(ties.data, name)
    totals = {}
    for module, terms in group_by_module(parts).items():
        _check_shapes(module, terms, shapes)
        total = torch.empty(shapes[module], dtype=torch.float32, device="cpu")
        for rows, exact in _row_blocks(terms):
            total[rows] = _round(exact)
        _take_ties(module, total, tie_tensors, name)
        _refuse_overflow(module, total)
        totals[module] = total
    if tie_tensors:
        raise ModelError(f"{name} hold {min(tie_tensors)}, which is no element of these parts")
    return StoredObject.of(totals)


def _check_shapes(
    module: str, terms: Sequence[Matrix], shapes: Mapping[str, tuple[int, int]]
) -> None:
    for term in terms:
        if tuple(term.shape) != shapes.get(module):
            raise ModelError(
                f"a part changes module {module} {tuple(term.shape)}; here it is "
                f"{shapes.get(module)}"
            )


def _take_ties(module: str, total: Tensor, tie_tensors: dict[str, Tensor], name: str) -> None:
    """Overwrite the near ties of one module in place, and remove them from `tie_tensors`."""
    if f"{module}.index" not in tie_tensors:
        return
    index = tie_tensors.pop(f"{module}.index")
    value = tie_tensors.pop(f"{module}.value", None)
    is_valid = (
        value is not None
        and (index.dtype, value.dtype) == (torch.int64, torch.float32)
        and index.ndim == 1
        and index.shape == value.shape
        and not bool(((index < 0) | (index >= total.numel())).any())
    )
    if value is None or not is_valid:
        raise ModelError(f"{name} name no elements of module {module}, or no values for them")
    total.view(-1)[index] = value


def _row_blocks(terms: Sequence[Matrix]) -> Iterator[tuple[slice, Tensor]]:
    """Yield the sum in float64, a block of rows at a time, reusing the same memory.

    Each part is formed before it is added: adding it rank by rank would make the error bound grow
    with the sum of all ranks.
    """
    out_size, in_size = terms[0].shape
    block_size = max(1, BLOCK_ELEMENTS // max(in_size, 1))
    right_factors = [term.A.to(CORE_DTYPE) if isinstance(term, LowRank) else term for term in terms]
    buffer_shape = (min(block_size, out_size), in_size)
    total = torch.empty(buffer_shape, dtype=CORE_DTYPE, device="cpu")
    product = torch.empty(buffer_shape, dtype=CORE_DTYPE, device="cpu")
    for start in range(0, out_size, block_size):
        rows = slice(start, min(start + block_size, out_size))
        num_rows = rows.stop - start
        total = total[:num_rows].zero_()
        product = product[:num_rows]
        for term, right in zip(terms, right_factors, strict=True):
            if isinstance(term, LowRank):
                total += torch.mm(term.B[rows].to(CORE_DTYPE), right, out=product)
            else:
                total += right[rows]
        yield rows, total


def _error_bound(terms: Sequence[Matrix]) -> Callable[[slice], Tensor]:
    """Return a function from rows to their bound `4 u M`; see the module's docstring.

    The sum over factored parts is a product of rank n: row norms times column norms.
    """
    num_terms = len(terms)
    unit = 2 * torch.finfo(CORE_DTYPE).eps  # eps is 2 u
    factored = [term for term in terms if isinstance(term, LowRank)]
    dense = [term for term in terms if isinstance(term, Tensor)]
    out_size, in_size = terms[0].shape
    row_norms = torch.zeros(out_size, 0, dtype=CORE_DTYPE, device="cpu")
    column_norms = torch.zeros(0, in_size, dtype=CORE_DTYPE, device="cpu")
    if factored:
        scaled_norms = []
        for term in factored:
            norms = torch.linalg.vector_norm(term.B, dim=1, dtype=CORE_DTYPE)
            scaled_norms.append(norms * (unit * (term.rank + num_terms)))
        row_norms = torch.stack(scaled_norms, dim=1)
        column_norms = torch.stack(
            [torch.linalg.vector_norm(term.A, dim=0, dtype=CORE_DTYPE) for term in factored]
        )

    def error_bound(rows: slice) -> Tensor:
        bound = row_norms[rows] @ column_norms
        for term in dense:
            bound += term[rows].to(CORE_DTYPE).abs_().mul_(unit * num_terms)
        return bound

    return error_bound


def _refuse_overflow(module: str, total: Tensor) -> None:
    """Refuse a sum that float32 cannot represent.

    Raises:
        ModelError: If it holds NaN or Inf.
    """
    if not bool(torch.isfinite(total).all()):
        raise ModelError(f"the sum of module {module} is beyond float32; no snapshot was made")


def _round(exact: Tensor) -> Tensor:
    """Round to float32, making zeros positive: their sign depends on the order of summation."""
    return exact.to(torch.float32).add_(0.0)


# ── when and what to consolidate ──────────────────────────────────────────────────────────────────


def dense_bytes(model: GlobalModel) -> int:
    """Return the bytes of a snapshot without its header: `4 sum(out * in)`.

    The sum runs over the modules that `base_update` changes.
    """
    sizes = {}
    for stored in model.base_update:
        for module, matrix in stored.matrices.items():
            sizes[module] = matrix.shape[0] * matrix.shape[1]
    return FLOAT32_BYTES * sum(sizes.values())


def should_consolidate(model: GlobalModel, download_bytes: Collection[int] = ()) -> bool:
    """Return whether `base_update` has several parts and has grown beyond a bound.

    The bound is the size of the dense snapshot. One of three conditions suffices: a client that is
    sent a task next would download more than the snapshot; the list has grown beyond twice the
    snapshot, even if no client needs all of it; or the last round merged at least as much as the
    snapshot. Every client must download that part anyway, and can download the snapshot instead.

    Args:
        model: The model with its list.
        download_bytes: `Delivery.size` of the clients that are sent a task next.
    """
    if len(model.base_update) < 2:
        return False
    dense = dense_bytes(model)
    list_bytes = FLOAT32_BYTES * sum(stored.num_parameters for stored in model.base_update)
    newest_bytes = FLOAT32_BYTES * sum(stored.num_parameters for stored in model.newest)
    return max(download_bytes, default=0) > dense or list_bytes > 2 * dense or newest_bytes >= dense


def consolidate(model: GlobalModel) -> tuple[GlobalModel, Recipe, StoredObject]:
    """Return the model with `base_update` as one dense part, its recipe, and its near ties."""
    snapshot, ties = make_snapshot(model.base_update)
    first, *others = model.base_update
    is_dense = all(isinstance(matrix, Tensor) for matrix in first.matrices.values())
    parts = others if is_dense else model.base_update
    recipe = Recipe(
        makes=snapshot.name,
        onto=first.name if is_dense else None,
        parts=tuple(stored.name for stored in parts),
        ties=ties.name,
    )
    return replace(model, base_update=(snapshot,)), recipe, ties


def prune_recipes(
    recipes: Sequence[Recipe], size_of: Callable[[str], int], dense: int
) -> tuple[Recipe, ...]:
    """Return the newest recipes whose parts together are smaller than a snapshot.

    A client that is further behind downloads less by fetching the snapshot.

    Args:
        recipes: All recipes, oldest first.
        size_of: From hash to bytes.
        dense: The bytes of a snapshot.
    """
    retained: list[Recipe] = []
    objects: set[str] = set()
    num_parts = 0
    for recipe in reversed(recipes):
        num_parts += len(recipe.parts)
        is_large = sum(map(size_of, objects)) >= dense
        if is_large or len(retained) == MAX_RECIPES or num_parts > MAX_PARTS:
            break
        retained.append(recipe)
        objects |= recipe.fetched
    return tuple(reversed(retained))


# ── delivery ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Delivery:
    """What a client needs to obtain a list of parts.

    Attributes:
        objects: Hashes of the objects to send.
        recipes: How to make snapshots from these and the client's own objects, oldest first.
        size: The bytes of the objects.
    """

    objects: frozenset[str]
    recipes: tuple[Recipe, ...]
    size: int


def plan_delivery(
    base_update: Sequence[str],
    cached_objects: Collection[str],
    recipes: Sequence[Recipe],
    size_of: Callable[[str], int],
) -> Delivery:
    """Return the smaller of two deliveries.

    One sends all parts that the client is missing. The other replaces the snapshot by what the
    client needs to make it.

    Args:
        base_update: Hashes of the list that the client must obtain.
        cached_objects: Hashes of the client's objects.
        recipes: All recipes, oldest first.
        size_of: From hash to bytes.
    """
    # All parts that are missing.
    missing = {name for name in base_update if name not in cached_objects}
    full = Delivery(frozenset(missing), (), sum(map(size_of, missing)))
    if not base_update:
        return full
    chain = _recipe_chain(base_update[0], cached_objects, recipes)
    if not chain:
        return full
    # The objects missing for making the snapshot, which is always the first part.
    objects = missing - {base_update[0]}
    for recipe in chain:
        objects |= {name for name in recipe.fetched if name not in cached_objects}
    by_recipes = Delivery(frozenset(objects), chain, sum(map(size_of, objects)))
    return by_recipes if by_recipes.size < full.size else full


def _recipe_chain(
    snapshot: str, cached_objects: Collection[str], recipes: Sequence[Recipe]
) -> tuple[Recipe, ...]:
    """Return the recipes that lead to a snapshot from one that the client has, or from scratch.

    Returns:
        The recipes, oldest first; empty if the client has the snapshot, or if one is unknown.
    """
    recipe_of = {recipe.makes: recipe for recipe in recipes}
    chain: list[Recipe] = []
    needed: str | None = snapshot
    while needed is not None and needed not in cached_objects:
        if needed not in recipe_of:
            return ()
        chain.insert(0, recipe_of.pop(needed))
        needed = chain[0].onto
    return tuple(chain)
