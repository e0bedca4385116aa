"""A round's updates on disk: written as they arrive, read by memory map one module at a time.

So the server's memory does not grow with the number of clients. The files are a round's scratch: they are not synced
to disk, nothing that is kept names them, and what a killed server leaves of them is swept up when it starts again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fedmomentum.adapter import Adapter
from fedmomentum.files import safetensors_bytes
from fedmomentum.lowrank import LowRank


class Spool:
    """A folder of updates.

    Args:
        folder: made when the first update comes; what it holds from an earlier process is deleted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, count()
        self.clear()

    def put(self, adapter: Adapter) -> Adapter:
        """Write an adapter's tensors; the same adapter with nothing in memory: each look reads from the file.

        Raises:
            OSError: the disk is full.
        """
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"{next(self._numbers):06d}.safetensors"
        factors = {f"{m}.{kind}": getattr(matrix, kind) for m, matrix in adapter.modules.items() for kind in "BA"}
        saved = {f"{name}.saved": tensor for name, tensor in adapter.saved.items()}
        file.write_bytes(safetensors_bytes({**factors, **saved}))
        return replace(
            adapter, modules=_Factors(file, tuple(adapter.modules)), saved=_Saved(file, tuple(adapter.saved))
        )

    def clear(self) -> None:
        """Delete all updates."""
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class _OnDisk(Mapping[str, Any]):
    """Names to what a file holds. Every look maps the file anew and lets go of it with the tensors it gave."""

    file: Path
    names: tuple[str, ...]
    known: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", frozenset(self.names))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.known  # without reading

    def _read(self, name: str, *kinds: str) -> list[Tensor]:
        if name not in self.known:
            raise KeyError(name)
        with safe_open(self.file, framework="pt") as opened:
            return [opened.get_tensor(f"{name}.{kind}") for kind in kinds]


class _Factors(_OnDisk):
    def __getitem__(self, module: str) -> LowRank:
        return LowRank(*self._read(module, "B", "A"))


class _Saved(_OnDisk):
    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, "saved")[0]
