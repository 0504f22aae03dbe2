"""Memory of training, and its number format on a CPU.

Freed memory is kept for the next step, oneDNN's compiled kernels do not pile up, and a configuration can ask for
bfloat16 wherever the processor multiplies it natively.
"""

import ctypes
import os

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
ONEDNN_CACHE_CAPACITY = 64  # kernels; one pass needs fewer, and oneDNN would keep 1,024


def keep_freed_memory() -> None:
    """Have malloc keep freed memory until the process ends; does nothing if the C library is not glibc.

    By default glibc returns every large block to the kernel, which zeroes each page when it hands it out again, in
    every training step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    mallopt(M_MMAP_MAX, 0)  # no block is a mapping of its own
    mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks
    mallopt(M_TOP_PAD, 2**26)  # and grows by 64 MiB at a time


def limit_onednn_cache() -> None:
    """Limit how many compiled kernels oneDNN and PyTorch keep; must run before the first matrix product.

    Products in bfloat16 get a new kernel for every length of a row, which add up to gigabytes within some hundred
    steps. Limits that the environment sets already win.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own cache, and PyTorch's of it
        os.environ.setdefault(name, str(ONEDNN_CACHE_CAPACITY))


def grow_cuda_segments() -> None:
    """Let CUDA's memory grow in place, as rows of ever new lengths would fragment it; must run before CUDA is used.

    What the environment sets already wins. Without CUDA it does nothing.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name before torch 2.9, which still counts
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def bfloat16_where_fast() -> Precision:
    """Return mixed bfloat16 if the CPU multiplies it natively (AVX512-BF16 or AMX), otherwise float32."""
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    rank_zero_info(
        f"Precision: {'bf16-mixed' if fast else '32-true'}, as this processor {'has' if fast else 'lacks'} native "
        "bfloat16."
    )
    return MixedPrecision("bf16-mixed", "cpu") if fast else Precision()
