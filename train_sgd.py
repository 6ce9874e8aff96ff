"""1. Ordinary training that keeps the parameters of every epoch: the trajectory.

    python train_sgd.py --datasets CIFAR10 --arch resnet20 --epochs 150 --save-dir save

writes save/0.pt (the initialization), save/1.pt, … (after each epoch, or --sample-every steps).
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from training.options import (
    Parser,
    add_optimizer_options,
    answer_early,
    get_parser,
    natural,
    positive,
    run_name,
)

LEARNING_RATES = {"sgd": 0.1, "adam": 0.001, "adamw": 0.001}
# Epochs after which the learning rate drops to a tenth.
MILESTONES = {"CIFAR100": [150], "ImageNet": list(range(30, 1000, 30)), "": [100, 150]}


def get_options() -> Parser:
    """The command line."""
    parser = get_parser("sgd", __doc__.splitlines()[0], "resnet20", epochs=200, weight_decay=1e-4)
    usual = "100 150, on CIFAR100 150, on ImageNet every 30"
    add_optimizer_options(parser, LEARNING_RATES, MILESTONES, usual)
    add = parser.groups["run"].add_argument
    add(
        "--run",
        type=run_name,
        metavar="NAME",
        help="with --average: its directory in --save-dir (default: average)",
    )
    add(
        "--average",
        type=natural,
        nargs=2,
        metavar=("START", "END"),
        help="no training: test the weight average of the snapshots START to END − 1, with "
        "BatchNorm's statistics recomputed",
    )
    add(
        "--sample-every",
        type=positive,
        metavar="STEPS",
        help="steps between snapshots, which are numbered 0, 1, … (default: an epoch)",
    )
    return parser


if __name__ == "__main__":
    answer_early(get_options())  # importing torch takes seconds

from torch import nn

from dldr.distributed import print0
from dldr.parameters import average
from training.distributed import average_buffers, data_parallel
from training.errors import InputError, blame, entry_point
from training.files import check_disk, save
from training.losses import evaluate, recompute_statistics
from training.network import build_model, copy_into
from training.run import Run, evaluate_only, make_optimizer, set_lr
from training.setup import parse_args
from training.subspaces import check_samples, load_trajectory
from utils import batch_sizes, seed_all


def save_sample(args: argparse.Namespace, model: nn.Module, number: int) -> None:
    """Write the state dict NUMBER.pt."""
    average_buffers(model)
    save(args.save_dir / f"{number}.pt", model.state_dict())


def test_average(args: argparse.Namespace) -> dict:
    """Test the weight average of samples, and save it in the run's directory."""
    if isinstance(args.resume, Path):
        raise InputError("--resume: not with --average and a PATH; allowed: without one")
    numbers = range(*args.average)
    if not numbers:
        raise InputError(f"--average: {args.average}: allowed: START below END")
    with blame("--average"):
        samples = load_trajectory(args, numbers)
    args.epochs = args.start_epoch = 0
    with Run(args) as run:
        data = run.load_data()
        model = build_model(args, data)
        check_samples(args, samples, model)
        copy_into(model, average(samples))
        run.start(data, model)
        if not run.rows:
            began = time.perf_counter()
            seed_all(args.randomseed)  # dropout draws here, too
            recompute_statistics(model, run.signals.until(data.train.epoch()), args.half)
            row = {"epoch": 0, "seconds": time.perf_counter() - began}
            run.record(row | evaluate(model, run.signals.until(data.test.epoch()), args.half))
    row = run.rows[-1]
    print0(
        f"{args.directory}: average of samples {numbers[0]}–{numbers[-1]}, "
        f"test accuracy {row['test_acc']:.2f} %"
    )
    return row


@entry_point
def main(argv: Sequence[str] | None = None) -> dict:
    """Train and sample into --save-dir; returns the last metrics row."""
    args = parse_args(get_options(), argv)
    if args.run and not args.average:
        raise InputError("--run: only with --average; allowed: --save-dir, which names the run")
    if args.evaluate:
        return evaluate_only(args)
    if args.average:
        return test_average(args)
    with Run(args) as run:
        data = run.load_data()
        model = build_model(args, data)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Fused: one pass over all parameters, at 8 × 8 pixels 5 % of the step.
        optimizer = make_optimizer(args, trained, fused=True)
        network = data_parallel(model)
        steps = len(batch_sizes(len(data.train), args.batch_size))
        every = args.sample_every or steps
        numbers = range(args.start_epoch * steps // every, args.epochs * steps // every + 1)
        check_disk(args, model, numbers)

        run.start(data, model, optimizer)
        if run.step == args.start_epoch * steps:
            save_sample(args, model, numbers[0])
        for epoch in run.epochs():
            set_lr(optimizer, args, epoch)
            for images, labels in run.batches():
                optimizer.zero_grad()
                run.loss(network, images, labels).backward()
                optimizer.step()
                run.end_step()
                if run.step % every == 0:
                    run.check_finite()
                    save_sample(args, model, run.step // every)
            run.end_epoch()
    return run.rows[-1]


if __name__ == "__main__":
    main()
