"""What a long run does with the memory of a processor: freed blocks serve the next step, kernels do not pile up.

Knows only the C library and oneDNN.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
KERNELS = 64  # more than one pass needs; oneDNN would keep 1,024


def keep_freed_memory() -> None:
    """Have malloc keep what is freed until the process ends. Where the C library cannot, nothing changes.

    By default glibc gives every large block back to the kernel, which zeroes each page of it when it hands it out
    again, in every training step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: musl, macOS, Windows
        return
    mallopt(M_MMAP_MAX, 0)  # no block is a mapping of its own
    mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks
    mallopt(M_TOP_PAD, 2**26)  # and grows by 64 MiB at a time


def keep_few_kernels() -> None:
    """Bound oneDNN's kernels, of which products in bfloat16 get a new one for every length of a row.

    They hold gigabytes after some hundred steps. To be called before the first product; what the environment says wins.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # its own cache, and PyTorch's of it
        os.environ.setdefault(name, str(KERNELS))
