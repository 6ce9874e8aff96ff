"""2. P-SGD: plain SGD on the coordinates in the subspace that the sampled trajectory spans.

python train_psgd.py --arch resnet20 --params_end 81 --epochs 40 --save-dir save
"""

from collections.abc import Sequence

from options import Parser, add_schedule_options, add_subspace_options, answer_early, get_parser


def get_options() -> Parser:
    """The command line."""
    parser = get_parser(__doc__.splitlines()[0], "resnet32", epochs=100, weight_decay=0.0)
    add_schedule_options(parser, 1.0, "learning rate", [30, 50])
    add_subspace_options(parser)
    return parser


if __name__ == "__main__":
    answer_early(get_options())  # importing torch takes seconds

import torch

import models
from basis import find_basis, load_start, load_subspace_samples, run_directory
from checkpoint import check_start
from cli import entry_point, parse_args
from distributed import data_parallel
from engine import Run, cross_entropy, evaluate_only, objective, set_lr
from network import build_model
from utils import load_data


@entry_point
def main(argv: Sequence[str] | None = None) -> dict:
    """Train in the subspace of --save-dir's samples; returns the last metrics row."""
    args = parse_args(get_options(), argv)
    directory = run_directory(args, "psgd")
    if args.evaluate:
        return evaluate_only(args, directory)
    samples = load_subspace_samples(args)
    check_start(args, directory)
    data = load_data(args)
    model = build_model(args, data)
    load_start(args, samples, model)
    basis = find_basis(args, samples, model)
    subspace = models.Subspace(model, basis.basis, args.shard_basis)
    optimizer = torch.optim.SGD([subspace.coordinates], args.lr, args.momentum)
    network = data_parallel(subspace)

    with Run(args, directory, data, subspace, optimizer, basis) as run:
        for epoch in run.epochs():
            set_lr(optimizer, args, epoch)
            for images, labels, weight in run.batches():
                optimizer.zero_grad()
                loss, logits = cross_entropy(network, images, labels, args.half)
                objective(loss, weight, args, subspace).backward()
                optimizer.step()
                run.log(loss, logits, labels)
            run.end_epoch()
    return run.rows[-1]


if __name__ == "__main__":
    main()
