"""What the benchmarks share: alternating timings, the machine in a line, tables and JSON."""

import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cli import pick_device

DEVICE = pick_device("auto")


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor() or platform.machine())


def machine() -> str:
    """The device, the threads of torch, versions."""
    device = getattr(torch.get_device_module(DEVICE), "get_device_name", processor)()
    versions = (
        f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    )
    return f"{device}, {torch.get_num_threads()} threads, {versions}"


def timed(function: Callable[[], object]) -> float:
    """Seconds until the device has done what `function` asks of it."""
    began = time.perf_counter()
    function()
    if DEVICE != "cpu":  # so far it may only be queued
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def alternate(
    functions: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each function, in turn A B C A B C …, so all see the machine alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            took = timed(function)
            if repetition:  # the first round warms up
                seconds[name].append(took)
    return seconds


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that `function` takes at its peak on the device, or of the process (Linux only)."""
    memory = torch.get_device_module(DEVICE)
    if hasattr(memory, "max_memory_allocated"):
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        function()
        return memory.max_memory_allocated() - before
    # Not ru_maxrss: a process inherits it from the one that started it.
    before = most_resident()
    function()
    return most_resident() - before


def most_resident() -> int:
    """The most memory, in bytes, that this process has had so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])


def spread(values: Sequence[float], unit: float = 1e-3) -> str:
    """Median and quartiles, in units of `unit` seconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle / unit:.1f} ({low / unit:.1f}–{high / unit:.1f})"


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> None:
    """Print a Markdown table and write it beside this file as JSON."""
    print(f"\n### {title}\n\n{machine()}. {note}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print(table_row(row))
    content = {"title": title, "machine": machine(), "note": note}
    content["rows"] = [dict(zip(columns, row, strict=True)) for row in rows]
    name = title.split(":")[0].replace(" ", "_").lower()
    directory = Path(__file__).parent / "results"
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.json").write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    )
