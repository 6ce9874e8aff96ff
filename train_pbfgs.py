"""2. P-BFGS: BFGS on the coordinates in the plane that the sampled trajectory spans.

    python train_pbfgs.py --arch resnet20 --params_end 81 -b 1024 --epochs 20 --save-dir save

With --alpha above 0 it is P+-BFGS: it also moves along the gradient outside the plane.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

import models
import utils


class PBFGS(torch.optim.Optimizer):
    """BFGS on one small vector z (k,), with mini-batch gradients and a backtracking line search.

    B, the estimate of the inverse Hessian (k, k), is first the identity. A step is along d = −B g:
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

        `loss` is the mini-batch loss at z, and `evaluate()` returns it at the z of the moment. Each
        trial is a host sync: what comes next depends on it.
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
        rejected = 0
        z.copy_(start + s)
        while rejected < group["max_trials"] and not evaluate() < loss + group["sigma"] * (g @ s):
            rejected += 1
            s = group["rho"] * s
            z.copy_(start + s)
        state.update(g=g, s=s)
        return rejected


def update_inverse_hessian(B: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The BFGS update of B (k, k) by a step s (k,) that changed the gradient by y (k,).

    Nocedal and Wright, Numerical Optimization (2006), eq. 6.17. Where yᵀs is not above 1e-20, B
    would not stay positive definite and is returned as it is; that is decided on the device.
    """
    curvature = y @ s
    V = torch.eye(len(s), dtype=s.dtype, device=s.device) - torch.outer(y, s) / curvature
    updated = V.T @ B @ V + torch.outer(s, s) / curvature
    return torch.where(curvature > 1e-20, updated, B)


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm goes on normalising with the batch, but leaves its running statistics alone."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracks in zip(layers, tracking, strict=True):
            layer.track_running_stats = tracks


def make_step(
    args: argparse.Namespace,
    subspace: models.Subspace,
    optimizer: PBFGS,
    residual: torch.optim.Optimizer | None,
) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, dict]]:
    """The step that trains on --accumulate batches, given as one; `residual` moves the origin."""
    z = subspace.coordinates

    def losses(images: Tensor, labels: Tensor, weight: float, seed: int, half: bool) -> Iterator:
        """Batch by batch its part of the step's mean loss, and the network's output."""
        torch.manual_seed(seed)  # all trials of a step see the same dropout
        whole = round(len(images) * utils.world() / weight)  # the images of all processes
        batches = len(utils.batch_sizes(whole, args.batch_size))
        for batch in zip(images.tensor_split(batches), labels.tensor_split(batches), strict=True):
            loss, output = utils.cross_entropy(subspace, *batch, half)
            yield loss * (len(output) / len(images)), output

    def step(images: Tensor, labels: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor, dict]:
        subspace.zero_grad()
        seed = torch.initial_seed() + 1
        total, outputs = 0, []
        for loss, output in losses(images, labels, weight, seed, args.half):
            (loss * weight).backward()
            total += loss.detach()
            outputs.append(output.detach())
        penalty = utils.penalty(args, subspace)
        if args.weight_decay:
            penalty.backward()
        utils.mean_over_processes(z.grad)
        if residual is not None:
            utils.mean_over_processes(subspace.origin.grad)

        @torch.no_grad()
        def evaluate() -> Tensor:
            with frozen_statistics(subspace.model):
                # Never in bfloat16, whose error is of the order of the decrease looked for.
                parts = sum(loss for loss, _ in losses(images, labels, weight, seed, half=False))
                # Of all processes, so that all take the same branch.
                return utils.mean_over_processes(parts * weight) + utils.penalty(args, subspace)

        before = utils.mean_over_processes(total * weight) + penalty
        trials = optimizer.step(evaluate, evaluate() if args.half else before)
        if residual is not None:
            # (I − PᵀP) ∇L, the part of the gradient that the subspace has no use for.
            subspace.origin.grad -= subspace.combine(z.grad)
            residual.step()
        length = optimizer.state[z]["s"].norm()
        return total, torch.cat(outputs), {"trials": trials, "step_length": length}

    return step


def options() -> utils.Parser:
    """The command line."""
    about = __doc__.splitlines()[0]
    parser = utils.parser(about, models, "resnet32", epochs=100, weight_decay=0.0)
    utils.add_subspace_options(parser)
    # fmt: off
    parser.add("--alpha", type=utils.amount, metavar="A", default=0.0,
        help="step size along the gradient outside the subspace")
    parser.add("--gamma", type=utils.fraction, metavar="G", default=0.9,
        help="momentum of that step")
    parser.add("--accumulate", type=utils.positive, metavar="N", default=1,
        help="batches a step; gradient and line search are of all of them")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> dict:
    """Train in the subspace of --save-dir's samples; returns the last metrics row."""
    args = utils.parse(options(), argv)
    directory = utils.run_directory(args, "pbfgs")
    if args.evaluate:
        return utils.evaluate_only(args, models.build, directory)
    samples = utils.load_trajectory(args)
    data = utils.load_data(args)
    model = utils.make_model(args, models.build, data)
    basis = utils.extract(args, samples, model)
    subspace = models.Subspace(model, basis.basis, args.shard_basis)
    trials = 30 if args.datasets == "ImageNet" else 20
    optimizer, residual = PBFGS([subspace.coordinates], max_trials=trials), None
    state = {"model": subspace, "optimizer": optimizer}
    if args.alpha:
        residual = torch.optim.SGD([subspace.origin.requires_grad_()], args.alpha, args.gamma)
        state["residual"] = residual

    run = utils.start_run(args, directory, data, model, state, basis)
    return utils.fit(run, make_step(args, subspace, optimizer, residual), subspace.export)


if __name__ == "__main__":
    utils.program(main)
