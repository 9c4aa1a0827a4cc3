"""Keep the C heap from holding what was freed: for moments that allocate and free large blocks once.

glibc serves blocks below its mmap threshold from the heap and raises the threshold (up to 32 MiB) as blocks are freed;
long-lived tensors of changing size then leave holes that never go back. While `returning_large_blocks` is active,
blocks from 64 KiB on are mapped, and go back to the system when they are freed (mallopt(3)).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_SMALL = 64 * 1024
_LARGEST = 32 * 1024 * 1024  # where glibc's own adjustment ends on 64-bit systems


@contextmanager
def returning_large_blocks() -> Iterator[None]:
    """Map large blocks while active; afterwards heap again, as glibc would have settled by itself.

    Does nothing with another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST)
