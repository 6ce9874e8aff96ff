"""What a step, the PCA and the data take on a GPU.

    ./run.sh gpu

runs tests/test_gpu.py and this, which writes report/gpu/README.md, a page to attach to a report. On
the CPU, or with --small, it takes seconds and its figures mean little. Nothing is downloaded.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import bench
import torch
from bench_step import Case
from common import (
    DEVICE,
    FAILED,
    RANDOM,
    Page,
    alternate,
    epochs,
    peak_memory,
    place,
    run,
    spread,
    timed,
)

from utils import DATASETS

OPTIONS = ("", "--tf32", "--channels-last", "--half", "--half --channels-last")


class Size(NamedTuple):
    """How much is measured."""

    arch: str
    images: int  # synthetic training images
    epochs: int  # of each timed run, whose first warms up
    batches: Mapping[int, Sequence[str]]  # size of a batch: engine options
    pca: Sequence[tuple[str, int, int]]  # arch, samples, k
    files: int  # image files that are streamed


SMALL = Size("resnet8", 64, 2, {32: ("--half",)}, [("resnet8", 6, 5)], 16)
FULL = Size(
    arch="resnet20",
    images=12_288,
    epochs=4,
    batches={1024: OPTIONS, 128: (*OPTIONS, "--compile", "--half --compile")},
    pca=[("resnet20", 81, 40), ("resnet18", 21, 20)],
    files=1024,
)


def bare_network(options: str, steps: int, epochs: int) -> list[dict]:
    """Seconds of epochs on one batch: forward, backward and torch's SGD, nothing else."""
    case = Case(options, 32)
    sgd = torch.optim.SGD(case.bare.parameters(), 0.01, 0.9)

    def epoch() -> None:
        for _ in range(steps):
            case.network()
            sgd.step()

    return [{"seconds": timed(epoch)} for _ in range(epochs)]


def steps(size: Size, batch: int, options: str, directory: Path) -> Iterator[list[str]]:
    """Milliseconds a step of the bare network, and of each method in its script."""
    same = f"--datasets CIFAR10 --arch {size.arch} --batch-size {batch} --epochs {size.epochs}"
    same += f" --overwrite {options}"
    count, network = size.images // batch, 0.0
    cases = {"bare network": partial(bare_network, same, count, size.epochs)}
    for method, own in (("SGD", "--lr 0.01"), ("P-SGD", RANDOM), ("P-BFGS", RANDOM)):
        cases[method] = partial(run, method, f"{same} {own}", place(method, directory))
    for name, case in cases.items():
        torch.compiler.reset()  # what was compiled before must not count
        gc.collect()
        rows, peak = peak_memory(case)
        seconds, warm_up = epochs([rows])
        ms = [1000 * value / count for value in seconds]
        median = statistics.median(ms)
        network = network or median
        trials = f"{1 + rows[-1]['trials']:.1f}" if name == "P-BFGS" else ""
        memory = "–" if DEVICE == "cpu" else f"{peak / 2**20:,.0f}"
        measured = [spread(ms, 2), f"{median / network:.2f}", trials, f"{warm_up:.1f}", memory]
        yield [f"{batch}", options or "float32", name, *measured]


def components(arch: str, samples: int, k: int, directory: Path) -> Iterator[list[str]]:
    """PCA of samples on disk, on the CPU and on the device."""
    directory.mkdir()
    n, bases = bench.write_trajectory(directory, arch, samples), {}
    own = "cpu" if DEVICE == "mps" else DEVICE  # where there is float64

    def work(device: str) -> None:
        bases[device] = bench.find_basis(device, directory, samples, k).cpu()

    calls = {device: partial(timed, partial(work, device)) for device in ("cpu", own)}
    seconds = alternate(calls, 3)
    times = [f"{statistics.median(seconds[device]):.2f}" for device in ("cpu", own)]
    cosines = torch.linalg.svdvals(bench.gram(bases["cpu"], bases[own]))
    angle, error = float((1 - cosines).abs().max()), bench.error(bases[own])
    result = "ok" if error <= 1e-6 and angle <= 1e-6 else FAILED
    yield [f"{samples}", f"{n:,}", f"{k}", *times, f"{error:.0e}", f"{angle:.0e}", result]


def tables(page: Page, size: Size, directory: Path) -> None:
    """Write all sections of the page."""
    columns = ["batch", "options", "step of", "ms", "× bare network", "trials", "warm-up s"]
    columns += ["peak MiB"]
    note = f"{size.arch}, k = 40, 32 × 32 synthetic images; median (range) of {size.epochs - 1} "
    note += f"epochs of {size.images:,} images after the first, which takes longer by the warm-up."
    cases = {
        f"batch {batch} {one}": partial(steps, size, batch, one, directory / f"{batch}{one}")
        for batch, each in size.batches.items()
        for one in each
    }
    page.table("Step", note, columns, cases)

    columns = ["T", "n", "k", "CPU s", f"{DEVICE} s", "‖PPᵀ − I‖", "1 − cos", "result"]
    note = "Samples on disk to basis, median of 3; cos is of the largest angle between the two."
    cases = {arch: partial(components, arch, *of, directory / arch) for arch, *of in size.pca}
    page.table("PCA", note, columns, cases)

    note = f"Augmented batches of 128 on {DEVICE}, median (range) of 3 epochs; {size.files:,} PNG."
    cases = {"in memory": partial(bench.in_memory, size.images, 3)}
    cases["streamed"] = partial(bench.streamed, size.files, 3, directory / "images")
    page.table("Data", note, bench.PIPELINE, cases)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns 1 where a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="as on the CPU: seconds, not minutes")
    parser.add_argument("--out", type=Path, default=Path("report/gpu"), metavar="DIR")
    args = parser.parse_args(argv)
    size = SMALL if args.small or DEVICE == "cpu" else FULL
    page = Page(args.out, "./run.sh gpu")
    cifar = bench.synthetic(size.images)
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(DATASETS, CIFAR10=cifar):
        tables(page, size, Path(directory))
    return page.end()


if __name__ == "__main__":
    sys.exit(main())
