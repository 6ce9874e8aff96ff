"""What to run once on a GPU: does it compute what the CPU does, and what does a step take?

    ./run.sh gpu

takes about ten minutes and writes report/gpu/README.md, a page to attach to a report. On the CPU,
or with --small, it takes seconds and its figures mean little. Nothing is downloaded.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import checks
import torch
import torch.nn.functional as F
from bench_engine import write_images
from bench_pca import gram, write_trajectory
from checks import RANDOM, run
from page import FAILED, Page, environment
from timing import DEVICE, alternate, peak_memory, timed

import train_sgd
from cli import parse_args
from network import build_model
from utils import DATASETS, Dataset, Split, load_data, load_samples, pca

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


def synthetic(size: Size) -> Dataset:
    """Random images and labels in the place of CIFAR-10's."""

    def read(args: argparse.Namespace, train: bool) -> Split:
        torch.manual_seed(train)
        count = size.images if train else 128
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        return Split(images, torch.randint(10, (count,)), list("0123456789"))

    return DATASETS["CIFAR10"]._replace(read=read)


def bare_network(options: str) -> list[dict]:
    """Seconds of each epoch, on one batch: forward, backward and torch's SGD, nothing else."""
    args = parse_args(train_sgd.get_options(), options.split())
    data = load_data(args)
    model = build_model(args, data).train()
    if args.compile:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum)
    images, labels = next(data.train.epoch())

    def epoch() -> None:
        for _ in range(len(data.train) // args.batch_size):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=args.half):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

    return [{"seconds": timed(epoch)} for _ in range(args.epochs)]


def with_peak(function: Callable[[], list[dict]]) -> tuple[list[dict], str]:
    """What `function` returns, and the memory in MiB that it takes at its peak on the device."""
    torch.compiler.reset()  # what was compiled before must not count
    gc.collect()
    if not hasattr(torch.get_device_module(DEVICE), "max_memory_allocated"):
        return function(), "–"
    found = []
    peak = peak_memory(lambda: found.append(function()))
    return found[0], f"{peak / 2**20:,.0f}"


def steps(size: Size, batch: int, options: str, directory: Path) -> Iterator[list[str]]:
    """Milliseconds a step of the bare network, and of each method in its script."""
    same = f"--datasets CIFAR10 --arch {size.arch} --batch-size {batch} --epochs {size.epochs}"
    same += f" --overwrite {options}"
    cases = {"bare network": partial(bare_network, f"{same} --lr 0.01")}
    for method, own in (("SGD", "--lr 0.01"), ("P-SGD", RANDOM), ("P-BFGS", RANDOM)):
        cases[method] = partial(run, method, f"{same} {own}", directory)
    network = 0.0
    for name, case in cases.items():
        rows, peak = with_peak(case)
        first, *ms = (1000 * batch / size.images * row["seconds"] for row in rows)
        median = statistics.median(ms)
        network = network or median
        time = f"{median:.2f} ({min(ms):.2f}–{max(ms):.2f})"
        warmup = f"{(first - median) / 1000 * size.images / batch:.1f}"
        trials = f"{1 + rows[-1]['trials']:.1f}" if name == "P-BFGS" else ""
        ratio = f"{median / network:.2f}"
        yield [f"{batch}", options or "float32", name, time, ratio, trials, warmup, peak]


def components(directory: Path, arch: str, samples: int, k: int) -> Iterator[list[str]]:
    """PCA of samples on disk, on the CPU and on the device."""
    directory.mkdir()
    n, bases = write_trajectory(directory, arch, samples), {}
    own = "cpu" if DEVICE == "mps" else DEVICE  # where there is float64

    def work(device: str) -> None:
        bases[device] = pca(load_samples(directory, 0, samples), k, device=device)[0].cpu()

    seconds = alternate({device: partial(work, device) for device in ("cpu", own)}, 3)
    times = [f"{statistics.median(seconds[device]):.2f}" for device in ("cpu", own)]
    error = float((gram(bases[own]) - torch.eye(k)).abs().max())
    cosines = torch.linalg.svdvals(gram(bases["cpu"], bases[own]))
    angle = float((1 - cosines).abs().max())
    result = "ok" if error <= 1e-6 and angle <= 1e-6 else FAILED
    yield [f"{samples}", f"{n:,}", f"{k}", *times, f"{error:.0e}", f"{angle:.0e}", result]


def pipelines(files: int, directory: Path) -> Iterator[list[str]]:
    """Training images a second from memory, and streamed from files."""
    write_images(directory, files, side=256)
    for name, options in (
        ("32 × 32, in memory", "--datasets CIFAR10"),
        ("224 × 224, streamed", "--datasets ImageFolder --image-size 224"),
    ):
        argv = [*options.split(), "--data-dir", str(directory)]
        loader = load_data(parse_args(train_sgd.get_options(), argv)).train
        seconds = alternate({"": lambda loader=loader: [None for _ in loader.epoch()]}, 3)[""]
        high, middle, low = (
            f"{len(loader) / of(seconds):,.0f}" for of in (min, statistics.median, max)
        )
        yield [name, f"{middle} ({low}–{high})"]


def measure(page: Page, size: Size, directory: Path) -> None:
    """Write all sections of the page."""
    options = dict.fromkeys(["", *(one for each in size.batches.values() for one in each)])
    cases = {f"precision {one}": partial(checks.precision, one) for one in options}
    cases["training"] = partial(checks.training, directory)
    if size is FULL:
        cases["digits"] = partial(checks.digits, directory / "digits")
    if DEVICE == "cuda":
        same = f"--datasets CIFAR10 --arch {size.arch} --batch-size {size.images // 8}"
        cases["host syncs"] = partial(checks.host_syncs, same, directory / "syncs")
    note = f"{DEVICE} against the CPU: ResNet-8 on digits, with `--deterministic` where it trains."
    page.table("Checks", note, ["check", "CPU", DEVICE, "difference", "allowed", "result"], cases)

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
    cases = {arch: partial(components, directory / arch, arch, *of) for arch, *of in size.pca}
    page.table("PCA", note, columns, cases)

    note = f"Augmented batches of 128 on {DEVICE}, median (range) of 3 epochs; {size.files:,} PNG."
    cases = {"data": partial(pipelines, size.files, directory / "images")}
    page.table("Data", note, ["pipeline", "images/s"], cases)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="as on the CPU: seconds, not minutes")
    parser.add_argument("--out", type=Path, default=Path("report/gpu"), metavar="DIR")
    args = parser.parse_args(argv)
    # cuBLAS reads it once, and --deterministic needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    size, began = SMALL if args.small or DEVICE == "cpu" else FULL, time.perf_counter()
    page = Page(args.out)
    page.line(f"# `./run.sh gpu` on {DEVICE}\n")
    for line in environment():
        page.line(f"* {line}")
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.dict(DATASETS, CIFAR10=synthetic(size)),
    ):
        measure(page, size, Path(directory))
    page.line(f"\n{page.failed} failed; {time.perf_counter() - began:.0f} s.")
    return int(page.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
