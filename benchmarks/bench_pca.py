"""PCA of a trajectory on disk: seconds and peak memory, against scikit-learn's.

Each measurement is a process of its own, so that its peak memory is its own. The trajectory is
a random walk with shrinking steps over the shape of a real network, written as state dicts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from timing import DEVICE, peak_memory, show, timed

import checkpoint
import models
import utils


def write_trajectory(directory: Path, arch: str, samples: int) -> int:
    """Samples 0.pt … in `directory`; returns n."""
    torch.manual_seed(0)
    model = models.build(arch, 10)
    for number in range(samples):
        checkpoint.save(directory / f"{number}.pt", model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) / (10 + number)
    return utils.flatten(model).numel()


def gram(basis: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """The products (k, k) of the rows of two bases (k, n), or of one, in float64 on the CPU."""
    blocks = (part.split(2**16, dim=1) for part in (basis, basis if other is None else other))
    return sum(one.double() @ two.double().T for one, two in zip(*blocks, strict=True)).cpu()


def run(method: str, directory: Path, arch: str, samples: int, k: int) -> dict[str, float]:
    """One method in this process: seconds, peak memory over the imports', error of PPᵀ = I."""
    names = [name for name, _ in models.build(arch, 10).named_parameters()]
    seconds, basis = [], torch.empty(0)

    def work() -> None:
        nonlocal basis
        states = utils.load_samples(directory, 0, samples)
        if method == "utils.pca":
            basis, _ = utils.pca(states, k, names=names, device=DEVICE)
        else:
            rows = [np.concatenate([s[name].numpy().ravel() for name in names]) for s in states]
            found = PCA(k, svd_solver=method.split()[1], random_state=0).fit(np.stack(rows))
            basis = torch.from_numpy(found.components_)

    peak = peak_memory(lambda: seconds.append(timed(work)))
    error = float((gram(basis) - torch.eye(k)).abs().max())
    return {"seconds": seconds[0], "gigabytes": peak / 2**30, "error": error}


def table(title: str, cases: list[tuple[str, int, int]], methods: list[str], times: int) -> None:
    """Print a table with a row for each (arch, samples, k) and method."""
    rows = []
    for arch, samples, k in cases:
        with tempfile.TemporaryDirectory() as directory:
            n = write_trajectory(Path(directory), arch, samples)
            results: dict[str, list] = {method: [] for method in methods}
            for _ in range(times):
                for method, found in results.items():
                    case = json.dumps([method, directory, arch, samples, k])
                    command = [sys.executable, __file__, "--one", case]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode == 0:
                        found.append(json.loads(done.stdout))
        for method, found in results.items():
            row = [f"{samples}", f"{n:,}", f"{k}", method]
            if found:
                seconds = [result["seconds"] for result in found]
                row += [f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"]
                row += [f"{statistics.median(r['gigabytes'] for r in found):.2f}"]
                row += [f"{k * n * 4 / 2**30:.2f}", f"{found[0]['error']:.0e}"]
            else:
                row += [f"ended by signal or error {done.returncode}", "", "", ""]
            rows.append(row)
    columns = ["T", "n", "k", "method", "seconds", "peak GiB", "basis GiB", "‖PPᵀ − I‖"]
    note = f"Median (range) of {times} processes, files cached; peak over what the imports take."
    show(title, columns, rows, note)


def main() -> None:
    """Print the tables, or with --one be one of their processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="only the large case, by itself")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, directory, *case = args.one
        print(json.dumps(run(method, Path(directory), *case)))
    elif args.large:
        case = ("resnet18", 121, 100)
        table("pca large: ResNet-18 samples", [case], ["utils.pca"], args.repetitions)
    else:
        methods = ["utils.pca", "scikit-learn auto", "scikit-learn full"]
        case = ("resnet20", 81, 40)
        table("pca: samples on disk to basis in memory", [case], methods, args.repetitions)
        cases = [("resnet20", T, T // 2) for T in (21, 41, 81, 161)]
        cases += [(f"resnet{depth}", 41, 20) for depth in (8, 56, 110)]
        table("pca growth: with T and n", cases, ["utils.pca"], args.repetitions)


if __name__ == "__main__":
    main()
