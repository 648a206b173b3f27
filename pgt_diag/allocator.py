"""How the C library's allocator is set, for training on a CPU."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of mallopt(3): M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""
_TRIMMED_AT, _MAPPED_FROM = (1 << 31) - 1, 1 << 30


def keep_freed_memory() -> bool:
    """Have this process keep the memory that tensors free; return whether that could be set.

    An iteration frees as much as the next one takes. By default glibc gives large blocks back to
    the system at once, which then has to clear every page of them again.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _TRIMMED_AT) and mallopt(_MMAP_THRESHOLD, _MAPPED_FROM))
