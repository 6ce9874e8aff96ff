"""What a step in the subspace costs, as a multiple of the network work it cannot do without.

The limit of a P-SGD step is one forward and backward pass of the bare network, one product
Pᵀz and one P g. A P-BFGS step needs, for each trial, another forward pass without a graph and
another product. All are timed in turn, on the batch the step gets.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from timing import alternate, show, spread

import models
import utils
from train_pbfgs import PBFGS, frozen_statistics, make_step


def measure(side: int, batch: int, k: int, repetitions: int, arch: str) -> list[str]:
    """One row: medians and ratios for images of `side` pixels."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))
    bare = models.build(arch, 10).train()
    n = utils.flatten(bare).numel()
    basis = torch.linalg.qr(torch.randn(n, k)).Q.T.contiguous()
    origin, z, g = torch.zeros(n), torch.zeros(k), torch.randn(n)

    def network() -> None:
        bare.zero_grad()
        F.cross_entropy(bare(images), labels).backward()

    @torch.no_grad()
    def forward() -> None:
        with frozen_statistics(bare):
            F.cross_entropy(bare(images), labels)

    plane = models.Subspace(models.build(arch, 10), basis).train()
    sgd = torch.optim.SGD([plane.coordinates], 0.01, 0.9)

    def psgd() -> None:
        sgd.zero_grad()
        loss, _ = utils.cross_entropy(plane, images, labels, False)
        loss.backward()
        sgd.step()

    subspace = models.Subspace(models.build(arch, 10), basis).train()
    args = argparse.Namespace(batch_size=batch, half=False, weight_decay=0.0)
    step = make_step(args, subspace, PBFGS([subspace.coordinates]), None)
    trials = []

    def pbfgs() -> None:
        trials.append(1 + step(images, labels)[2]["trials"])

    seconds = alternate(
        {"network": network, "forward": forward, "product": lambda: origin + z @ basis,
         "projection": lambda: basis @ g, "psgd": psgd, "pbfgs": pbfgs},
        repetitions,
    )  # fmt: skip
    ratios = {"psgd": [], "pbfgs": []}
    for i, tried in enumerate(trials[1:]):  # each round against its own limit
        took = {name: values[i] for name, values in seconds.items()}
        limit = took["network"] + took["product"] + took["projection"]
        ratios["psgd"].append(took["psgd"] / limit)
        limit += tried * (took["forward"] + took["product"])
        ratios["pbfgs"].append(took["pbfgs"] / limit)
    return [
        f"{side} × {side}, {batch}",
        *(spread(seconds[name]) for name in ("network", "forward", "psgd", "pbfgs")),
        f"{statistics.mean(trials[1:]):.1f}",
        *(f"{statistics.median(values):.2f}" for values in ratios.values()),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--k", type=int, default=40)
    parser.add_argument("--arch", default="resnet20")
    args = parser.parse_args()
    cases = [(8, 128, 4), (8, 1024, 1), (32, 128, 1), (32, 1024, 0.2)]
    rows = [
        measure(side, batch, args.k, max(5, int(args.repetitions * more)), args.arch)
        for side, batch, more in cases
    ]
    columns = ["images, batch", "network ms", "no-grad forward ms", "P-SGD ms", "P-BFGS ms"]
    columns += ["trials", "P-SGD × limit", "P-BFGS × limit"]
    note = "Median (quartiles) of alternating repetitions, ratios round by round."
    show(f"step: {args.arch}, k = {args.k}", columns, rows, note)


if __name__ == "__main__":
    main()
