"""Whether freed memory is kept, as the kernel counts it, what compiled products hold, and the fast number format."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from dpo.models.cpu import bfloat16_where_fast

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
from dpo.models.cpu import keep_few_kernels

def held():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024  # MiB

if sys.argv[1] == "few":
    keep_few_kernels()
x, weight = torch.randn(1000, 512, dtype=torch.bfloat16), torch.randn(2048, 512, dtype=torch.bfloat16)
torch.mm(x, weight.t())
before = held()
for rows in range(400, 800):
    torch.mm(x[:rows], weight.t())
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not BF16, reason="this processor has no bfloat16 products, so no kernels are made for them")
def test_products_of_ever_new_lengths_hold_no_more_and_more_memory() -> None:
    here = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    few, all_of_them = (
        int(subprocess.check_output([sys.executable, "-c", GROWTH, mode], env=here | {"OMP_NUM_THREADS": "1"}))
        for mode in ("few", "all")
    )
    assert few < all_of_them / 3, f"{few} and {all_of_them} MiB"


@pytest.mark.parametrize(("avx", "amx"), [(True, False), (False, True), (False, False)])
def test_bfloat16_only_where_the_processor_multiplies_it(avx: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    plugin = bfloat16_where_fast()
    assert type(plugin) is (MixedPrecision if avx or amx else Precision)
