"""Memory that is kept after it was freed, memory of compiled matrix products, and bfloat16 where it is fast."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from dpo.models.cpu import ONEDNN_CACHE_CAPACITY, bfloat16_where_fast

BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

FAULTS = """
import resource, sys, torch
from dpo.models.cpu import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for step in range(20):  # the heap finds its shape in the first few
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**24) for _ in range(6)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told to keep memory")
def test_blocks_that_are_freed_and_wanted_again_cost_no_new_pages() -> None:
    pages = 6 * 2**24 * 4 // 4096  # of six tensors of 64 MiB
    assert faults("kept") < pages / 10 < pages <= faults("given back")


GROWTH = """
import sys, torch
from pathlib import Path
from dpo.models.cpu import limit_onednn_cache

def held():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024  # MiB

if sys.argv[1] == "limited":
    limit_onednn_cache()
x, weight = torch.randn(1000, 512, dtype=torch.bfloat16), torch.randn(2048, 512, dtype=torch.bfloat16)
torch.mm(x, weight.t())
before = held()
for rows in range(400, 800):
    torch.mm(x[:rows], weight.t())
    if rows in (599, 799):
        print(held() - before)
"""


def growth(mode: str) -> tuple[float, float]:
    """Memory in MiB that products of 200 and of 400 different lengths hold."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    # Every kernel (about 1 MiB) is a mapping of its own, which goes back to the system when the kernel is dropped: what
    # is measured is what is held. Otherwise it would be how freed kernels fragment the heap, which is several times as
    # much and differs between processors.
    env |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "16384"}
    output = subprocess.check_output([sys.executable, "-c", GROWTH, mode], env=env, text=True)
    first, second = map(float, output.split())
    return first, second


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads /proc and sets an option of glibc's malloc")
@pytest.mark.skipif(not BF16, reason="this processor has no bfloat16 products, so no kernels are made for them")
def test_no_more_kernels_are_held_than_the_limit_however_many_lengths() -> None:
    """Unlimited, memory grows by a kernel per length; limited, it is that of 64 kernels and then stays."""
    first, second = growth("unlimited")
    kernel = (second - first) / 200
    assert second > 350 * kernel, "the kernels of all 400 lengths are held"
    limited_first, limited_second = growth("limited")
    assert limited_second < 1.25 * ONEDNN_CACHE_CAPACITY * kernel, f"{limited_second} MiB, of {kernel} a kernel"
    assert limited_second - limited_first < 4 * kernel, "200 more lengths take no more memory"


@pytest.mark.parametrize(("avx", "amx"), [(True, False), (False, True), (False, False)])
def test_bfloat16_only_where_the_processor_multiplies_it(avx: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    plugin = bfloat16_where_fast()
    assert type(plugin) is (MixedPrecision if avx or amx else Precision)
