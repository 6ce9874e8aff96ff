"""How the benchmarks measure: seconds in turn, peak memory, in this process or one of its own."""

import math
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from cli import pick_device

DEVICE = pick_device("auto")


def timed(function: Callable[[], object]) -> float:
    """Seconds until the device has done what `function` asks of it."""
    began = time.perf_counter()
    function()
    if DEVICE != "cpu":  # so far it may only be queued
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def alternate(
    functions: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list]:
    """What each function returns, in turn A B C A B C …, so all see the machine alike."""
    results: dict[str, list] = {name: [] for name in functions}
    for _ in range(warm_up + rounds):
        for name, function in functions.items():
            results[name].append(function())
    return {name: values[warm_up:] for name, values in results.items()}


def in_process(function: Callable, *arguments: Any) -> Any:
    """What `function` returns in a process of its own; what it prints goes to stderr."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=os.dup2, initargs=(2, 1)) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(function: Callable[[], Any]) -> tuple[Any, float]:
    """What `function` returns, and the bytes it takes at its peak on the device, or in a process
    that did nothing before.
    """
    memory = torch.get_device_module(DEVICE)
    if hasattr(memory, "max_memory_allocated"):
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        return function(), memory.max_memory_allocated() - before
    before = most_resident()
    return function(), most_resident() - before


def most_resident() -> float:
    """The most memory, in bytes, that this process has had so far; only Linux tells."""
    # Not ru_maxrss: a process inherits it from the one that started it.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else math.nan


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and range."""
    numbers = statistics.median(values), min(values), max(values)
    middle, low, high = (f"{number:,.{digits}f}" for number in numbers)
    return f"{middle} ({low}–{high})"
