"""What a step in the subspace costs, as a multiple of the network work it cannot do without.

The limit of a P-SGD step is one forward and backward pass of the bare network, one product
Pᵀz and one P g. A P-BFGS step needs, for each trial, another forward pass without a graph and
another product. All are timed in turn, on the batch the step gets. Peak memory is of processes
of their own.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from common import DEVICE, Page, alternate, in_process, peak_memory, spread, timed
from torch import Tensor, nn

import models
import train_sgd
from dldr.parameters import flatten
from dldr.pbfgs import PBFGS, frozen_buffers
from train_pbfgs import Batch
from training.losses import cross_entropy
from training.network import count_on_host
from training.setup import parse_args

# What is measured of a `Case`, and its name in the tables.
NAMES = {
    "network": "network",
    "forward": "no-grad forward",
    "product": "Pᵀz",
    "projection": "P g",
    "psgd": "P-SGD",
    "pbfgs": "P-BFGS",
}
COMPARED = ["trials", "P-SGD × limit", "P-BFGS × limit"]
STEPS = "network", "forward", "psgd", "pbfgs"
PRODUCTS = "network", "product", "projection", "psgd"
MEMORY = "forward", "network", "psgd", "pbfgs"


class Case:
    """A batch, a network and a basis, as the scripts' `options` have them: what is measured.

    What a method needs is made when it is first called.
    """

    def __init__(self, options: str, side: int, k: int = 1) -> None:
        argv = [*options.split(), "--weight-decay", "0"]
        self.args = args = parse_args(train_sgd.get_options(), argv)
        torch.manual_seed(0)
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        images = torch.randn(args.batch_size, 3, side, side, device=DEVICE)
        labels = torch.randint(10, (args.batch_size,), device=DEVICE)
        self.batch = images.to(memory_format=layout), labels
        self.n, self.k = flatten(models.build(args.arch, 10)).numel(), k
        self.trials: list[int] = []

    def build(self) -> nn.Module:
        model = models.build(self.args.arch, 10).to(DEVICE).train()
        if self.args.compile:
            model.compile()
        else:
            count_on_host(model)
        return model

    @cached_property
    def bare(self) -> nn.Module:
        return self.build()

    @cached_property
    def basis(self) -> Tensor:
        return torch.randn(self.k, self.n, device=DEVICE).div_(self.n**0.5)  # nearly orthonormal

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        return torch.randn(self.n, device=DEVICE), torch.zeros(self.k, device=DEVICE)

    @cached_property
    def for_psgd(self) -> tuple[models.Subspace, torch.optim.SGD]:
        subspace = models.Subspace(self.build(), self.basis).train()
        return subspace, torch.optim.SGD([subspace.coordinates], 0.01, 0.9)

    @cached_property
    def for_pbfgs(self) -> tuple[models.Subspace, PBFGS]:
        subspace = models.Subspace(self.build(), self.basis).train()
        return subspace, PBFGS([subspace.coordinates])

    def network(self) -> None:
        self.bare.zero_grad()
        cross_entropy(self.bare, *self.batch, self.args.half)[0].backward()

    @torch.no_grad()
    def forward(self) -> None:
        with frozen_buffers(self.bare):
            cross_entropy(self.bare, *self.batch, self.args.half)

    def product(self) -> Tensor:
        origin, z = self.vectors
        return origin + z @ self.basis

    def projection(self) -> Tensor:
        return self.basis @ self.vectors[0]

    def psgd(self) -> None:
        subspace, sgd = self.for_psgd
        sgd.zero_grad()
        cross_entropy(subspace, *self.batch, self.args.half)[0].backward()
        sgd.step()

    def pbfgs(self) -> None:
        subspace, pbfgs = self.for_pbfgs
        subspace.zero_grad()
        batch = Batch(SimpleNamespace(args=self.args, weight=1.0), subspace, *self.batch)
        _, _, start = batch.backward()
        self.trials.append(1 + pbfgs.step(batch.evaluate, start))


def compare(case: Case, shown: Sequence[str], rounds: int) -> list[str]:
    """The times of what is `shown`, and the two methods against their limits."""
    calls = {name: partial(timed, getattr(case, name)) for name in NAMES}
    ms = {name: 1000 * np.array(values) for name, values in alternate(calls, rounds).items()}
    trials = np.array(case.trials[1:])  # without the warm-up's
    limit = ms["network"] + ms["product"] + ms["projection"]
    more = trials * (ms["forward"] + ms["product"])
    ratios = ms["psgd"] / limit, ms["pbfgs"] / (limit + more)  # round by round
    times = [spread(statistics.quantiles(ms[name], n=4), 1) for name in shown]
    return [*times, f"{trials.mean():.1f}", *(f"{np.median(values):.2f}" for values in ratios)]


def by_size(arch: str, side: int, batch: int, rounds: int) -> Iterator[list[str]]:
    """A row for a size of images and batch."""
    case = Case(f"--arch {arch} --batch-size {batch}", side, 40)
    yield [f"{side} × {side}, {batch}", *compare(case, STEPS, rounds)]


def by_basis(arch: str, k: int, rounds: int = 15) -> Iterator[list[str]]:
    """A row for a shape of the basis."""
    case = Case(f"--arch {arch}", 8, k)
    yield [f"{case.n:,}", f"{k}", *compare(case, PRODUCTS, rounds)]


def peak(name: str, options: str, side: int, k: int) -> float:
    """Bytes that one function takes in this process at its peak: what it needs, and two steps."""

    def steps() -> None:
        method = getattr(Case(options, side, k), name)
        method()
        method()

    return peak_memory(steps)[1]


def memory(arch: str, side: int, batch: int, k: int) -> Iterator[list[str]]:
    """A row of peaks, each in a process of its own with glibc's own settings."""
    options = f"--arch {arch} --batch-size {batch}"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with mock.patch.dict(os.environ, plain, clear=True):
        peaks = [in_process(peak, name, options, side, k) for name in MEMORY]
    sizes = 4 * k * Case(f"--arch {arch}", 8).n, *peaks
    yield [f"{side} × {side}, {batch}", f"{k}", *(f"{size / 2**20:.0f}" for size in sizes)]


def tables(page: Page, arch: str = "resnet20") -> None:
    """Write the three tables."""
    note = "Median (quartiles) of alternating repetitions, ratios round by round."
    sizes = [(8, 128, 60), (8, 1024, 15), (32, 128, 15), (32, 1024, 5)]
    columns = ["images, batch", *(f"{NAMES[name]} ms" for name in STEPS), *COMPARED]
    cases = {f"{size}": partial(by_size, arch, *size) for size in sizes}
    page.table(f"step: {arch}, k = 40", note, columns, cases)

    shapes = [("resnet8", 40), ("resnet56", 40), *((arch, k) for k in (10, 40, 160))]
    columns = ["n", "k", *(f"{NAMES[name]} ms" for name in PRODUCTS), *COMPARED]
    cases = {f"{shape}": partial(by_basis, *shape) for shape in shapes}
    page.table("step growth: with n and k, 8 × 8 pixels, batch 128", note, columns, cases)

    note = "Peak of a process over what its imports take: batch, network, basis, two steps."
    sizes = [*((8, 128, k) for k in (10, 40, 160)), (32, 128, 40), (32, 1024, 40)]
    columns = ["images, batch", "k", "basis MiB", *(f"{NAMES[name]} MiB" for name in MEMORY)]
    cases = {f"{size}": partial(memory, arch, *size) for size in sizes}
    page.table(f"step memory: {arch}", note, columns, cases)
