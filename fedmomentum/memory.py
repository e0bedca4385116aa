"""How this process deals with memory that it has let go of."""

from __future__ import annotations

import ctypes

# glibc's names for them: how much freed memory at the end of the heap it keeps, and from which size on a block has a
# mapping of its own, which goes back with the block. 32 MB is the most that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT, MAPPED = 256 * 2**20, 32 * 2**20


def keep_freed_memory() -> None:
    """Have the C library keep up to `KEPT` bytes of freed memory for what comes next.

    By default it gives a tensor's memory back and gets the next one's page by page, with zeros: a fifth of what an
    aggregation takes. Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, KEPT)
    mallopt(_M_MMAP_THRESHOLD, MAPPED)
