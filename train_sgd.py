"""1. Ordinary training that keeps the parameters of every epoch: the trajectory.

    python train_sgd.py --datasets CIFAR10 --arch resnet20 --epochs 150 --save-dir save

writes save/0.pt (the initialisation), save/1.pt, … (after each epoch, or --sample-every steps).
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

import models
import utils

LEARNING_RATES = {"sgd": 0.1, "adam": 0.001}
# Epochs after which the step size drops to a tenth.
MILESTONES = {"CIFAR100": [150], "ImageNet": list(range(30, 1000, 30))}
USUAL_MILESTONES = [100, 150]


def options() -> utils.Parser:
    """The command line."""
    about = __doc__.splitlines()[0]
    parser = utils.parser(about, models, "resnet20", epochs=200, weight_decay=1e-4)
    rates = "step size (default: 0.1, with adam 0.001)"
    usual = "100 150, on CIFAR100 150, on ImageNet every 30"
    utils.add_schedule_options(parser, None, rates, None, usual)
    parser.add_argument(
        "--average",
        type=utils.natural,
        nargs=2,
        metavar=("START", "END"),
        help="no training: test the mean of the samples START to END − 1, BatchNorm re-estimated",
    )
    parser.add_argument("--sample-every", type=utils.positive, metavar="STEPS",
        help="steps between samples, which are numbered 0, 1, … (default: an epoch)")  # fmt: skip
    parser.add("--optimizer", choices=list(LEARNING_RATES), default="sgd", help="what trains")
    return parser


def average(args: argparse.Namespace) -> dict:
    """Test the mean of samples, and save it in the folder average/ of their directory."""
    directory = args.save_dir / "average"
    utils.check_config(args, args.save_dir / "config.json")
    with utils.refusing("--average"):
        samples = utils.load_samples(args.save_dir, *args.average)
        if not samples:
            raise ValueError(f"{args.average}: allowed: START below END")
    data = utils.load_data(args)
    model = utils.make_model(args, models.build, data)
    began = time.perf_counter()
    with utils.refusing("--average"):
        for sample in samples:
            utils.check_fits(sample, model, sample.file, args.arch)
    utils.load_into(model, utils.mean_of(samples))
    update_bn(data.train.epoch(), model)
    seconds = time.perf_counter() - began
    run = utils.start_run(args, directory, data, model, {"model": model})
    row = {"epoch": 0, "seconds": seconds} | utils.evaluate(model, data.test, args.half)
    with run.lock:
        run.rows[:] = [row]
        utils.save(directory / "model.th", utils.summary(run, model.state_dict()))
        utils.save(directory / "metrics.jsonl", json.dumps(row) + "\n")
    utils.say(f"{directory}: mean of {len(samples)} samples, test accuracy {row['test_acc']:.2f} %")
    return row


def main(argv: Sequence[str] | None = None) -> dict:
    """Train and sample into --save-dir; returns the last metrics row."""
    args = utils.parse(options(), argv)
    if args.lr is None:
        args.lr = LEARNING_RATES[args.optimizer]
    if args.milestones is None:
        args.milestones = MILESTONES.get(args.datasets, USUAL_MILESTONES)
    if args.evaluate:
        return utils.evaluate_only(args, models.build, args.save_dir)
    if args.average:
        if isinstance(args.resume, Path):
            utils.refuse("--resume: not with --average and a PATH; allowed: without one")
        return average(args)
    data = utils.load_data(args)
    model = utils.make_model(args, models.build, data)

    # Fused: one pass over all parameters, at 8 × 8 pixels 5 % of the step.
    settings = {"weight_decay": args.weight_decay, "fused": True}
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, **settings)
    else:
        optimizer = torch.optim.Adam(model.parameters(), args.lr, **settings)

    network = utils.parallel(model)

    def step(images: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor, dict]:
        optimizer.zero_grad()
        loss, output = utils.cross_entropy(network, images, labels, args.half)
        (loss * weight).backward()
        optimizer.step()
        return loss, output, {}

    steps = len(utils.batch_sizes(len(data.train), args.batch_size))
    every = args.sample_every or steps

    def sample(iteration: int) -> None:
        if iteration % every == 0:
            utils.synchronise(model)
            utils.save(args.save_dir / f"{iteration // every}.pt", model.state_dict())

    numbers = range(args.start_epoch * steps // every, args.epochs * steps // every + 1)
    utils.check_space(args, model, numbers)
    state = {"model": model, "optimizer": optimizer}
    run = utils.start_run(args, args.save_dir, data, model, state)
    if not run.rows and not run.progress:
        sample(args.start_epoch * steps // every * every)
    return utils.fit(run, step, model.state_dict, sample)


if __name__ == "__main__":
    utils.program(main)
