"""Whether freed memory is kept, as the kernel counts it."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from dpo.allocator import keep_freed_memory
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
