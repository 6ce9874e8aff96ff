"""Where the time of the digits chain goes: seconds of each script, by what it does."""

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from timing import show

import train_pbfgs
import train_psgd
import train_sgd
import utils

REPETITIONS = 3
COMMON = ["--datasets", "digits", "--arch", "resnet20"]
SUBSPACE = ["--params_end", "31", "--n_components", "20"]
CHAIN = {
    train_sgd: [*COMMON, "--epochs", "60"],
    train_pbfgs: [*COMMON, *SUBSPACE, "--epochs", "20"],
    train_psgd: [*COMMON, *SUBSPACE, "--epochs", "30", "--lr", "0.3"],
}
PHASES = {
    "load_data": "data",
    "make_model": "network",
    "load_trajectory": "open samples",
    "extract": "PCA, or saved basis",
    "train_epoch": "training",
    "evaluate": "testing",
    "save": "files",
}


def timed(function: Callable, seconds: Counter) -> Callable:
    """`function`, adding what it takes to seconds[its name]."""

    def call(*args, **kwargs) -> object:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[function.__name__] += time.perf_counter() - began

    return call


def once(script, options: list[str], save_dir: str) -> Counter:
    """Seconds of a script's phases, with its start and the whole."""
    seconds: Counter = Counter()
    began = time.perf_counter()
    command = [sys.executable, "-c", f"import {script.__name__}"]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    seconds["start"] = time.perf_counter() - began
    with contextlib.ExitStack() as patches:
        for name in PHASES:
            patches.enter_context(
                mock.patch.object(utils, name, timed(getattr(utils, name), seconds))
            )
        patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        began = time.perf_counter()
        script.main([*options, "--save-dir", save_dir])
    whole = time.perf_counter() - began + seconds["start"]
    seconds["rest"] = whole - seconds.total()
    return seconds + Counter(all=whole)


def main() -> None:
    """Print the table."""
    found: dict = {script: [] for script in CHAIN}
    for _ in range(REPETITIONS):
        with tempfile.TemporaryDirectory() as save_dir:
            for script, options in CHAIN.items():
                found[script].append(once(script, options, save_dir))
    rows = []
    for script, runs in found.items():
        phases = ("start", *PHASES, "rest", "all")
        middle = {name: statistics.median(run[name] for run in runs) for name in phases}
        low, high = min(run["all"] for run in runs), max(run["all"] for run in runs)
        row = [f"{seconds:.2f}" for seconds in middle.values()]
        row[-1] = f"{middle['all']:.1f} ({low:.1f}–{high:.1f})"
        share = f"{middle['train_epoch'] / middle['all']:.0%}"
        rows.append([script.__name__, *row, share])
    columns = ["script", "imports", *PHASES.values(), "rest", "all", "training"]
    note = f"Seconds, median (range) of {REPETITIONS} chains; ResNet-20, 60 + 20 + 30 epochs."
    show("chain: digits end to end", columns, rows, note)


if __name__ == "__main__":
    main()
