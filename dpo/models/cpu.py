"""What a long run does with the memory of a processor: freed blocks serve the next step, kernels do not pile up.

And the number format that it is fast at, for configurations that do not know where they will run. Knows only the C
library, oneDNN and Lightning's precisions.
"""

import ctypes
import os

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
ONEDNN_CACHE_CAPACITY = 64  # more than one pass needs; oneDNN would keep 1,024


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


def limit_onednn_cache() -> None:
    """Bound oneDNN's kernels, of which products in bfloat16 get a new one for every length of a row.

    They hold gigabytes after some hundred steps. To be called before the first product; what the environment says wins.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # its own cache, and PyTorch's of it
        os.environ.setdefault(name, str(ONEDNN_CACHE_CAPACITY))


def bfloat16_where_fast() -> Precision:
    """Mixed bfloat16 where the CPU multiplies it natively (AVX512-BF16 or AMX), otherwise float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    rank_zero_info(
        f"Precision: {'bf16-mixed' if fast else '32-true'}, as this processor {'has' if fast else 'lacks'} bfloat16."
    )
    return MixedPrecision("bf16-mixed", "cpu") if fast else Precision()
