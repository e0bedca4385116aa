"""Consolidation: the list `base_update` as one dense part, the snapshot, and how whoever lacks it comes by it.

The snapshot of a module is `round(sum_j P_j)`: its parts summed in float64, the sum rounded to float32. Whoever holds
the parts can make it, to the same bytes, though sums in float64 differ in their last bits from machine to machine:

A part is `P_j = B_j A_j` of rank r_j, or dense (r_j = 0). Products of float32 numbers are exact in float64, so only
additions round. In whatever order n parts are summed, and each part's products before, the computed element (i, k) is
within `u M_ik` of the exact one (Higham, Accuracy and Stability, section 4.2), to first order in u = 2^-53, with

    M_ik = sum_j (r_j + n) |row i of B_j| |column k of A_j|  +  sum over dense parts of n |P_j,ik|.

Two machines are within `2 u M`. Rounding is monotone: where the ends of an interval round to one float32 number, all
of it does. So only elements for which `x - 4 u M` and `x + 4 u M` round apart can come out differently (the factor of
two covers what the bound and the ends lose themselves). These near ties, few in ten thousand, are listed with the
value that the server's sum has, and whoever makes the snapshot takes them from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmomentum.errors import ModelError
from fedmomentum.files import read_safetensors, safetensors_bytes
from fedmomentum.global_model import Blob, GlobalModel, by_module
from fedmomentum.lowrank import CORE_DTYPE, LowRank
from fedmomentum.manifest import MAX_PARTS, MAX_RECIPES, Recipe
from fedmomentum.sums import Matrix

NUMBERS = 2**20
"""So many elements of a sum are made at a time: 8 MB, which stays in cache."""

# ── the arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────


def snapshot(parts: Sequence[Blob]) -> tuple[Blob, Blob]:
    """The sum of the parts as one dense part, and its near ties: `round(sum_j P_j)`, module by module, on the CPU.

    Args:
        parts: what to sum, `(out, in)` a module; a part may come more than once, and counts as often.

    Returns:
        The snapshot, and the ties: for each module that has some `<module>.index`, `(n,)` int64, into the flattened
        `(out, in)` matrix, and `<module>.value`, `(n,)` float32.
    """
    totals, ties = dict[str, Tensor](), dict[str, Tensor]()
    for module, matrices in by_module(parts).items():
        reach, found = _reach(matrices), list[Tensor]()
        total = totals[module] = torch.empty(matrices[0].shape, dtype=torch.float32, device="cpu")
        for rows, exact in _row_blocks(matrices):
            total[rows] = _rounded(exact)
            margin = reach(rows)
            apart = _rounded(exact + margin) != _rounded(exact.sub_(margin))
            found.append(apart.flatten().nonzero()[:, 0] + rows.start * total.shape[1])
        _refuse_overflow(module, total)
        index = torch.cat(found)
        if len(index):
            ties |= {f"{module}.index": index, f"{module}.value": total.flatten()[index]}
    return Blob.of(totals), Blob(safetensors_bytes(ties))


def remade(parts: Sequence[Blob], ties: Blob, shapes: Mapping[str, tuple[int, int]]) -> Blob:
    """The snapshot that `snapshot` made of these parts elsewhere, if the parts and the ties are the same.

    Args:
        parts: what to sum, in the same order.
        ties: the near ties, as that machine decided them.
        shapes: module to `(out, in)`: what can be changed here.

    Raises:
        ModelError: parts of other modules or shapes, or ties that are none of these matrices'.
        PayloadError: bytes that are no safetensors.
    """
    decided, totals = read_safetensors(ties.data, f"ties {ties.name[:16]}")[0], dict[str, Tensor]()
    for module, matrices in by_module(parts).items():
        wrong = [m for m in matrices if tuple(m.shape) != shapes.get(module)]
        if wrong:
            raise ModelError(f"a part changes module {module} {tuple(wrong[0].shape)}; here it is {shapes.get(module)}")
        total = totals[module] = torch.empty(shapes[module], dtype=torch.float32, device="cpu")
        for rows, exact in _row_blocks(matrices):
            total[rows] = _rounded(exact)
        if f"{module}.index" in decided:
            index, value = decided.pop(f"{module}.index"), decided.pop(f"{module}.value", None)
            if value is None or (index.dtype, value.dtype) != (torch.int64, torch.float32) or (
                index.ndim != 1 or index.shape != value.shape or bool(((index < 0) | (index >= total.numel())).any())
            ):  # fmt: skip
                raise ModelError(f"ties {ties.name[:16]} name no elements of module {module}, or no values for them")
            total.view(-1)[index] = value
        _refuse_overflow(module, total)
    if decided:
        raise ModelError(f"ties {ties.name[:16]} hold {min(decided)}, which is no element of these parts")
    return Blob.of(totals)


def _row_blocks(matrices: Sequence[Matrix]) -> Iterator[tuple[slice, Tensor]]:
    """The sum in float64, some rows at a time, each time in the same memory.

    Each part is formed before it is added: added column by column, the bound would grow with the sum of all ranks.
    """
    out_size, in_size = matrices[0].shape
    step = max(1, NUMBERS // max(in_size, 1))
    wide = [m.A.to(CORE_DTYPE) if isinstance(m, LowRank) else m for m in matrices]
    total, product = (torch.empty(min(step, out_size), in_size, dtype=CORE_DTYPE, device="cpu") for _ in range(2))
    for start in range(0, out_size, step):
        rows = slice(start, min(start + step, out_size))
        total, product = total[: rows.stop - start].zero_(), product[: rows.stop - start]
        for matrix, right in zip(matrices, wide, strict=True):
            if isinstance(matrix, LowRank):
                total += torch.mm(matrix.B[rows].to(CORE_DTYPE), right, out=product)
            else:
                total += right[rows]
        yield rows, total


def _reach(matrices: Sequence[Matrix]) -> Callable[[slice], Tensor]:
    """`4 u M` of the rows asked for; the sum over factored parts is a product of rank n."""
    count, unit = len(matrices), 2 * torch.finfo(CORE_DTYPE).eps  # eps is 2 u
    factored = [m for m in matrices if isinstance(m, LowRank)]
    left = [torch.linalg.vector_norm(m.B, dim=1, dtype=CORE_DTYPE) * (unit * (m.rank + count)) for m in factored]
    right = [torch.linalg.vector_norm(m.A, dim=0, dtype=CORE_DTYPE) for m in factored]
    dense = [m for m in matrices if isinstance(m, Tensor)]
    out_size, in_size = matrices[0].shape
    N_B = torch.stack(left, dim=1) if left else torch.zeros(out_size, 0, dtype=CORE_DTYPE, device="cpu")
    N_A = torch.stack(right) if right else torch.zeros(0, in_size, dtype=CORE_DTYPE, device="cpu")

    def reach(rows: slice) -> Tensor:
        total = N_B[rows] @ N_A
        for matrix in dense:
            total += matrix[rows].to(CORE_DTYPE).abs_().mul_(unit * count)
        return total

    return reach


def _refuse_overflow(module: str, total: Tensor) -> None:
    """Refuse a sum that float32 cannot hold.

    Raises:
        ModelError: If it holds NaN or Inf.
    """
    if not bool(torch.isfinite(total).all()):
        raise ModelError(f"the sum of module {module} is beyond float32; nothing is made of it")


def _rounded(exact: Tensor) -> Tensor:
    """To float32; a zero has no sign, for whether a sum is 0.0 or -0.0 depends on its order."""
    return exact.to(torch.float32).add_(0.0)


# ── the list ─────────────────────────────────────────────────────────────────────────────────────────────────────


def dense_bytes(model: GlobalModel) -> int:
    """Bytes of a snapshot without its header: `4 sum(out * in)` over the modules that `base_update` changes."""
    shapes = {m: tuple(matrix.shape) for blob in model.base_update for m, matrix in blob.matrices.items()}
    return 4 * sum(out_size * in_size for out_size, in_size in shapes.values())


def is_due(model: GlobalModel, downloads: Collection[int] = ()) -> bool:
    """Whether to consolidate: of a list of several parts, where one of three things passes its bound.

    What somebody who is asked next has to download for the list: one dense size. With the snapshot it is no more. The
    list, whoever is asked: two dense sizes. What the last round merged: one dense size; everyone has that to download
    anyway, and the snapshot is it.

    Args:
        model: with its list.
        downloads: bytes, for each of those who are asked next (`Delivery.size`).
    """
    if len(model.base_update) < 2:
        return False
    dense = dense_bytes(model)
    return (
        max(downloads, default=0) > dense
        or 4 * sum(map(_numbers, model.base_update)) > 2 * dense
        or 4 * sum(map(_numbers, model.newest)) >= dense
    )


def _numbers(blob: Blob) -> int:
    matrices = blob.matrices.values()
    return sum(m.B.numel() + m.A.numel() if isinstance(m, LowRank) else m.numel() for m in matrices)


def consolidated(model: GlobalModel) -> tuple[GlobalModel, Recipe, Blob]:
    """The same model with `base_update` as one dense part; the recipe for it, and the near ties that this names."""
    first, *others = model.base_update
    made, ties = snapshot(model.base_update)
    onto = first.name if all(isinstance(matrix, Tensor) for matrix in first.matrices.values()) else None
    parts = others if onto else model.base_update
    names = tuple(blob.name for blob in parts)
    recipe = Recipe(makes=made.name, onto=onto, parts=names, ties=ties.name)
    return replace(model, base_update=(made,)), recipe, ties


def worth_keeping(recipes: Sequence[Recipe], size: Callable[[str], int], dense: int) -> tuple[Recipe, ...]:
    """The youngest recipes, as long as what they name beside snapshots is below a dense size before the oldest one.

    Whoever is further behind is better off with the snapshot.

    Args:
        recipes: oldest first.
        size: hash to bytes.
        dense: bytes of a snapshot.
    """
    kept, named = list[Recipe](), set[str]()
    num_parts = 0
    for recipe in reversed(recipes):
        num_parts += len(recipe.parts)
        if sum(map(size, named)) >= dense or len(kept) == MAX_RECIPES or num_parts > MAX_PARTS:
            break
        kept.append(recipe)
        named |= recipe.fetched
    return tuple(reversed(kept))


# ── delivery ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Delivery:
    """What brings a client to a list of parts.

    Attributes:
        objects: hashes of what to send.
        recipes: how to make snapshots of these and of what it holds, oldest first.
        size: bytes of the objects.
    """

    objects: frozenset[str]
    recipes: tuple[Recipe, ...]
    size: int


def delivery(
    base_update: Sequence[str], held: Collection[str], recipes: Sequence[Recipe], size: Callable[[str], int]
) -> Delivery:
    """The cheaper of two: all parts that a client lacks; or, instead of the snapshot, what it lacks to make it.

    The way to make it begins at the youngest recipe that goes on from a snapshot that the client holds, or from none.

    Args:
        base_update: hashes of the list to come to.
        held: hashes of what the client holds.
        recipes: those there are, oldest first.
        size: hash to bytes.
    """
    lacking = {name for name in base_update if name not in held}
    whole = Delivery(frozenset(lacking), (), sum(map(size, lacking)))
    makers, way, wanted = {recipe.makes: recipe for recipe in recipes}, list[Recipe](), base_update[0:1]
    at = wanted[0] if wanted else None
    while at is not None and at not in held:
        if at not in makers:
            return whole
        way.insert(0, makers.pop(at))
        at = way[0].onto
    if not way:
        return whole
    objects = lacking - {*wanted} | {name for recipe in way for name in recipe.fetched if name not in held}
    made = Delivery(frozenset(objects), tuple(way), sum(map(size, objects)))
    return made if made.size < whole.size else whole
