"""`Run`: the directory of a run, its epochs, metrics and checkpoints, and how it is interrupted."""

import argparse
import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from dldr.distributed import all_reduce, print0, progress_bar, rank, world_size
from dldr.parameters import trainable
from training.distributed import all_sum, average_buffers
from training.errors import InputError, blame, handling
from training.files import (
    MIDWAY,
    RESUMED,
    RunFiles,
    blame_checkpoint,
    check_file,
    load_optimizer,
    opened,
    sample_range,
    save,
)
from training.losses import (
    accuracy_text,
    cross_entropy,
    evaluate,
    objective,
    recompute_statistics,
    weighted,
)
from training.network import build_model, check_fits, copy_into, load_weights, state_of
from training.subspaces import Basis
from utils import Data, batch_sizes, load_data, rng, seed_all


def set_lr(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: int) -> None:
    """Set the learning rate of an epoch: --lr, as --milestones or --schedule lower it."""
    if args.schedule == "cosine":
        factor = (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    else:
        factor = 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * factor


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


class Interrupted(Exception):  # noqa: N818
    """A signal to stop came; raised between two batches."""


class Signals:
    """SIGINT, SIGTERM and SIGHUP: the first stops at the next batch, the second at once."""

    def __init__(self) -> None:
        self.number = 0  # of the first that came

    def handle(self, number: int, frame: Any) -> None:
        """What a signal does."""
        if self.number and world_size() == 1:  # torchrun sends a second one by itself
            raise SystemExit(128 + number)
        self.number = self.number or number

    def check(self) -> None:
        """Raise Interrupted in all processes where one got a signal."""
        if world_size() > 1:
            self.number = int(all_reduce(torch.tensor(self.number), dist.ReduceOp.MAX))
        if self.number:
            raise Interrupted

    def until(self, batches: Iterable, every: int = 1) -> Iterator:
        """The batches, until a signal comes.

        Several processes have to stop at the same batch: they ask each other at every `every`-th.
        """
        for number, batch in enumerate(batches):
            if world_size() == 1 or number % every == 0:
                self.check()
            yield batch


class Run:
    """A run: the directory that it holds, its epochs, metrics and checkpoints.

        with Run(args) as run:
            ...
            run.start(data, model, optimizer)
            for epoch in run.epochs():
                for images, labels in run.batches():
                    optimizer.zero_grad()
                    run.loss(model, images, labels).backward()
                    optimizer.step()
                    run.end_step()
                run.end_epoch()

    Whatever can be refused is refused before the first file is written. On SIGINT, SIGTERM or
    SIGHUP the batch is finished, all that --resume needs is saved, and the `with` ends in an
    InputError with exit code 128 + number; a second signal ends the program at once.

    Attributes: `rows`, the metrics of the epochs done; `step`, the steps done since epoch 0;
    `weight`, the share of this process's mean loss of the batch in the mean over all processes.
    """

    files: RunFiles

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.signals = args, Signals()
        self.rows: list[dict] = []
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Nothing is done of the epoch yet."""
        self.done, self.seconds, self.weight = 0, 0.0, 1.0
        self.totals: Counter = Counter()  # sums over its batches, on the device

    def __enter__(self) -> "Run":
        self.stack = contextlib.ExitStack()
        self.files = self.stack.enter_context(opened(self.args))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self.stack:
            if isinstance(error, Interrupted):
                self.save_interrupted()

    # Starting

    def start(
        self, data: Data, model: nn.Module, optimizer: torch.optim.Optimizer | None = None,
        basis: Basis | None = None, **others: Any
    ) -> None:  # fmt: skip
        """Begin or resume to train `model`, a `Subspace` where it comes with its `basis`.

        `others` are more objects with a state_dict for the checkpoint to hold.
        """
        args, files = self.args, self.files
        self.data, self.model, self.optimizer, self.basis = data, model, optimizer, basis
        self.states = {"model": model, **others}
        if optimizer:
            self.states["optimizer"] = optimizer
        self.sizes = batch_sizes(len(data.train), data.train.batch_size)
        self.epoch = args.start_epoch
        if files.checkpoint:
            self.restore(files.checkpoint)
        facts = self.facts()
        print0(f"{files.directory}: {self.text(facts)}")
        finished = self.epoch >= args.epochs
        if not (files.resumes and finished):
            files.begin(facts, self.epoch)
        if not files.resumes:  # what --resume starts from until the first is due
            self.save_checkpoint()
        elif finished and not self.done and not files.has_results_of(self.epoch):
            self.save_results()  # a run that was killed may have written its checkpoint only
        if args.compile:
            # Otherwise an epoch's smaller last batch makes torch compile one graph for all sizes,
            # and use that from then on.
            model.compile(dynamic=False)
        self.stack.enter_context(handling(self.signals.handle))

    def restore(self, checkpoint: dict) -> None:
        """Continue from a checkpoint."""
        file, args = self.files.checkpoint_file(), self.args
        with blame_checkpoint(file):
            states, progress = checkpoint["states"], checkpoint["progress"]
            check_fits(states["model"], self.model, file, args.arch)
            copy_into(self.model, states["model"])
            for name, part in self.states.items():
                if part is not self.model:
                    load_optimizer(part, states[name])
            self.rows = checkpoint["rows"]
            self.epoch = self.rows[-1]["epoch"] if self.rows else args.start_epoch
            if progress:
                self.done, self.seconds = progress["batches"], progress["seconds"]
                for name, total in progress["totals"].items():  # of all processes
                    own = total if rank() == 0 else 0.0
                    self.totals[name] = torch.as_tensor(own, device=args.device)

    def facts(self) -> dict[str, Any]:
        """What config.json records of the network, the data and the samples."""
        args, data, basis = self.args, self.data, self.basis
        # A subspace freezes all parameters; its origin are those that were trained.
        trained = [self.model.origin] if basis else trainable(self.model).values()
        facts = {
            "method": args.method,
            "arch": args.arch,
            "n": sum(p.numel() for p in trained),
            "datasets": args.datasets,
            "train_images": len(data.train),
            "test_images": len(data.test),
            "num_classes": data.num_classes,
            "corrupted_labels": int(args.corrupt * len(data.train)),
        }
        if every := args.sample_every:
            numbers = range(args.epochs * self.steps // every + 1)
            facts["sample_epochs"] = [round(i * every / self.steps, 6) for i in numbers]
        if basis:
            facts["k"] = len(basis.vectors)
            explained = 100 * float(basis.ratios.sum())
            facts["explained_variance"] = explained if math.isfinite(explained) else None
        if numbers := sample_range(vars(args)):
            # With it a report can tell that the samples are still those that were used.
            facts |= {"samples": list(numbers), "fingerprint": self.files.source}
        return facts

    def text(self, facts: dict[str, Any]) -> str:
        """The facts in a line."""
        network = self.model.model if self.basis else self.model
        variant = f" ({network.variant})" if hasattr(network, "variant") else ""
        text = f"{facts['arch']}{variant}, {facts['n']:,} parameters; {facts['datasets']}, "
        text += f"{facts['train_images']:,} training images "
        text += f"({facts['corrupted_labels']:,} corrupted labels), "
        text += f"{facts['test_images']:,} test images; {self.args.device}, "
        text += f"threads: {torch.get_num_threads()}, processes: {world_size()}"
        return text

    # Training

    @property
    def steps(self) -> int:
        """How many steps an epoch has."""
        return len(self.sizes)

    @property
    def step(self) -> int:
        """How many steps are done, since epoch 0."""
        return self.epoch * self.steps + self.done

    def epochs(self) -> Iterator[int]:
        """The epochs still to come, counted from 0."""
        args, name = self.args, str(self.files.directory)
        epochs = range(self.epoch, args.epochs)
        if not args.schedule and args.milestones and min(args.milestones) >= args.epochs:
            text = f"--milestones: the first, {min(args.milestones)}, is not below --epochs"
            print0(f"{text} {args.epochs}, so the learning rate stays {args.lr:g}")
        with progress_bar(epochs, name, args.epochs, initial=self.epoch, unit="epoch") as bar:
            for epoch in bar:
                self.epoch = epoch
                yield epoch
        self.signals.check()
        last, best = self.rows[-1], max(self.rows, key=lambda row: row["test_acc"])
        print0(
            f"{name}: test accuracy {last['test_acc']:.2f} % after epoch "
            f"{last['epoch']}, best {best['test_acc']:.2f} % after epoch {best['epoch']}"
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch's batches still to come, images and labels."""
        self.model.train()
        # Dropout and the like: a resumed run draws what an unbroken one would.
        random = rng(self.args.randomseed, "network", self.epoch)
        seeds = random.integers(2**63, size=self.steps)
        began = time.perf_counter() - self.seconds
        self.totals["finite"] = self.done
        batches = self.signals.until(self.data.train.epoch(self.epoch, self.done), every=10)
        name = f"epoch {self.epoch + 1}"
        self.bar = progress_bar(batches, name, self.steps, initial=self.done, unit="batch")
        try:
            with self.bar, blame():
                for images, labels in self.bar:
                    seed_all(int(seeds[self.done]) + 2 * rank())
                    self.weight = len(labels) * world_size() / self.sizes[self.done]
                    yield images, labels
        finally:
            self.seconds = time.perf_counter() - began

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What is to be minimized of a batch, and counted in the metrics."""
        loss, logits = cross_entropy(network, images, labels, self.args.half)
        self.log(loss, logits, labels)
        if self.basis:
            return objective(loss, self.weight, self.args, self.model)
        return weighted(loss, self.weight)

    @torch.no_grad()
    def log(self, loss: Tensor, logits: Tensor, labels: Tensor, **details: Any) -> None:
        """Add a batch's mean loss and logits to the metrics; `details` are averaged, too."""
        self.totals.update(details)
        self.totals["loss"] += loss.detach() * len(labels)
        self.totals["correct"] += (logits.argmax(1) == labels).sum()
        self.totals["finite"] += loss.detach() < math.inf  # a launch; isfinite takes four

    def end_step(self) -> None:
        """Count a step as done. Every --print-freq steps this is a host sync: is it finite?"""
        self.done += 1
        if self.done == self.steps or self.done % self.args.print_freq == 0:
            self.check_finite()
            if not self.bar.disable:
                seen = sum(self.sizes[: self.done]) / world_size()
                percent = f"{100 * float(self.totals['correct']) / seen:.2f} %"
                mean = f"{float(self.totals['loss']) / seen:.4f}"
                self.bar.set_postfix(loss=mean, accuracy=percent)

    def check_finite(self) -> None:
        """InputError if the loss or a parameter is no longer finite: nothing of that is saved.

        This is a host sync.
        """
        finite = int(self.totals["finite"]) if self.done else 0
        trained = [p.detach() for p in self.model.parameters() if p.requires_grad]
        if finite == self.done and nn.utils.get_total_norm(trained).isfinite():
            return
        args, file = self.args, self.files.directory / "checkpoint.pt"
        cure = "a larger --batch-size" if args.lr is None else f"a smaller --lr than {args.lr:g}"
        cure = "a smaller --alpha" if args.alpha else cure
        what = "loss is" if finite < self.done else "parameters are"
        where = f"epoch {self.epoch + 1}, step {min(finite + 1, self.done)}"
        raise InputError(
            f"{where}: the {what} not finite; try {cure}; --resume continues from {file}", 1
        )

    def end_epoch(self) -> None:
        """Test, record the epoch's metrics and print them."""
        args = self.args
        lr = self.optimizer.param_groups[0].get("lr")  # P-BFGS has none
        row = {"epoch": self.epoch + 1, "lr": lr} | self.means() | {"seconds": self.seconds}
        if self.basis:
            row["coordinates"] = self.model.coordinates.tolist()  # the path in the subspace
        if args.bn_update:
            # Dropout draws random numbers here, too.
            seed = rng(args.randomseed, "statistics", self.epoch).integers(2**63)
            seed_all(int(seed) + rank())
            recompute_statistics(self.model, self.single_batches(), args.half)
        with blame():  # an image that cannot be read
            row |= evaluate(self.model, self.signals.until(self.data.test.epoch()), args.half)
        self.record(row)
        with tqdm.external_write_mode():  # above the bar
            print0(
                f"epoch {row['epoch']:3d}/{args.epochs}  "
                f"train loss {row['train_loss']:.4f}, accuracy {row['train_acc']:6.2f} %  "
                f"test loss {row['test_loss']:.4f}, accuracy {accuracy_text(row)}"
                + ("" if lr is None else f"  lr {lr:.3g}")
                + f"  {row['seconds']:.1f} s"
            )

    def means(self) -> dict[str, float]:
        """The epoch's mean loss, accuracy in percent and details."""
        sums, n = all_sum(self.totals), len(self.data.train)
        row = {"train_loss": sums["loss"] / n, "train_acc": 100 * sums["correct"] / n}
        details = sums.keys() - {"loss", "correct", "finite"}
        return row | {name: sums[name] / (self.steps * world_size()) for name in sorted(details)}

    def single_batches(self) -> Iterator[Tensor]:
        """The epoch's images in batches of --batch-size, whatever --accumulate is."""
        batches = self.signals.until(self.data.train.epoch(self.epoch))
        for (images, _), size in zip(batches, self.sizes, strict=True):
            yield from images.tensor_split(len(batch_sizes(size, self.args.batch_size)))

    def record(self, row: dict) -> None:
        """Write a row of metrics and, when they are due, the checkpoint and model.th."""
        self.rows.append(row)
        self.begin_epoch()
        self.epoch = row["epoch"]
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
        progress = {}
        if self.done:
            sums = all_sum(self.totals)
            progress = {"batches": self.done, "totals": sums, "seconds": self.seconds}
        needed = {
            "states": {name: state_of(part) for name, part in self.states.items()},
            "rows": self.rows,
            "progress": progress,
            "arguments": {name: getattr(self.args, name) for name in RESUMED + MIDWAY},
            "basis": self.files.source,
        }
        save(self.files.directory / "checkpoint.pt", self.summary() | needed)

    def save_results(self) -> None:
        """Write metrics.jsonl and model.th."""
        self.files.save_metrics(self.rows)
        save(self.files.directory / "model.th", self.summary())

    def save_interrupted(self) -> None:
        """Write checkpoint.pt in the middle of an epoch, and say how to resume."""
        if self.done:
            self.check_finite()
        average_buffers(self.model)
        self.save_checkpoint()
        number = self.signals.number
        if rank():
            raise SystemExit(128 + number)
        name = signal.Signals(number).name
        raise InputError(
            f"stopped by {name}; the same command with --resume continues", 128 + number
        )
