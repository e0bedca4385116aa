"""A round's updates on disk: written as they arrive, memory-mapped and read module by module.

So the server's memory does not grow with the number of clients. They are scratch files: not synced
to disk, not referenced by anything that is kept, and if the server is killed, deleted when it
starts again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from fedmomentum.linalg.low_rank import LowRank
from fedmomentum.utils.tensors import safetensors_bytes

if TYPE_CHECKING:
    from fedmomentum.lora.adapter import Adapter


NUM_OPEN = 8
"""How many files stay mapped. In a small federation, each file is opened only once, which is most
of the cost of reading. In a large one they are reopened, so that handles and memory stay bounded.
"""


class UpdateStore:
    """A directory of updates.

    Args:
        directory: Created with the first update; what an earlier process left in it is deleted.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = count()
        # Cache tensors, too: getting one from a mapped file takes as long as a small product with
        # it.
        self._opened = lru_cache(NUM_OPEN)(
            lambda file: cache(safe_open(file, framework="pt").get_tensor)
        )
        self.clear()

    def put(self, adapter: Adapter) -> Adapter:
        """Write an adapter's tensors, and return an adapter that reads them from disk on access.

        Raises:
            OSError: If the disk is full.
        """
        # One file per client: factors and fully trained tensors.
        tensors = {f"{name}.saved": tensor for name, tensor in adapter.saved.items()}
        for module, matrix in adapter.modules.items():
            tensors[f"{module}.B"] = matrix.B
            tensors[f"{module}.A"] = matrix.A
        file = self._write(tensors)
        return replace(
            adapter,
            modules=_Factors(file, self._opened, tuple(adapter.modules)),
            saved=_Saved(file, self._opened, tuple(adapter.saved)),
        )

    def put_tensors(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Write tensors, and return them by name, read from the file on access.

        Raises:
            OSError: If the disk is full.
        """
        if not tensors:
            return {}
        return _Tensors(self._write(tensors), self._opened, tuple(tensors))

    def _write(self, tensors: Mapping[str, Tensor]) -> Path:
        self._directory.mkdir(exist_ok=True)
        file = self._directory / f"{next(self._numbers):06d}.safetensors"
        file.write_bytes(safetensors_bytes(tensors))
        return file

    def clear(self) -> None:
        """Delete all updates."""
        self._opened.cache_clear()
        shutil.rmtree(self._directory, ignore_errors=True)


@dataclass(frozen=True)
class _OnDisk(Mapping[str, Any]):
    """A mapping of names to a file's tensors, which are views of the mapped file, not copies."""

    file: Path
    opened: Callable[[Path], Callable[[str], Tensor]] = field(repr=False)
    names: tuple[str, ...]
    known: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", frozenset(self.names))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.known  # without reading the file

    def _read(self, name: str, *kinds: str) -> list[Tensor]:
        if name not in self.known:
            raise KeyError(name)
        return [self.opened(self.file)(f"{name}.{kind}") for kind in kinds]


class _Factors(_OnDisk):
    def __getitem__(self, module: str) -> LowRank:
        return LowRank(*self._read(module, "B", "A"))


class _Saved(_OnDisk):
    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, "saved")[0]


class _Tensors(_OnDisk):
    def __getitem__(self, name: str) -> Tensor:
        if name not in self.known:
            raise KeyError(name)
        return self.opened(self.file)(name)
