"""2. P-BFGS: BFGS on the coordinates in the subspace that the sampled trajectory spans.

    python train_pbfgs.py --arch resnet20 --params_end 81 -b 1024 --epochs 20 --save-dir save

With --alpha above 0 it is P+-BFGS: it also moves along the gradient outside the subspace.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce

from options import (
    Parser,
    add_subspace_options,
    answer_early,
    fraction,
    get_parser,
    nonnegative,
    positive,
)


def get_options() -> Parser:
    """The command line."""
    parser = get_parser(__doc__.splitlines()[0], "resnet32", epochs=100, weight_decay=0.0)
    add_subspace_options(parser)
    add = parser.groups["training"].add_argument
    add("--alpha", type=nonnegative, metavar="A", default=0.0,
        help="learning rate along the gradient outside the subspace")  # fmt: skip
    add("--gamma", type=fraction, metavar="G", default=0.9, help="momentum of the step of --alpha")
    add("--accumulate", type=positive, metavar="N", default=1,
        help="batches per step; gradient and line search use all of them")  # fmt: skip
    return parser


if __name__ == "__main__":
    answer_early(get_options())  # importing torch takes seconds

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import models
from basis import find_basis, load_start, load_subspace_samples, run_directory
from checkpoint import check_start
from cli import entry_point, parse_args
from distributed import all_mean, broadcast, world_size
from engine import Run, cross_entropy, evaluate_only, l2_penalty, objective, weighted
from network import build_model
from utils import batch_sizes, load_data


class PBFGS(torch.optim.Optimizer):
    """BFGS on one small vector z (k,), with mini-batch gradients and a backtracking line search.

    B, the estimate of the inverse Hessian (k, k), starts as the identity. A step is along d = −B g:
    s = d, ρd, ρ²d, … is tried until L(z + s) < L(z) + σ gᵀs (Armijo), both losses on the
    mini-batch of g. Where `max_trials` are rejected, the next s is taken without a trial.

    Raises ValueError unless `params` is one vector.
    """

    def __init__(
        self, params: Iterable[Tensor], rho: float = 0.4, sigma: float = 0.4, max_trials: int = 20
    ) -> None:
        super().__init__(params, {"rho": rho, "sigma": sigma, "max_trials": max_trials})
        if [p.dim() for group in self.param_groups for p in group["params"]] != [1]:
            raise ValueError("PBFGS optimizes one vector")

    @torch.no_grad()
    def step(self, evaluate: Callable[[], Tensor], loss: Tensor) -> int:
        """Move z, whose .grad is g; returns the number of rejected trials.

        `loss` is the mini-batch loss at z, and `evaluate()` returns it at the current z. Each trial
        is a host sync: what comes next depends on it.
        """
        group = self.param_groups[0]
        (z,) = group["params"]
        g = z.grad.clone()
        state = self.state[z]
        if state:
            state["B"] = update_inverse_hessian(state["B"], state["s"], g - state["g"])
        else:
            state["B"] = torch.eye(len(z), dtype=z.dtype, device=z.device)
        start = z.clone()
        s = -state["B"] @ g
        # Processors round products differently: all processes take rank 0's step and slope, and
        # with losses that are means over the processes decide alike in every trial.
        s, slope = broadcast(torch.cat([s, (g @ s)[None]])).split([len(z), 1])
        slope, rejected = slope[0], 0
        torch.add(start, s, out=z)
        while rejected < group["max_trials"] and not evaluate() < loss + group["sigma"] * slope:
            rejected += 1
            s, slope = group["rho"] * s, group["rho"] * slope
            torch.add(start, s, out=z)
        state.update(g=g, s=s)
        return rejected


def update_inverse_hessian(B: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The BFGS update of B (k, k) by a step s (k,) that changed the gradient by y (k,).

    Nocedal and Wright, Numerical Optimization (2006), eq. 6.17. Unless yᵀs is above 1e-20,
    which keeps B positive definite, B is returned as it is; that is decided on the device.
    """
    curvature = y @ s
    V = torch.eye(len(s), dtype=s.dtype, device=s.device) - torch.outer(y, s) / curvature
    updated = V.T @ B @ V + torch.outer(s, s) / curvature
    return torch.where(curvature > 1e-20, updated, B)


@contextlib.contextmanager
def frozen_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes use the statistics of the batch and change no buffer.

    BatchNorm is told not to track; the buffers of other layers are copied and put back.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    untracked = {id(buffer) for layer in layers for buffer in layer.buffers()}
    others = [buffer for buffer in model.buffers() if id(buffer) not in untracked]
    saved = [buffer.clone() for buffer in others]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracks in zip(layers, tracking, strict=True):
            layer.track_running_stats = tracks
        for buffer, value in zip(others, saved, strict=True):
            buffer.copy_(value)


class Batch:
    """The images of one step: their loss and gradient at z, and their loss at any other z.

    They are --accumulate batches, which go through the network one by one; `weight` is the share
    of this process's mean loss in the mean over all processes.
    """

    def __init__(
        self, args: argparse.Namespace, subspace: models.Subspace, images: Tensor, labels: Tensor,
        weight: float
    ) -> None:  # fmt: skip
        self.args, self.subspace, self.weight = args, subspace, weight
        whole = round(len(images) * world_size() / weight)  # the images of all processes
        count = len(batch_sizes(whole, args.batch_size))
        self.batches = list(
            zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
        )
        self.size = len(images)
        self.seed = torch.initial_seed() + 1

    def losses(self, half: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Each batch's part of the mean loss, and its logits."""
        torch.manual_seed(self.seed)  # all trials of a step see the same dropout
        for images, labels in self.batches:
            loss, logits = cross_entropy(self.subspace, images, labels, half)
            yield weighted(loss, len(labels) / self.size), logits

    def backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Add up the gradients, averaged over the processes.

        Returns this process's mean loss, the logits, and the loss that the line search starts from.
        """
        losses, logits = [], []
        for loss, part in self.losses(self.args.half):
            weighted(loss, self.weight).backward()
            losses.append(loss.detach())
            logits.append(part.detach())
        if self.args.weight_decay:
            l2_penalty(self.args, self.subspace).backward()
        for parameter in (self.subspace.coordinates, self.subspace.origin):
            if parameter.requires_grad:
                all_mean(parameter.grad)
        loss = reduce(torch.add, losses)
        start = self.evaluate() if self.args.half else self.mean(loss)
        return loss, torch.cat(logits), start

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """The loss at the current z, the mean over all processes; it leaves no trace."""
        with frozen_buffers(self.subspace.model):
            # Never in bfloat16, whose error is of the order of the decrease sought.
            return self.mean(reduce(torch.add, (loss for loss, _ in self.losses(half=False))))

    @torch.no_grad()
    def mean(self, loss: Tensor) -> Tensor:
        """A loss of this process averaged over all processes, with the L2 penalty."""
        loss = objective(loss, self.weight, self.args, self.subspace)
        return all_mean(loss.clone()) if world_size() > 1 else loss


@torch.no_grad()
def step_outside(subspace: models.Subspace, optimizer: torch.optim.Optimizer) -> None:
    """Move the origin along (I − PᵀP) ∇L, the part of the gradient that the subspace leaves out."""
    subspace.origin.grad -= subspace.combine(subspace.coordinates.grad)
    optimizer.step()


@entry_point
def main(argv: Sequence[str] | None = None) -> dict:
    """Train in the subspace of --save-dir's samples; returns the last metrics row."""
    args = parse_args(get_options(), argv)
    directory = run_directory(args, "pbfgs")
    if args.evaluate:
        return evaluate_only(args, directory)
    samples = load_subspace_samples(args)
    check_start(args, directory)
    data = load_data(args)
    model = build_model(args, data)
    load_start(args, samples, model)
    basis = find_basis(args, samples, model)
    subspace = models.Subspace(model, basis.basis, args.shard_basis)
    z = subspace.coordinates
    optimizer = PBFGS([z], max_trials=30 if args.datasets == "ImageNet" else 20)
    others = {}
    if args.alpha:
        origin = subspace.origin.requires_grad_()
        others["residual"] = torch.optim.SGD([origin], args.alpha, args.gamma)

    with Run(args, directory, data, subspace, optimizer, basis, **others) as run:
        for _ in run.epochs():
            for images, labels, weight in run.batches():
                subspace.zero_grad()
                batch = Batch(args, subspace, images, labels, weight)
                loss, logits, start = batch.backward()
                trials = optimizer.step(batch.evaluate, start)
                if args.alpha:
                    step_outside(subspace, others["residual"])
                length = optimizer.state[z]["s"].norm()
                run.log(loss, logits, labels, trials=trials, step_length=length)
            run.end_epoch()
    return run.rows[-1]


if __name__ == "__main__":
    main()
