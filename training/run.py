"""`Run`: the epochs of a run, their metrics and checkpoints, and how it is interrupted."""

import argparse
import contextlib
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dldr.distributed import on_rank0, print0, progress_bar, rank, world_size
from training.distributed import average_buffers
from training.errors import InputError, blame, handling
from training.files import RunFiles, blame_checkpoint, check_file, load_optimizer, opened, save
from training.losses import (
    accuracy_text,
    cross_entropy,
    evaluate,
    objective,
    recompute_statistics,
    weighted,
)
from training.metrics import Epoch, epoch_text, final_text, statistics_lag
from training.network import build_model, check_fits, copy_into, load_weights, state_of
from training.records import MIDWAY, RESUMED, facts_of, label_digest, summary_of
from training.signals import Interrupted, Signals
from training.subspaces import Basis
from utils import Data, batch_sizes, load_data, rng, seed_all


def make_optimizer(
    args: argparse.Namespace, parameters: list, **settings: Any
) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, with the --weight-decay that `objective` leaves to it."""
    in_loss = args.basis and args.optimizer != "adamw"
    settings |= {"lr": args.lr, "weight_decay": 0.0 if in_loss else args.weight_decay}
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=args.momentum, **settings)
        for parameter in parameters if args.momentum else ():
            # torch's fused SGD stops where some parameters get their first gradient later.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = torch.optim.AdamW if args.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, **settings)


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """The learning rate of an epoch: --lr, as --milestones or --schedule lower it."""
    if args.schedule == "cosine":
        return args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)


def set_lr(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: int) -> None:
    """Set the learning rate of an epoch."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, epoch)


def schedule_notes(args: argparse.Namespace, changed: dict[str, list], epoch: int) -> list[str]:
    """Lines on what may surprise in the learning rate from `epoch` on; `changed` as in RunFiles."""
    if args.schedule == "cosine" and "epochs" in changed:
        before = argparse.Namespace(**vars(args) | {"epochs": changed["epochs"][0]})
        first, second = learning_rate(before, epoch), learning_rate(args, epoch)
        return [
            f"--schedule cosine: now over {args.epochs} epochs, before over {before.epochs}, so "
            f"after epoch {epoch} the learning rate jumps from {first:.3g} to {second:.3g}"
        ]
    if not args.schedule and args.milestones and min(args.milestones) >= args.epochs:
        first = min(args.milestones)
        return [
            f"--milestones: the first, {first}, is not below --epochs {args.epochs}, so the "
            f"learning rate stays {args.lr:g}"
        ]
    return []


def evaluate_only(args: argparse.Namespace) -> dict:
    """What --evaluate does: test the weights of --pretrained or --resume, or the run's own."""
    own = args.directory / "model.th"
    file = own if args.resume in (None, True) else args.resume
    if not args.pretrained:
        check_file("--evaluate", file)
    with blame():
        data = load_data(args)
    model = build_model(args, data)
    if not args.pretrained:
        with blame("--evaluate"):
            load_weights(model, file, args.arch)
    row = evaluate(model, data.test.epoch(), args.half)
    print0(f"test loss {row['test_loss']:.4f}, test accuracy {accuracy_text(row).strip()}")
    return row


def suggest_cure(args: argparse.Namespace) -> str:
    """What to try against a loss that is not finite."""
    if args.alpha:
        return "try a smaller --alpha"
    if args.lr is None:
        return "try a larger --batch-size"
    return f"try a smaller --lr than {args.lr:g}"


class Run:
    """A run: the directory that it holds, its epochs, metrics and checkpoints.

        with Run(args) as run:
            data = run.load_data()
            ...
            run.start(data, model, optimizer)
            for epoch in run.epochs():
                for images, labels in run.batches():
                    optimizer.zero_grad()
                    run.loss(model, images, labels).backward()
                    optimizer.step()
                    run.end_step()
                run.end_epoch()

    Whatever can be refused is refused before the first file is written. On a signal to stop the
    batch is finished, all that --resume needs is saved, and the `with` ends in an InputError with
    exit code 128 + number; a second signal ends the program at once.

    Attributes: `rows`, the metrics of the epochs done; `step`, the steps done since epoch 0;
    `weight`, the share of this process's mean loss of the batch in the mean over all processes.
    """

    files: RunFiles

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.signals = args, Signals()
        self.rows: list[dict] = []
        self.begun, self.weight = Epoch(), 1.0

    def __enter__(self) -> "Run":
        self.stack = contextlib.ExitStack()
        self.files = self.stack.enter_context(opened(self.args))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self.stack:
            if isinstance(error, Interrupted):
                self.save_interrupted()

    # Starting

    def load_data(self) -> Data:
        """The images and labels; InputError unless those of the trajectory, and as before."""
        with blame():
            data = load_data(self.args)
        digest = label_digest(data)
        on_rank0(lambda: self.files.check_labels(digest))
        return data

    def start(
        self,
        data: Data,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        basis: Basis | None = None,
        **others: Any,
    ) -> None:
        """Begin or resume to train `model`, a `Subspace` where it comes with its `basis`.

        `others` are more objects with a state_dict for the checkpoint to hold.
        """
        args, files = self.args, self.files
        self.data, self.model, self.optimizer, self.basis = data, model, optimizer, basis
        self.states = others | ({"optimizer": optimizer} if optimizer else {})
        self.sizes = batch_sizes(len(data.train), data.train.batch_size)
        self.epoch = args.start_epoch
        if files.checkpoint:
            self.restore(files.checkpoint)
        network = model.model if basis else model
        facts = facts_of(args, data, model, basis, optimizer, self.steps)
        print0(f"{files.directory}: {summary_of(args, facts, getattr(network, 'variant', ''))}")
        for line in schedule_notes(args, files.changed, self.epoch) if optimizer else ():
            print0(line)
        finished = self.epoch >= args.epochs
        if not (files.resumes and finished):
            files.begin(facts, self.epoch)
        if not files.resumes:  # what --resume starts from until the first is due
            self.save_checkpoint()
        elif finished and not self.begun.steps and not files.has_results_of(self.epoch):
            self.save_results()  # a run that was killed may have written its checkpoint only
        if args.compile:
            # Otherwise an epoch's smaller last batch makes torch compile one graph for all sizes,
            # and use that from then on.
            model.compile(dynamic=False)
        self.stack.enter_context(handling(self.signals.handle))

    def restore(self, checkpoint: dict) -> None:
        """Continue from a checkpoint."""
        file, args = self.files.checkpoint_file, self.args
        with blame_checkpoint(file):
            states = checkpoint["states"]
            check_fits(states["model"], self.model, file, args.arch)
            with blame(str(file)):  # which may be of another basis
                copy_into(self.model, states["model"])
            for name, part in self.states.items():
                load_optimizer(part, states[name])
            self.rows = checkpoint["rows"]
            self.epoch = self.rows[-1]["epoch"] if self.rows else args.start_epoch
            self.begun.load_state_dict(checkpoint["progress"], args.device)

    # Training

    @property
    def steps(self) -> int:
        """How many steps an epoch has."""
        return len(self.sizes)

    @property
    def step(self) -> int:
        """How many steps are done, since epoch 0."""
        return self.epoch * self.steps + self.begun.steps

    def epochs(self) -> Iterator[int]:
        """The epochs still to come, counted from 0."""
        args, name = self.args, str(self.files.directory)
        epochs = range(self.epoch, args.epochs)
        with progress_bar(epochs, name, args.epochs, initial=self.epoch, unit="epoch") as bar:
            for epoch in bar:
                self.epoch = epoch
                yield epoch
        self.signals.check()
        print0(f"{name}: {final_text(self.rows)}")

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches still to come, images and labels."""
        self.model.train()
        epoch, begun = self.epoch, self.begun
        # Dropout and the like: a resumed run draws what an unbroken one would.
        seeds = rng(self.args.train_seed, "network", epoch).integers(2**63, size=self.steps)
        began = time.perf_counter() - begun.seconds
        begun.sums["finite"] = begun.steps
        batches = self.signals.until(self.data.train.epoch(epoch, begun.steps), every=10)
        settings = {"initial": begun.steps, "unit": "batch"}
        self.bar = progress_bar(batches, f"epoch {epoch + 1}", self.steps, **settings)
        try:
            with self.bar, blame():
                for images, labels in self.bar:
                    seed_all(int(seeds[begun.steps]) + 2 * rank())
                    self.weight = len(labels) * world_size() / self.sizes[begun.steps]
                    yield images, labels
        finally:
            begun.seconds = time.perf_counter() - began

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What is to be minimized of a batch, and counted in the metrics."""
        loss, logits = cross_entropy(network, images, labels, self.args.half)
        self.log(loss, logits, labels)
        if self.basis:
            return objective(loss, self.weight, self.args, self.model)
        return weighted(loss, self.weight)

    def log(self, loss: Tensor, logits: Tensor, labels: Tensor, **details: Any) -> None:
        """Add a batch's mean loss and logits to the metrics; `details` are averaged, too."""
        self.begun.add(loss, logits, labels, details)

    def end_step(self) -> None:
        """Count a step as done. Every --print-freq steps this is a host sync: is it finite?"""
        begun = self.begun
        begun.steps += 1
        if begun.steps == self.steps or begun.steps % self.args.print_freq == 0:
            self.check_finite()
            if not self.bar.disable:
                seen = sum(self.sizes[: begun.steps]) / world_size()
                percent = f"{100 * float(begun.sums['correct']) / seen:.2f} %"
                mean = f"{float(begun.sums['loss']) / seen:.4f}"
                self.bar.set_postfix(loss=mean, accuracy=percent)

    def check_finite(self) -> None:
        """InputError if the loss or a parameter is no longer finite: nothing of that is saved.

        This is a host sync.
        """
        done = self.begun.steps
        finite = int(self.begun.sums["finite"]) if done else 0
        trained = [p.detach() for p in self.model.parameters() if p.requires_grad]
        if finite == done and nn.utils.get_total_norm(trained).isfinite():
            return
        what = "loss is" if finite < done else "parameters are"
        where = f"epoch {self.epoch + 1}, step {min(finite + 1, done)}: the {what} not finite"
        file = self.files.directory / "checkpoint.pt"
        raise InputError(f"{where}; {suggest_cure(self.args)}; --resume continues from {file}", 1)

    def end_epoch(self) -> None:
        """Test, record the epoch's metrics and print them."""
        args, begun = self.args, self.begun
        lr = self.optimizer.param_groups[0].get("lr")  # P-BFGS has none
        row = {"epoch": self.epoch + 1, "lr": lr} | begun.means(len(self.data.train))
        row["seconds"] = begun.seconds
        if self.basis:
            row["coordinates"] = self.model.coordinates.tolist()  # the path in the subspace
        if args.bn_update:
            # Dropout draws random numbers here, too.
            seed = rng(args.train_seed, "statistics", self.epoch).integers(2**63)
            seed_all(int(seed) + rank())
            recompute_statistics(self.model, self.single_batches(), args.half)
        with blame():  # an image that cannot be read
            row |= evaluate(self.model, self.signals.until(self.data.test.epoch()), args.half)
        if self.basis and not args.bn_update:
            row |= statistics_lag(row, self.model, self.data.num_classes)
        self.record(row)
        with tqdm.external_write_mode():  # above the bar
            print0(epoch_text(row, args.epochs))

    def single_batches(self) -> Iterator[Tensor]:
        """The epoch's images in batches of --batch-size, whatever --accumulate is."""
        batches = self.signals.until(self.data.train.epoch(self.epoch))
        for (images, _), size in zip(batches, self.sizes, strict=True):
            yield from images.tensor_split(len(batch_sizes(size, self.args.batch_size)))

    def record(self, row: dict) -> None:
        """Write a row of metrics and, when they are due, the checkpoint and model.th."""
        self.rows.append(row)
        self.begun, self.epoch = Epoch(), row["epoch"]
        if row["epoch"] % self.args.save_every == 0 or row["epoch"] == self.args.epochs:
            self.save_checkpoint()
            self.save_results()
        else:
            self.files.save_metrics(self.rows)

    # Saving

    def summary(self) -> dict[str, Any]:
        """What model.th holds, and checkpoint.pt too."""
        export = self.model.export if self.basis else self.model.state_dict
        return {
            "state_dict": export(),
            "best_prec1": max((row["test_acc"] for row in self.rows), default=0.0),
            "epoch": self.rows[-1]["epoch"] if self.rows else self.args.start_epoch,
            "arch": self.args.arch,
        }

    def save_checkpoint(self) -> None:
        """Write checkpoint.pt: all that --resume needs."""
        parts = {"model": self.model, **self.states}
        needed = {
            "states": {name: state_of(part) for name, part in parts.items()},
            "rows": self.rows,
            "progress": self.begun.state_dict(),
            "arguments": {name: vars(self.args)[name] for name in RESUMED + MIDWAY},
            "basis": self.files.source,
        }
        save(self.files.directory / "checkpoint.pt", self.summary() | needed)

    def save_results(self) -> None:
        """Write metrics.jsonl and model.th."""
        self.files.save_metrics(self.rows)
        save(self.files.directory / "model.th", self.summary())

    def save_interrupted(self) -> None:
        """Write checkpoint.pt in the middle of an epoch, and say how to resume."""
        if self.begun.steps:
            self.check_finite()
        average_buffers(self.model)
        self.save_checkpoint()
        number = self.signals.number
        if rank():
            raise SystemExit(128 + number)
        text = f"stopped by {signal.Signals(number).name}; the same command with --resume continues"
        raise InputError(text, 128 + number)
