"""What this machine has: free memory, within the limits that it sets to this process, and speed."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ptft_hf import records
from ptft_hf.errors import RecipeError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
         "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip
CGROUPS = Path("/sys/fs/cgroup")
KEPT_KERNELS = 1024
"""Products of which oneDNN keeps the code (its default ``ONEDNN_PRIMITIVE_CACHE_CAPACITY``)."""
_with_code = 0


def parse_size(text: str) -> int:
    """``16GiB``, ``500 MB`` or a plain number, in bytes.

    Raises:
        RecipeError: It is none, or not above zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    known = {unit.casefold(): size for unit, size in UNITS.items()}
    size = int(float(found[1]) * known[(found[2] or "").casefold()]) if found else 0
    if size <= 0:
        raise RecipeError(f"memory: {text!r} is no size; write it as 16GiB or 500MB")
    return size


def resident() -> int:
    """Bytes that this process holds in memory now; where the system does not tell, the most it has held so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return int(records.peak_memory_mb() * 1e6)
    import resource

    return pages * resource.getpagesize()


def new_kernels(products: int) -> int:
    """Half-precision products of a run that begins here, for which oneDNN will keep more code than it has already:
    that of earlier runs of this process is part of what it holds."""
    global _with_code
    found = min(products, KEPT_KERNELS - _with_code)
    _with_code += found
    return found


def available() -> int | None:
    """Bytes that this process may hold in all: what it has, and what is free. On a CUDA device, its free memory and
    what torch has of it; else the machine's, within the limits of control groups. None where it cannot be told."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()
    found = [size for size in (_free_of_machine(), *_free_of_groups()) if size is not None]
    return resident() + min(found) if found else None


def _free_of_machine(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _free_of_groups(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What is left in each control group with a limit that this process is in (version 2, or 1)."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in lines:
        names = ("memory.max", "memory.current", "inactive_file")
        base = root
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            names, base = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), root / "memory"
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place == base.parent:
                break
            if (free := _free_of_group(place, *names)) is not None:
                found.append(free)
    return found


def _free_of_group(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """The limit less what is used; the cache of files is given up when memory is needed."""
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        given_up = re.search(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        return None
    if not most.isdigit() or int(most) > 2**60:
        return None
    return max(0, int(most) - now + (int(given_up[1]) if given_up else 0))


# ---- speed ----


class Speed(NamedTuple):
    """What a run's steps are divided by."""

    flops: float
    """Floating-point operations a second of a large product of matrices."""
    bandwidth: float
    """Bytes a second that are read and written by a large sum."""


def speed(dtype: torch.dtype, device: torch.device, size: int = 1024) -> Speed:
    """Measured here, in a fifth of a second: the best of several tries each."""
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    long = torch.ones(2**24, device=device)

    def seconds(work: object) -> float:
        started = time.perf_counter()
        work()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    product = min(seconds(lambda: a @ b) for _ in range(5))
    moving = min(seconds(lambda: long.add_(1.0)) for _ in range(4))
    return Speed(2 * size**3 / product, 2 * long.numel() * long.element_size() / moving)
