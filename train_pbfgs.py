"""2. P-BFGS: BFGS on the coordinates in the subspace that the sampled trajectory spans.

    python train_pbfgs.py --arch resnet20 --params_end 81 -b 1024 --epochs 20 --save-dir save

With --alpha above 0 it is P+-BFGS: it also moves along the gradient outside the subspace.
"""

from collections.abc import Iterator, Sequence
from functools import reduce

from training.options import (
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
    parser = get_parser("pbfgs", __doc__.splitlines()[0], "resnet32", epochs=100, weight_decay=0.0)
    add_subspace_options(parser)
    add = parser.groups["training"].add_argument
    add(
        "--alpha",
        type=nonnegative,
        metavar="A",
        default=0.0,
        help="learning rate along the gradient outside the subspace",
    )
    add("--gamma", type=fraction, metavar="G", default=0.9, help="momentum of the step of --alpha")
    add(
        "--accumulate",
        type=positive,
        metavar="N",
        default=1,
        help="batches per step; gradient and line search use all of them",
    )
    return parser


if __name__ == "__main__":
    answer_early(get_options())  # importing torch takes seconds

import torch
from torch import Tensor

from dldr import PBFGS, Subspace, frozen_buffers
from dldr.distributed import all_mean, world_size
from training.errors import entry_point
from training.losses import cross_entropy, objective, penalty, weighted
from training.network import build_model
from training.run import Run, evaluate_only
from training.setup import parse_args
from training.subspaces import find_basis, load_start, load_subspace_samples
from utils import batch_sizes, seed_all


class Batch:
    """The images of one step: their loss and gradient at z, and their loss at any other z.

    They are --accumulate batches, which go through the network one by one.
    """

    def __init__(self, run: Run, subspace: Subspace, images: Tensor, labels: Tensor) -> None:
        self.args, self.subspace, self.weight = run.args, subspace, run.weight
        whole = round(len(images) * world_size() / run.weight)  # the images of all processes
        count = len(batch_sizes(whole, run.args.batch_size))
        parts = images.tensor_split(count), labels.tensor_split(count)
        self.batches = list(zip(*parts, strict=True))
        self.size = len(images)
        self.seed = torch.initial_seed() + 1

    def losses(self, half: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Each batch's part of the mean loss, and its logits."""
        seed_all(self.seed)  # all trials of a step see the same dropout
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
            penalty(self.args, self.subspace).backward()
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
def step_outside(subspace: Subspace, optimizer: torch.optim.Optimizer) -> None:
    """Move the origin along (I − PᵀP) ∇L, the part of the gradient that the subspace leaves out."""
    subspace.origin.grad -= subspace.combine(subspace.coordinates.grad)
    optimizer.step()


@entry_point
def main(argv: Sequence[str] | None = None) -> dict:
    """Train in the subspace of --save-dir's samples; returns the last metrics row."""
    args = parse_args(get_options(), argv)
    if args.evaluate:
        return evaluate_only(args)
    samples = load_subspace_samples(args)
    with Run(args) as run:
        data = run.load_data()
        model = build_model(args, data)
        load_start(args, samples, model)
        basis = find_basis(args, samples, model)
        subspace = Subspace(model, basis.vectors.to(args.device))
        z = subspace.coordinates
        optimizer = PBFGS([z], max_trials=30 if args.datasets == "ImageNet" else 20)
        others = {}
        if args.alpha:
            origin = subspace.origin.requires_grad_()
            others["residual"] = torch.optim.SGD([origin], args.alpha, args.gamma)

        run.start(data, subspace, optimizer, basis, **others)
        for _ in run.epochs():
            for images, labels in run.batches():
                subspace.zero_grad()
                batch = Batch(run, subspace, images, labels)
                loss, logits, start = batch.backward()
                trials = optimizer.step(batch.evaluate, start)
                if args.alpha:
                    step_outside(subspace, others["residual"])
                length = optimizer.state[z]["s"].norm()
                run.log(loss, logits, labels, trials=trials, step_length=length)
                run.end_step()
            run.end_epoch()
    return run.rows[-1]


if __name__ == "__main__":
    main()
