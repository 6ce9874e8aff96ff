"""How much memory there is, and whether a basis fits into it."""

import contextlib
import math
import os
import re
from pathlib import Path

import torch


def free_memory(device: str) -> float:
    """Bytes that are still free on the device; infinite where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type != "cpu":
        return math.inf
    free = math.inf
    with contextlib.suppress(OSError, TypeError):
        found = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        free = 1024 * int(found[1])
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, where it has one
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())
        free = min(free, limit - used + int(cached[1]))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # the machine's processes share it


def check_memory(needed: float, what: str, device: str, cure: str) -> None:
    """ValueError where `what` needs more bytes than are free; `cure` says what would fit."""
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"{what} take {size_text(needed)}, {size_text(free)} are free on {device}; "
            f"allowed: {cure}"
        )


def size_text(size: float) -> str:
    """Bytes, in the largest unit that gives at least 1."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def check_basis_memory(k: int, n: int, dtype: torch.dtype, device: str) -> None:
    """ValueError for a basis (k, n) that is larger than the memory there is."""
    row = n * dtype.itemsize
    what = f"{k} directions of {n:,} parameters in {dtype}"
    check_memory(k * row, what, device, f"{free_memory(device) // row:.0f} directions")
