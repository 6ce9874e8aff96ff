"""2. P-SGD: plain SGD on the coordinates in the plane that the sampled trajectory spans.

python train_psgd.py --arch resnet20 --params_end 81 --epochs 40 --save-dir save
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import models
import utils


def options() -> utils.Parser:
    """The command line."""
    about = __doc__.splitlines()[0]
    parser = utils.parser(about, models, "resnet32", epochs=100, weight_decay=0.0)
    utils.add_schedule_options(parser, 1.0, "step size", [30, 50], "30 50")
    utils.add_subspace_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> dict:
    """Train in the subspace of --save-dir's samples; returns the last metrics row."""
    args = utils.parse(options(), argv)
    directory = utils.run_directory(args, "psgd")
    if args.evaluate:
        return utils.evaluate_only(args, models.build, directory)
    samples = utils.load_trajectory(args)
    data = utils.load_data(args)
    model = utils.make_model(args, models.build, data)
    basis = utils.extract(args, samples, model)
    subspace = models.Subspace(model, basis.basis, args.shard_basis)
    optimizer = torch.optim.SGD([subspace.coordinates], args.lr, args.momentum)
    network = utils.parallel(subspace)

    def step(images: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor, dict]:
        optimizer.zero_grad()
        loss, output = utils.cross_entropy(network, images, labels, args.half)
        (loss * weight + utils.penalty(args, subspace)).backward()
        optimizer.step()
        return loss, output, {}

    state = {"model": subspace, "optimizer": optimizer}
    run = utils.start_run(args, directory, data, model, state, basis)
    return utils.fit(run, step, subspace.export)


if __name__ == "__main__":
    utils.program(main)
