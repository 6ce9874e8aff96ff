"""The tables of README.md, on any device: ./run.sh bench writes them to report/bench."""

import argparse
import inspect
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import bench_step
import numpy as np
import torch
import torchvision.transforms as T
from common import (
    DEVICE,
    ROOT,
    Page,
    alternate,
    epochs,
    in_process,
    peak_memory,
    place,
    run,
    spread,
    steps_of,
    timed,
)
from PIL import Image
from sklearn.decomposition import PCA
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10

import models
import utils
from dldr.parameters import parameter_names
from training.files import save
from training.metrics import Epoch
from utils import DATASETS, Split

# ----------------------------------------------------------------------------- data pipelines

BATCH = 128
PIPELINE = ["pipeline", "images/s", "× the first"]


def synthetic(images: int) -> utils.Dataset:
    """Random images and labels in the place of CIFAR-10's."""

    def read(args: argparse.Namespace | None, train: bool) -> Split:
        torch.manual_seed(train)
        count = images if train else 128
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        return Split(pixels, torch.randint(10, (count,)), list("0123456789"))

    return DATASETS["CIFAR10"]._replace(read=read)


def rates(
    pipelines: Mapping[str, Callable[[], Iterable]], images: int, count: int
) -> Iterator[list[str]]:
    """Images a second of each pipeline in so many epochs, and how often the first's that is."""
    calls = {
        name: partial(timed, lambda epoch=epoch: [None for _ in epoch()])
        for name, epoch in pipelines.items()
    }
    seconds = alternate(calls, count)
    first = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        ratio = f"{first / statistics.median(values):.1f}"
        yield [name, spread([images / value for value in values]), ratio]


def in_memory(images: int, count: int) -> Iterator[list[str]]:
    """CIFAR's size, on the device as a whole, against torchvision's pipeline."""
    split, dataset = synthetic(images).read(None, True), DATASETS["CIFAR10"]
    ours = utils.TensorLoader(split, dataset, BATCH, DEVICE, seed=1)
    theirs = CIFAR10.__new__(CIFAR10)  # without its files
    theirs.data, theirs.targets = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
    augment = [T.RandomHorizontalFlip(), T.RandomCrop(32, 4), T.ToTensor()]
    theirs.transform = T.Compose([*augment, T.Normalize(dataset.mean, dataset.std)])
    theirs.target_transform = None
    loader = DataLoader(theirs, BATCH, shuffle=True, num_workers=2)
    pipelines = {"PIL, DataLoader, 2 workers": loader.__iter__, "in memory, batched": ours.epoch}
    yield from rates(pipelines, images, count)


def streamed(images: int, count: int, directory: Path) -> Iterator[list[str]]:
    """ImageNet's size, from files that are written here."""
    directory.mkdir()
    files = [str(directory / f"{number}.png") for number in range(images)]
    random = np.random.default_rng(0)
    for file in files:
        Image.fromarray(random.integers(256, size=(256, 256, 3), dtype=np.uint8)).save(file)
    split = Split(files, torch.zeros(images, dtype=torch.long), [])
    settings = {"seed": 1, "size": 224, "workers": 4}
    loader = utils.FileLoader(split, DATASETS["ImageNet"], BATCH, DEVICE, **settings)
    yield from rates({"224 × 224, streamed": loader.epoch}, images, count)


def data(page: Page) -> None:
    """Write the table of data pipelines."""
    note = "Median (range) of 5 alternating epochs, 10,000 images."
    cases = {"data": partial(in_memory, 10_000, 5)}
    page.table("data: flip, pad 4, crop, normalize", note, PIPELINE, cases)


# --------------------------------------------------------------------------------------- PCA


def write_trajectory(directory: Path, arch: str, samples: int) -> int:
    """Samples 0.pt … of a random walk with shrinking steps in `directory`; returns n."""
    torch.manual_seed(0)
    model = models.build(arch, 10)
    for number in range(samples):
        save(directory / f"{number}.pt", model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) / (10 + number)
    return utils.flatten(model).numel()


def find_basis(method: str, directory: Path, samples: int, k: int) -> torch.Tensor:
    """The basis (k, n) of samples on disk, by utils.pca on a device or scikit-learn's solver."""
    states = utils.load_samples(directory, 0, samples)
    names = parameter_names(states[0])
    if not method.startswith("scikit-learn"):
        device = DEVICE if method == "utils.pca" else method
        return utils.pca(states, k, names=names, device=device)[0]
    rows = [np.concatenate([state[name].numpy().ravel() for name in names]) for state in states]
    found = PCA(k, svd_solver=method.split()[1], random_state=0).fit(np.stack(rows))
    return torch.from_numpy(found.components_)


def gram(basis: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The products (k, k) of the rows of two bases (k, n), in float64 on the CPU."""
    blocks = (part.split(2**16, dim=1) for part in (basis, other))
    return sum(one.double() @ two.double().T for one, two in zip(*blocks, strict=True)).cpu()


def error(basis: torch.Tensor) -> float:
    """The largest entry of PPᵀ − I."""
    return float((gram(basis, basis) - torch.eye(len(basis))).abs().max())


def measure(*case: Any) -> tuple[float, float, float]:
    """Seconds, peak memory over the imports', and error of `find_basis` in this process."""
    found = []
    seconds, peak = peak_memory(lambda: timed(lambda: found.append(find_basis(*case))))
    return seconds, peak, error(found[0])


def decompose(methods: Sequence[str], arch: str, samples: int, k: int) -> Iterator[list[str]]:
    """Each method in three processes of its own."""
    with tempfile.TemporaryDirectory() as directory:
        n, case = write_trajectory(Path(directory), arch, samples), (directory, samples, k)
        calls = {method: partial(in_process, measure, method, *case) for method in methods}
        results = alternate(calls, 3, warm_up=0)
    for method, found in results.items():
        seconds, peaks, errors = zip(*found, strict=True)
        sizes = (f"{size / 2**30:.2f}" for size in (statistics.median(peaks), 4 * k * n))
        cells = [f"{samples}", f"{n:,}", f"{k}", method, spread(seconds, 2)]
        yield [*cells, *sizes, f"{errors[0]:.0e}"]


def pca(page: Page, large: bool = False) -> None:
    """Write the tables of PCA: against scikit-learn, by T and n; or the large one alone."""
    growth = [("resnet20", T, T // 2) for T in (21, 41, 81, 161)]
    growth += [(f"resnet{depth}", 41, 20) for depth in (8, 56, 110)]
    ours, all_three = ["utils.pca"], ["utils.pca", "scikit-learn auto", "scikit-learn full"]
    contents = {
        "pca: samples on disk to basis in memory": (all_three, [("resnet20", 81, 40)]),
        "pca growth: with T and n": (ours, growth),
    }
    if large:
        contents = {"pca large: ResNet-18 samples": (ours, [("resnet18", 121, 100)])}
    columns = ["T", "n", "k", "method", "seconds", "peak GiB", "basis GiB", "‖PPᵀ − I‖"]
    note = "Median (range) of 3 processes, files cached; peak over what the imports take."
    for title, (methods, cases) in contents.items():
        rows = {f"{case}": partial(decompose, methods, *case) for case in cases}
        page.table(title, note, columns, rows)


# ---------------------------------------------------------------------------- engine options

OPTIONS = ("--no-channels-last", "--channels-last", "--threads 1", "--deterministic", "--half")
COMPILED = ("--compile", "--half --compile")


def train(options: str, images: int) -> list[dict]:
    """Metrics of a run whose compiler cache is empty: its first epoch has to compile."""
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=f"{directory}/cache"),
        mock.patch.dict(DATASETS, CIFAR10=synthetic(images)),
    ):
        return run("SGD", f"--datasets CIFAR10 --epochs 3 {options}", place("SGD", Path(directory)))


def options(arch: str, images: int) -> Iterator[list[str]]:
    """train_sgd.py with each option, in processes of its own."""
    calls = {
        one: partial(in_process, train, f"--arch {arch} {one}", images)
        for one in (*OPTIONS, *COMPILED)
    }
    runs = alternate({one: calls[one] for one in OPTIONS}, 2, warm_up=0)
    # Half a minute of compiling is enough once.
    runs |= alternate({one: calls[one] for one in COMPILED}, 1, warm_up=0)
    baseline = statistics.median(epochs(runs[OPTIONS[0]])[0])
    for one, rows in runs.items():
        seconds, extra = epochs(rows)
        ratio = f"{baseline / statistics.median(seconds):.2f}"
        rate = spread([images / value for value in seconds])
        yield [f"`{one}`", rate, ratio, f"{extra:.1f}"]


def engine_options(page: Page) -> None:
    """Write the table of engine options."""
    columns = ["train_sgd.py with", "images/s", "× the first", "first epoch takes longer by s"]
    note = "resnet20, batch 128, median (range) of epochs of 1,024 images."
    cases = {"engine": partial(options, "resnet20", 1024)}
    page.table("engine: 32 × 32 pixels", note, columns, cases)


# ---------------------------------------------------------------------------------- launches

KINDS = ["step", "data", "metrics", "copy", "sync"]
SUBSPACE = "--params_end 3 --n_components 2"
STEPS = {
    "SGD": ("SGD", ""),
    "P-SGD": ("P-SGD", SUBSPACE),
    "P-BFGS, one trial": ("P-BFGS", SUBSPACE),
    "P⁺-BFGS, one trial": ("P-BFGS", f"{SUBSPACE} --alpha 0.1"),
}


def kind(event: Any) -> str:
    """What asked for a launch: data, metrics or the step itself; else copy or sync."""
    lines, first = inspect.getsourcelines(Epoch.add)
    of_metrics = {f"training/metrics.py:{number}" for number in range(first, first + len(lines))}
    if event.kind != "launch":
        return event.kind
    if event.line.startswith("utils.py"):
        return "data"
    return "metrics" if event.line in of_metrics else "step"


def count_launches(arch: str) -> Iterator[list[str]]:
    """A row a script; prints which line asks how often for which operation, too."""
    import accelerator  # registers a device, for the whole process

    same = f"--datasets digits --arch {arch} --epochs 2 --device {accelerator.NAME} --overwrite"
    with tempfile.TemporaryDirectory() as directory:
        for name, (method, own) in STEPS.items():
            with accelerator.recorded() as events:
                steps = steps_of(method, f"{same} {own}", place(method, Path(directory)), events)
            # An epoch's first and last step ask for more than those between.
            events = min((events for trials, events in steps if trials <= 1), key=len)
            print(name)
            asked = Counter((event.line, event.name) for event in events)
            for (line, operation), times in sorted(asked.items()):
                print(f"{times:6} {operation:30} {line}")
            counts = Counter(map(kind, events))
            yield [name, *(f"{counts[one]}" for one in KINDS)]


def launches(page: Page) -> None:
    """Write what a step asks of an accelerator, counted on the stand-in of tests/accelerator.py.

    Counted are torch's operations: a GPU may take several kernels for one, as for BatchNorm.
    """
    with mock.patch.object(sys, "path", [*sys.path, str(ROOT / "tests")]):
        cases = {"launches": partial(count_launches, "resnet20")}
        columns = ["one step of", *KINDS]
        page.table("launches: resnet20", "Operations on the device.", columns, cases)


# -------------------------------------------------------------------------------------- main

TABLES = {
    "data": data,
    "pca": pca,
    "step": bench_step.tables,
    "engine": engine_options,
    "launches": launches,
    "pca-large": partial(pca, large=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns 1 where a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=TABLES, help="default: all but pca-large")
    parser.add_argument("--out", type=Path, default=Path("report/bench"), metavar="DIR")
    args = parser.parse_args(argv)
    page = Page(args.out, "./run.sh bench")
    for name in [args.only] if args.only else list(TABLES)[:-1]:
        TABLES[name](page)
    return page.end()


if __name__ == "__main__":
    sys.exit(main())
