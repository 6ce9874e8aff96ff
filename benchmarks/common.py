"""What bench.py and gpu.py share: times, peak memory, and the page of tables."""

import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import train_pbfgs
import train_psgd
import train_sgd
from training.records import git_commit
from training.run import Run
from training.setup import pick_device

ROOT = Path(__file__).parent.parent
DEVICE = pick_device("auto")
FAILED = "**failed**"
METHODS = {"SGD": train_sgd, "P-SGD": train_psgd, "P-BFGS": train_pbfgs}
RANDOM = "--basis random --n_components 40 --params_end 1"  # needs no trajectory

Rows = Callable[[], Iterator[Sequence[str]]]  # of a table


def place(method: str, directory: Path, part: str = "") -> Path:
    """Where a run is: those in a subspace are in the directory of SGD's, with the trajectory."""
    return directory / f"SGD{part}" if method == "SGD" else directory / "SGD" / f"{method}{part}"


def run(method: str, options: str, directory: Path) -> list[dict]:
    """The metrics rows of a script's run in its `place`."""
    save_dir, own = directory, []
    if method != "SGD":
        save_dir, own = directory.parent, ["--run", directory.name]
    METHODS[method].main([*options.split(), *own, "--save-dir", str(save_dir)])
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps_of(method: str, options: str, directory: Path, events: list) -> list[tuple[int, list]]:
    """The trials of each step of a run, and what the step added to `events`.

    Not of the first step, which makes the optimizer's state, nor of the last, which looks whether
    the loss is finite.
    """
    steps, log = [], Run.log

    def logged(self: Run, *args: Any, **details: Any) -> None:
        log(self, *args, **details)
        steps.append((1 + details.get("trials", -1), list(events)))  # the last is not rejected
        events.clear()

    with mock.patch.object(Run, "log", logged):
        run(method, f"{options} --print-freq 1000", directory)
    return steps[1:-1]


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


def epochs(runs: Sequence[Sequence[Mapping]]) -> tuple[list[float], float]:
    """Seconds of the epochs after the first of each run, and how much longer the first takes."""
    seconds = [row["seconds"] for rows in runs for row in rows[1:]]
    first = statistics.median(rows[0]["seconds"] for rows in runs)
    return seconds, first - statistics.median(seconds)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median and range."""
    numbers = statistics.median(values), min(values), max(values)
    middle, low, high = (f"{number:,.{digits}f}" for number in numbers)
    return f"{middle} ({low}–{high})"


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor() or platform.machine())


def machine() -> str:
    """The device, the threads of torch, versions."""
    device = getattr(torch.get_device_module(DEVICE), "get_device_name", processor)()
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    python = platform.python_version()
    return f"{device}, {torch.get_num_threads()} threads, Python {python}, {versions}"


def environment() -> Iterator[str]:
    """Hardware and versions, an item each."""
    yield machine()
    if DEVICE == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        yield (
            f"GPU 0 of {torch.cuda.device_count()}: {gpu.total_memory / 2**30:.0f} GiB, compute "
            f"capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors; "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
        query = "--query-gpu=driver_version,power.limit,memory.used,utilization.gpu"
        with contextlib.suppress(OSError):
            command = ["nvidia-smi", query, "--format=csv"]
            done = subprocess.run(command, capture_output=True, text=True)
            yield "nvidia-smi, before anything ran: " + "; ".join(done.stdout.splitlines())
    yield f"{processor()}, {os.cpu_count()} cores; {platform.platform()}"
    yield f"commit {git_commit() or 'unknown'}; {time.strftime('%Y-%m-%d')}"


class Page:
    """A Markdown page, printed and on the disk line by line: what fails later leaves it there."""

    def __init__(self, directory: Path, command: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.terminal = directory, sys.stdout
        files = (directory / name for name in ("README.md", "log.txt"))
        self.file, self.log = (file.open("w", buffering=1, encoding="utf-8") for file in files)
        self.failed, self.began = 0, time.perf_counter()
        self.line(f"# `{command}` on {DEVICE}\n")
        for item in environment():
            self.line(f"* {item}")

    def line(self, text: str) -> None:
        """Write a line."""
        for stream in (self.terminal, self.file):
            print(text, file=stream, flush=True)

    def table(
        self, title: str, note: str, columns: Sequence[str], cases: Mapping[str, Rows]
    ) -> None:
        """Write a table with the rows of each case, the last of which may be how it failed."""
        self.line(f"\n## {title}\n\n{note}\n\n| {' | '.join(columns)} |")
        self.line("| " + " | ".join(["---"] * len(columns)) + " |")
        rows = []
        for name, case in cases.items():
            with contextlib.redirect_stdout(self.log):
                for cells in self.attempt(name, case):
                    self.failed += any(FAILED in cell for cell in cells)
                    rows.append([*cells, *[""] * (len(columns) - len(cells))])
                    self.line(f"| {' | '.join(rows[-1])} |")
        content = {"title": title, "machine": machine(), "note": note}
        content["rows"] = [dict(zip(columns, row, strict=True)) for row in rows]
        file = self.directory / f"{title.split(':')[0].replace(' ', '_').lower()}.json"
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def attempt(self, name: str, case: Rows) -> Iterator[Sequence[str]]:
        """The rows of a case; an error becomes one."""
        try:
            yield from case()
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code > 128:  # Ctrl-C and other signals
                raise
            traceback.print_exc(file=self.log)
            cause = (isinstance(error, SystemExit) and error.__context__) or error
            text = f"{type(cause).__name__}: {cause}".replace("|", "\\|")
            yield [f"{name}: {FAILED}, {' '.join(text.split()[:40])}"]

    def end(self) -> int:
        """Write the last line; returns the exit code, 1 where something failed."""
        seconds = time.perf_counter() - self.began
        self.line(f"\n{self.failed} failed; {seconds:.0f} s.")
        return int(self.failed > 0)
