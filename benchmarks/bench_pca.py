"""PCA of a trajectory on disk: seconds and peak memory, against scikit-learn's.

The trajectory is a random walk with shrinking steps over the shape of a real network, written as
state dicts.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from page import FAILED, Page
from sklearn.decomposition import PCA
from timing import DEVICE, alternate, in_process, peak_memory, spread, timed

import checkpoint
import models
from utils import flatten, load_samples, parameter_names, pca

COLUMNS = ["T", "n", "k", "method", "seconds", "peak GiB", "basis GiB", "‖PPᵀ − I‖"]


def write_trajectory(directory: Path, arch: str, samples: int) -> int:
    """Samples 0.pt … in `directory`; returns n."""
    torch.manual_seed(0)
    model = models.build(arch, 10)
    for number in range(samples):
        checkpoint.save(directory / f"{number}.pt", model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) / (10 + number)
    return flatten(model).numel()


def find_basis(method: str, directory: Path, samples: int, k: int) -> torch.Tensor:
    """The basis (k, n) of samples on disk, by utils.pca on a device or by scikit-learn's solver."""
    states = load_samples(directory, 0, samples)
    if not method.startswith("scikit-learn"):
        return pca(states, k, device=DEVICE if method == "utils.pca" else method)[0]
    names = parameter_names(states[0])
    rows = [np.concatenate([state[name].numpy().ravel() for name in names]) for state in states]
    solver = method.split()[1]
    found = PCA(k, svd_solver=solver, random_state=0).fit(np.stack(rows))
    return torch.from_numpy(found.components_)


def gram(basis: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The products (k, k) of the rows of two bases (k, n), in float64 on the CPU."""
    blocks = (part.split(2**16, dim=1) for part in (basis, other))
    return sum(one.double() @ two.double().T for one, two in zip(*blocks, strict=True)).cpu()


def error(basis: torch.Tensor) -> float:
    """The largest entry of PPᵀ − I."""
    return float((gram(basis, basis) - torch.eye(len(basis))).abs().max())


def measure(*case: str | Path | int) -> tuple[float, float, float]:
    """Seconds, bytes at the peak over the imports', and error of `find_basis` in this process."""
    found = []
    seconds, peak = peak_memory(lambda: timed(lambda: found.append(find_basis(*case))))
    return seconds, peak, error(found[0])


def compare(
    methods: Sequence[str], arch: str, samples: int, k: int, processes: int = 3
) -> Iterator[list[str]]:
    """Each method in processes of their own, so that the peak memory is its own."""
    with tempfile.TemporaryDirectory() as directory:
        n = write_trajectory(Path(directory), arch, samples)
        calls = {
            method: partial(in_process, measure, method, directory, samples, k)
            for method in methods
        }
        results = alternate(calls, processes, warm_up=0)
    for method, found in results.items():
        seconds, peaks, errors = zip(*found, strict=True)
        peak, basis = statistics.median(peaks) / 2**30, k * n * 4 / 2**30
        row = [f"{samples}", f"{n:,}", f"{k}", method, spread(seconds, 2)]
        yield [*row, f"{peak:.2f}", f"{basis:.2f}", f"{errors[0]:.0e}"]


def devices(arch: str, samples: int, k: int, directory: Path) -> Iterator[list[str]]:
    """On the CPU and on the device, in turn, with the largest angle between the two subspaces."""
    directory.mkdir()
    n, bases = write_trajectory(directory, arch, samples), {}
    own = "cpu" if DEVICE == "mps" else DEVICE  # where there is float64

    def work(device: str) -> None:
        bases[device] = find_basis(device, directory, samples, k).cpu()

    calls = {device: partial(timed, partial(work, device)) for device in ("cpu", own)}
    seconds = alternate(calls, 3)
    times = [f"{statistics.median(seconds[device]):.2f}" for device in ("cpu", own)]
    cosines = torch.linalg.svdvals(gram(bases["cpu"], bases[own]))
    angle, apart = float((1 - cosines).abs().max()), error(bases[own])
    result = "ok" if apart <= 1e-6 and angle <= 1e-6 else FAILED
    yield [f"{samples}", f"{n:,}", f"{k}", *times, f"{apart:.0e}", f"{angle:.0e}", result]


def tables(page: Page, large: bool = False) -> None:
    """Write the tables: against scikit-learn, by T and n; or the large one alone."""
    growth = [("resnet20", T, T // 2) for T in (21, 41, 81, 161)]
    growth += [(f"resnet{depth}", 41, 20) for depth in (8, 56, 110)]
    ours, all_three = ["utils.pca"], ["utils.pca", "scikit-learn auto", "scikit-learn full"]
    contents = {
        "pca: samples on disk to basis in memory": (all_three, [("resnet20", 81, 40)]),
        "pca growth: with T and n": (ours, growth),
    }
    if large:
        contents = {"pca large: ResNet-18 samples": (ours, [("resnet18", 121, 100)])}
    note = "Median (range) of 3 processes, files cached; peak over what the imports take."
    for title, (methods, cases) in contents.items():
        rows = {f"{case}": partial(compare, methods, *case) for case in cases}
        page.table(title, note, COLUMNS, rows)
