"""What a step in the subspace costs, as a multiple of the network work it cannot do without.

The limit of a P-SGD step is one forward and backward pass of the bare network, one product
Pᵀz and one P g. A P-BFGS step needs, for each trial, another forward pass without a graph and
another product. All are timed in turn, on the batch the step gets. Peak memory is of processes
of their own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from timing import DEVICE, alternate, peak_memory, show, spread

import models
import train_sgd
import utils
from cli import parse_args
from engine import cross_entropy
from train_pbfgs import PBFGS, Batch, frozen_buffers


class Case:
    """A batch, a network and a basis; each method makes one of the functions to be measured."""

    def __init__(self, arch: str, side: int, batch: int, k: int) -> None:
        torch.manual_seed(0)
        images = torch.randn(batch, 3, side, side, device=DEVICE)
        if DEVICE == "cpu":  # as the scripts have it
            images = images.to(memory_format=torch.channels_last)
        self.batch = images, torch.randint(10, (batch,), device=DEVICE)
        self.arch, self.k = arch, k
        self.n = utils.flatten(models.build(arch, 10)).numel()
        self.trials: list[int] = []

    @cached_property
    def basis(self) -> torch.Tensor:
        return torch.randn(self.k, self.n, device=DEVICE).div_(self.n**0.5)  # nearly orthonormal

    def model(self) -> torch.nn.Module:
        return models.build(self.arch, 10).to(DEVICE).train()

    def network(self) -> Callable[[], object]:
        bare, (images, labels) = self.model(), self.batch

        def run() -> None:
            bare.zero_grad()
            F.cross_entropy(bare(images), labels).backward()

        return run

    def forward(self) -> Callable[[], object]:
        bare, (images, labels) = self.model(), self.batch

        @torch.no_grad()
        def run() -> None:
            with frozen_buffers(bare):
                F.cross_entropy(bare(images), labels)

        return run

    def product(self) -> Callable[[], object]:
        origin, z = torch.zeros(self.n, device=DEVICE), torch.zeros(self.k, device=DEVICE)
        return lambda: origin + z @ self.basis

    def projection(self) -> Callable[[], object]:
        g = torch.randn(self.n, device=DEVICE)
        return lambda: self.basis @ g

    def psgd(self) -> Callable[[], object]:
        subspace = models.Subspace(self.model(), self.basis).train()
        sgd = torch.optim.SGD([subspace.coordinates], 0.01, 0.9)

        def run() -> None:
            sgd.zero_grad()
            loss, _ = cross_entropy(subspace, *self.batch, False)
            loss.backward()
            sgd.step()

        return run

    def pbfgs(self) -> Callable[[], object]:
        subspace = models.Subspace(self.model(), self.basis).train()
        args = argparse.Namespace(batch_size=len(self.batch[1]), half=False, weight_decay=0.0)
        optimizer = PBFGS([subspace.coordinates])

        def run() -> None:
            subspace.zero_grad()
            batch = Batch(args, subspace, *self.batch, 1.0)
            _, _, start = batch.backward()
            self.trials.append(1 + optimizer.step(batch.evaluate, start))

        return run


NAMES = ("network", "forward", "product", "projection", "psgd", "pbfgs")


def measure(case: Case, repetitions: int) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of each function, and the columns that compare the two methods with their limits."""
    seconds = alternate({name: getattr(case, name)() for name in NAMES}, repetitions)
    ratios = {"psgd": [], "pbfgs": []}
    for i, tried in enumerate(case.trials[1:]):  # each round against its own limit
        took = {name: values[i] for name, values in seconds.items()}
        limit = took["network"] + took["product"] + took["projection"]
        ratios["psgd"].append(took["psgd"] / limit)
        limit += tried * (took["forward"] + took["product"])
        ratios["pbfgs"].append(took["pbfgs"] / limit)
    trials = f"{statistics.mean(case.trials[1:]):.1f}"
    return seconds, [trials, *(f"{statistics.median(values):.2f}" for values in ratios.values())]


def peak(name: str, arch: str, side: int, batch: int, k: int) -> str:
    """Peak memory in MiB of one function in a process of its own."""
    command = [sys.executable, __file__, "--peak", json.dumps([name, arch, side, batch, k])]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=plain)
    return done.stdout.strip()


def main() -> None:
    """Print the tables, or with --peak be one of the processes whose memory is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    parse_args(train_sgd.get_options(), [])  # torch's settings are the scripts'
    if args.peak:
        name, *settings = args.peak

        def steps() -> None:
            run = getattr(Case(*settings), name)()
            run()
            run()

        print(f"{peak_memory(steps) / 2**20:.0f}")
        return

    rows = []
    for side, batch, more in ((8, 128, 4), (8, 1024, 1), (32, 128, 1), (32, 1024, 0.25)):
        case = Case(args.arch, side, batch, args.k)
        seconds, compared = measure(case, max(5, int(args.repetitions * more)))
        times = [spread(seconds[name]) for name in ("network", "forward", "psgd", "pbfgs")]
        rows.append([f"{side} × {side}, {batch}", *times, *compared])
    columns = ["images, batch", "network ms", "no-grad forward ms", "P-SGD ms", "P-BFGS ms"]
    columns += ["trials", "P-SGD × limit", "P-BFGS × limit"]
    note = "Median (quartiles) of alternating repetitions, ratios round by round."
    show(f"step: {args.arch}, k = {args.k}", columns, rows, note)

    rows = []
    for arch, k in [("resnet8", 40), ("resnet56", 40), *(("resnet20", k) for k in (10, 40, 160))]:
        case = Case(arch, 8, 128, k)
        seconds, compared = measure(case, args.repetitions)
        times = [spread(seconds[name]) for name in ("network", "product", "projection", "psgd")]
        rows.append([f"{case.n:,}", f"{k}", *times, *compared])
    columns = ["n", "k", "network ms", "Pᵀz ms", "P g ms", "P-SGD ms", "trials"]
    columns += ["P-SGD × limit", "P-BFGS × limit"]
    show("step growth: with n and k, 8 × 8 pixels, batch 128", columns, rows, note)

    rows = []
    names = ("forward", "network", "psgd", "pbfgs")
    for side, batch, k in (
        (8, 128, 10),
        (8, 128, 40),
        (8, 128, 160),
        (32, 128, 40),
        (32, 1024, 40),
    ):
        peaks = [peak(name, args.arch, side, batch, k) for name in names]
        megabytes = f"{Case(args.arch, 8, 1, k).basis.numel() * 4 / 2**20:.0f}"
        rows.append([f"{side} × {side}, {batch}", f"{k}", megabytes, *peaks])
    columns = ["images, batch", "k", "basis MiB", "no-grad forward MiB", "network MiB", "P-SGD MiB"]
    columns += ["P-BFGS MiB"]
    note = "Peak of a process over what its imports take: batch, network, basis, two steps."
    show(f"step memory: {args.arch}", columns, rows, note)


if __name__ == "__main__":
    main()
