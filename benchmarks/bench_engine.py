"""What the engine options do: train_sgd.py on 32 × 32 random images, images a second with each."""

import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

from bench_data import synthetic
from checks import run
from page import Page
from timing import alternate, in_process, spread

from utils import DATASETS

OPTIONS = ("--no-channels-last", "--channels-last", "--threads 1", "--deterministic", "--half")
COMPILED = ("--compile", "--half --compile")


def epochs(runs: Sequence[Sequence[Mapping]]) -> tuple[list[float], float]:
    """Seconds of the epochs after the first of each run, and how much longer the first takes."""
    seconds = [row["seconds"] for rows in runs for row in rows[1:]]
    first = statistics.median(rows[0]["seconds"] for rows in runs)
    return seconds, first - statistics.median(seconds)


def train(images: int, options: str) -> list[dict]:
    """Metrics of a run; its compiler cache is empty, so that its first epoch has to compile."""
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=f"{directory}/cache"),
        mock.patch.dict(DATASETS, CIFAR10=synthetic(images)),
    ):
        return run("SGD", f"--datasets CIFAR10 {options}", Path(directory, "save"))


def compare(
    arch: str = "resnet20", images: int = 1024, options: Sequence[str] = OPTIONS,
    compiled: Sequence[str] = COMPILED
) -> Iterator[list[str]]:  # fmt: skip
    """Each option in processes of its own."""
    same = f"--arch {arch} --epochs 3"
    calls = {one: partial(in_process, train, images, f"{same} {one}") for one in options}
    runs = alternate(calls, 2, warm_up=0)
    for one in compiled:  # half a minute of compiling is enough once
        runs[one] = [in_process(train, images, f"{same} {one}")]
    baseline = statistics.median(epochs(runs[options[0]])[0])
    for one, rows in runs.items():
        seconds, extra = epochs(rows)
        ratio = baseline / statistics.median(seconds)
        rates = spread([images / value for value in seconds])
        yield [f"`{one}`", rates, f"{ratio:.2f}", f"{extra:.1f}"]


def tables(page: Page) -> None:
    """Write the table."""
    columns = ["train_sgd.py with", "images/s", "× the first", "first epoch takes longer by s"]
    note = "resnet20, batch 128, median (range) of epochs of 1,024 images."
    page.table("engine: 32 × 32 pixels", note, columns, {"engine": compare})
