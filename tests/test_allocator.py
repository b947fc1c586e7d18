"""Freed memory is kept, or given back, as it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

FREED = """
import ctypes
from pathlib import Path
from ptft_hf import allocator


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


allocator.keep_freed_memory()
pieces = [bytearray(2**20) for _ in range(300)]
full = resident()
pieces = pieces[::100]  # so that what is freed lies between what is not
kept = resident()
allocator.give_back_freed_memory()
print(full - kept, full - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    fell, fell_in_all = map(float, done.stdout.split())
    assert fell < 20 and fell_in_all > 250  # of 300 MB
