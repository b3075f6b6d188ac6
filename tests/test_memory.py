"""Freed memory is kept: no page of it is taken anew from the system."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from llama_fn.memory import keep_memory
kept = bool(int(sys.argv[1])) and keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: 16,384 pages of 4 KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(kept), [faults() for _ in range(5)][-1])  # an aligned tensor may not fit into the first one's place
"""


def run(keep: int) -> list[int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(keep)], capture_output=True, text=True, check=True)
    return list(map(int, done.stdout.split()))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library cannot be told to keep memory")
def test_a_tensor_takes_the_pages_of_one_before():
    kept, faults = run(1)
    assert kept and faults < 100 and run(0)[1] > 1000
