"""PCA of a trajectory on disk: seconds and peak memory, against scikit-learn's.

Each measurement is a process of its own, so that its peak memory is its own. The trajectory is
a random walk with shrinking steps over the shape of a real network, written as state dicts.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from timing import show

import models
import utils


def write_trajectory(directory: Path, arch: str, samples: int) -> int:
    """Samples 0.pt … in `directory`; returns n."""
    torch.manual_seed(0)
    model = models.build(arch, 10)
    for number in range(samples):
        utils.save(directory / f"{number}.pt", model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) / (10 + number)
    return utils.flatten(model).numel()


def run(method: str, directory: Path, samples: int, k: int, arch: str) -> dict[str, float]:
    """One method in this process: seconds and peak memory in GB over what the imports take."""
    names = [name for name, _ in models.build(arch, 10).named_parameters()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    states = utils.load_samples(directory, 0, samples)
    if method == "ours":
        basis, _ = utils.pca(states, k, names=names)
    else:
        from sklearn.decomposition import PCA

        matrix = np.stack(
            [np.concatenate([s[name].numpy().ravel() for name in names]) for s in states]
        )
        solver = method.split()[1]
        basis = torch.from_numpy(PCA(k, svd_solver=solver, random_state=0).fit(matrix).components_)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gram = basis.double() @ basis.double().T if basis.numel() < 1e8 else torch.eye(len(basis))
    error = float((gram - torch.eye(len(basis))).abs().max())
    return {"seconds": seconds, "gigabytes": (peak - before) / 2**20, "error": error}


def main() -> None:
    """Print the table, or with --one be one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--samples", type=int, nargs="+", default=[21, 41, 81])
    parser.add_argument("--k", type=int, help="directions (default: half the samples)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--methods", nargs="+", default=["ours", "scikit-learn auto", "scikit-learn full"]
    )
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        result = run(args.methods[0], args.one, args.samples[0], args.k, args.arch)
        print(json.dumps(result))
        return
    rows = []
    for samples in args.samples:
        k = args.k or samples // 2
        with tempfile.TemporaryDirectory() as directory:
            n = write_trajectory(Path(directory), args.arch, samples)
            results = {method: [] for method in args.methods}
            for _ in range(args.repetitions):
                for method, found in results.items():
                    command = [sys.executable, __file__, "--one", directory, "--methods", method]
                    command += ["--samples", str(samples), "--k", str(k), "--arch", args.arch]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode == 0:
                        found.append(json.loads(done.stdout))
        for method, found in results.items():
            row = [f"{samples}", f"{n:,}", f"{k}", method]
            if found:
                seconds = [result["seconds"] for result in found]
                row += [f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"]
                row += [
                    f"{statistics.median(r['gigabytes'] for r in found):.2f}",
                    f"{k * n * 4 / 2**30:.2f}",
                ]
                row += [f"{found[0]['error']:.0e}"]
            else:
                row += [f"ended by signal or error {done.returncode}", "", "", ""]
            rows.append(row)
    columns = ["T", "n", "k", "method", "seconds", "peak GB", "basis GB", "‖PPᵀ − I‖"]
    note = f"Median (range) of {args.repetitions} processes, files cached; peak beside the imports."
    show(f"pca {args.arch}: samples on disk to basis in memory", columns, rows, note)


if __name__ == "__main__":
    main()
