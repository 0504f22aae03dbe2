"""The memory that one step frees serves the next one.

Knows only the C library. By default glibc gives every large block back to the kernel, which zeroes each page of it when
it hands it out again, in every training step.
"""

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have malloc keep what is freed until the process ends. Where the C library cannot, nothing changes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: musl, macOS, Windows
        return
    mallopt(M_MMAP_MAX, 0)  # no block is a mapping of its own
    mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks
    mallopt(M_TOP_PAD, 2**26)  # and grows by 64 MiB at a time
