"""The network, its loss and tests, and `Run`: the epochs of a run, its metrics and checkpoints."""

import argparse
import contextlib
import json
import math
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from basis import Basis, computed_from, save_basis
from checkpoint import (
    MIDWAY,
    RESUMED,
    blame_checkpoint,
    check_file,
    claim,
    is_own,
    load_optimizer,
    read_checkpoint,
    sample_fingerprint,
    sample_range,
    save,
    save_config,
)
from distributed import (
    all_reduce,
    all_sum,
    average_buffers,
    on_rank0,
    print0,
    progress_bar,
    rank,
    world_size,
)
from errors import InputError, blame, handling
from network import build_model, copy_into, load_weights
from utils import Data, batch_sizes, load_data, read_tensors, rng, trainable

# ---------------------------------------------------------------------------- loss and tests


def cross_entropy(
    model: nn.Module, images: Tensor, labels: Tensor, half: bool
) -> tuple[Tensor, Tensor]:
    """The batch's mean loss and the logits; `half` runs the network in bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        logits = model(images)
    # In bfloat16 the loss itself would be rounded to three digits.
    return F.cross_entropy(logits.float() if half else logits, labels), logits


def weighted(loss: Tensor, weight: float) -> Tensor:
    """loss · weight; the usual weight, 1, costs a GPU no launch."""
    return loss if weight == 1 else loss * weight


def l2_penalty(args: argparse.Namespace, subspace: nn.Module) -> Tensor:
    """The L2 penalty of --weight-decay on θ(z) itself, as SGD in the full space has it."""
    return args.weight_decay / 2 * subspace.vector().square().sum()


def objective(loss: Tensor, weight: float, args: argparse.Namespace, subspace: nn.Module) -> Tensor:
    """What is minimized: the loss, weighted by this process's share, and the L2 penalty."""
    loss = weighted(loss, weight)
    return loss + l2_penalty(args, subspace) if args.weight_decay else loss


def set_lr(optimizer: torch.optim.Optimizer, args: argparse.Namespace, epoch: int) -> None:
    """Set the learning rate of an epoch: --lr, as --milestones or --schedule lower it."""
    if args.milestones == "cosine":
        factor = (1 + math.cos(math.pi * epoch / args.epochs)) / 2
    else:
        factor = 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * factor


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable, half: bool) -> dict[str, float]:
    """Mean loss, and accuracy in percent, with BatchNorm's running statistics.

    With 100 classes or more, also the top-5 accuracy.
    """
    average_buffers(model)
    model.eval()
    totals: Counter = Counter()
    for images, labels in batches:
        loss, logits = cross_entropy(model, images, labels, half)
        totals["images"] += len(labels)
        totals["loss"] += loss * len(labels)
        totals["correct"] += (logits.argmax(1) == labels).sum()
        if logits.shape[1] >= 100:
            totals["top5"] += (logits.topk(5).indices == labels[:, None]).sum()
    sums = all_sum(totals)
    n = sums.pop("images")
    row = {"test_loss": sums.pop("loss") / n, "test_acc": 100 * (sums.pop("correct") / n)}
    return row | {f"test_{name}": 100 * (total / n) for name, total in sums.items()}


def recompute_statistics(model: nn.Module, batches: Iterable) -> None:
    """Set BatchNorm's running statistics to the mean of the statistics of all batches of images.

    Weights that were never trained through, such as averages, need that (Izmailov et al., UAI
    2018, §3.2).
    """
    # A compiled model would be compiled again for each factor.
    with torch.compiler.set_stance("force_eager"):
        torch.optim.swa_utils.update_bn(batches, model)


def evaluate_only(args: argparse.Namespace, directory: Path) -> dict:
    """What --evaluate does: test the weights of --pretrained or --resume, or the run's own."""
    file = args.resume if isinstance(args.resume, Path) else directory / "model.th"
    check_file("--evaluate", None if args.pretrained else file)
    data = load_data(args)
    model = build_model(args, data)
    if not args.pretrained:
        with blame("--evaluate"):
            load_weights(model, file, args.arch)
    row = evaluate(model, data.test.epoch(), args.half)
    print0(f"test loss {row['test_loss']:.4f}, test accuracy {accuracy_text(row).strip()}")
    return row


def accuracy_text(row: dict) -> str:
    """The test accuracy of a row, and top-5 if it is there."""
    top5 = f", top-5 {row['test_top5']:6.2f} %" if "test_top5" in row else ""
    return f"{row['test_acc']:6.2f} %{top5}"


# ---------------------------------------------------------------------------------- the epochs


class Interrupted(Exception):  # noqa: N818
    """A signal to stop came; raised between two batches."""


class Run:
    """The epochs of a run: where it resumes, its metrics, its files, and how it is interrupted.

        with Run(args, directory, data, model, optimizer) as run:
            for epoch in run.epochs():
                for images, labels, weight in run.batches():
                    ...
                    run.log(loss, logits, labels)
                run.end_epoch()

    `model` is trained and tested; a `Subspace` comes with its `basis`. `others` are more objects
    with a state_dict for the checkpoint to hold. Whatever can be refused is refused before the
    first file is written. On SIGINT, SIGTERM or SIGHUP the batch is finished, all that --resume
    needs is saved, and the `with` ends in an InputError with exit code 128 + number; a second
    signal ends the program at once.

    Attributes: `rows`, the metrics of the epochs done; `step`, the steps done since epoch 0.
    """

    def __init__(
        self, args: argparse.Namespace, directory: Path, data: Data, model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None, basis: Basis | None = None, **others: Any
    ) -> None:  # fmt: skip
        self.args, self.directory, self.data, self.basis = args, directory, data, basis
        self.model, self.optimizer = model, optimizer
        self.states = {"model": model} | ({"optimizer": optimizer} if optimizer else {}) | others
        self.sizes = batch_sizes(len(data.train), data.train.batch_size)
        self.plain = model.model if basis else model  # the network itself
        # A subspace freezes all parameters; its origin are those that were trained.
        self.n = len(model.origin) if basis else sum(p.numel() for p in trainable(model).values())
        self.rows: list[dict] = []
        self.done, self.seconds, self.signal = 0, 0.0, 0  # of the current epoch
        self.totals: Counter = Counter()  # sums over its batches, on the device
        self.source = basis.computed_from if basis else sample_fingerprint(args)
        # Rank 0 decides, and sends what it read: the others may not see its files.
        found = on_rank0(lambda: read_checkpoint(args, directory, model, self.source))
        if found:
            self.restore(*found)
        self.epoch = self.rows[-1]["epoch"] if self.rows else args.start_epoch
        own = found is not None and is_own(found[0], directory)
        self.held = claim(args, directory, keep=own)
        if self.epoch < args.epochs or not own:
            save_config(args, directory, self.facts(), self.epoch, resumed=own)
        if basis and computed_from(directory / "basis.npz") != basis.computed_from:
            # A shard of the columns is no basis: the file then holds only the variances.
            save_basis(
                directory / "basis.npz",
                basis._replace(basis=basis.basis[:, :0]) if args.shard_basis else basis,
            )
        if not own:  # what --resume starts from until the first is due
            self.save_checkpoint()
        # A run that was killed may have written its checkpoint only.
        if self.rows and self.epoch >= args.epochs and not self.done and not self.has_results():
            self.save_results()
        if args.compile:
            # Otherwise an epoch's smaller last batch makes torch compile one graph for all sizes,
            # and use that from then on.
            model.compile(dynamic=False)

    # Resuming

    def restore(self, file: Path, checkpoint: dict) -> None:
        """Continue from a checkpoint that was read from `file`."""
        states, progress = checkpoint["states"], checkpoint["progress"]
        with blame_checkpoint(file):
            copy_into(self.model, states["model"])
            for name, part in list(self.states.items())[1:]:
                load_optimizer(part, states.get(name), file)
        self.rows, self.done = checkpoint["rows"], progress.get("batches", 0)
        self.seconds = progress.get("seconds", 0.0)
        for name, total in progress.get("totals", {}).items():  # of all processes
            own = total if rank() == 0 else 0.0
            self.totals[name] = torch.as_tensor(own, device=self.args.device)
        begun = f", and {self.done} batches of the next" if self.done else ""
        print0(f"{file}: {checkpoint['epoch']} epochs are done{begun}")

    def facts(self) -> dict[str, Any]:
        """What config.json records of the network, the data and the samples."""
        args, data = self.args, self.data
        facts = {
            "arch": args.arch,
            "n": self.n,
            "datasets": args.datasets,
            "train_images": len(data.train),
            "test_images": len(data.test),
            "num_classes": data.num_classes,
            "corrupted_labels": int(args.corrupt * len(data.train)),
        }
        if every := getattr(args, "sample_every", None):
            numbers = range(args.epochs * self.steps // every + 1)
            facts["sample_epochs"] = [round(i * every / self.steps, 6) for i in numbers]
        if self.basis:
            facts["k"] = len(self.basis.basis)
            explained = 100 * float(self.basis.explained_variance_ratio.sum())
            facts["explained_variance"] = explained if math.isfinite(explained) else None
        if numbers := sample_range(vars(args)):
            # With it a report can tell that the samples are still those that were used.
            facts |= {"samples": list(numbers), "fingerprint": sample_fingerprint(args)}
        return facts

    # Training

    @property
    def steps(self) -> int:
        """How many steps an epoch has."""
        return len(self.sizes)

    @property
    def step(self) -> int:
        """How many steps are done, since epoch 0."""
        return self.epoch * self.steps + self.done

    def __enter__(self) -> "Run":
        args, data, threads = self.args, self.data, torch.get_num_threads()
        variant = f" ({self.plain.variant})" if hasattr(self.plain, "variant") else ""
        several = f", {world_size()} processes" if world_size() > 1 else ""
        print0(
            f"{self.directory}: {args.arch}{variant}, {self.n:,} parameters; {args.datasets}, "
            f"{len(data.train):,} training images "
            f"({int(args.corrupt * len(data.train)):,} corrupted labels), "
            f"{len(data.test):,} test images; "
            f"{args.device}, {threads} thread{'s' * (threads > 1)}{several}"
        )
        self.handlers = contextlib.ExitStack()
        self.handlers.enter_context(handling(self.on_signal))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self.held, self.handlers:
            if isinstance(error, Interrupted):
                self.save_interrupted()

    def epochs(self) -> Iterator[int]:
        """The epochs still to come, counted from 0."""
        settings = {"initial": self.epoch, "unit": "epoch"}
        epochs = range(self.epoch, self.args.epochs)
        drops = getattr(self.args, "milestones", [])
        if drops and drops != "cosine" and min(drops) >= epochs.stop:
            text = f"--milestones: the first, {min(drops)}, is not below --epochs {epochs.stop}"
            print0(f"{text}, so the learning rate stays {self.args.lr:g}")
        with progress_bar(epochs, str(self.directory), self.args.epochs, **settings) as bar:
            for self.epoch in bar:
                yield self.epoch
        self.check_signal()
        last, best = self.rows[-1], max(self.rows, key=lambda row: row["test_acc"])
        print0(
            f"{self.directory}: test accuracy {last['test_acc']:.2f} % after epoch "
            f"{last['epoch']}, best {best['test_acc']:.2f} % after epoch {best['epoch']}"
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """The epoch's batches still to come: images, labels, and the weight of their mean loss.

        So weighted, the mean over the processes is that over all images.
        """
        self.model.train()
        # Dropout and the like: a resumed run draws what an unbroken one would.
        random = rng(self.args.randomseed, "network", self.epoch)
        seeds = random.integers(2**63, size=self.steps)
        began = time.perf_counter() - self.seconds
        self.totals["finite"] = self.done
        batches = self.until_signal(self.data.train.epoch(self.epoch, self.done), every=10)
        name = f"epoch {self.epoch + 1}"
        settings = {"initial": self.done, "unit": "batch"}
        with progress_bar(batches, name, self.steps, **settings) as self.bar:
            try:
                for images, labels in self.bar:
                    torch.manual_seed(int(seeds[self.done]) + 2 * rank())
                    yield images, labels, len(labels) * world_size() / self.sizes[self.done]
            finally:
                self.seconds = time.perf_counter() - began

    @torch.no_grad()
    def log(self, loss: Tensor, logits: Tensor, labels: Tensor, **details: Any) -> None:
        """Count a step as done, with its mean loss and logits; `details` are averaged, too.

        Every --print-freq steps this is a host sync, to see whether the loss is finite.
        """
        self.totals.update(details)
        self.totals["loss"] += loss.detach() * len(labels)
        self.totals["correct"] += (logits.argmax(1) == labels).sum()
        self.totals["finite"] += loss.detach() < math.inf  # a launch; isfinite takes four
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
        args, file = self.args, self.directory / "checkpoint.pt"
        cure = f"a smaller --lr than {args.lr:g}" if "lr" in args else "a larger --batch-size"
        cure = "a smaller --alpha" if getattr(args, "alpha", 0) else cure
        cure += " or no --half" if args.half else ""
        lr = f" at learning rate {self.lr():g}" if self.lr() else ""
        what = "loss is" if finite < self.done else "parameters are"
        where = f"epoch {self.epoch + 1}, step {min(finite + 1, self.done)}{lr}"
        raise InputError(
            f"{where}: the {what} not finite; try {cure}; --resume continues from {file}", 1
        )

    def lr(self) -> float | None:
        """The current learning rate; P-BFGS has none."""
        return self.optimizer.param_groups[0].get("lr")

    def end_epoch(self) -> None:
        """Test, record the epoch's metrics and print them."""
        args = self.args
        row = {"epoch": self.epoch + 1, "lr": self.lr()} | self.means() | {"seconds": self.seconds}
        if self.basis:
            row["coordinates"] = self.model.coordinates.tolist()  # the path in the subspace
        if getattr(args, "bn_update", False):
            # Dropout draws random numbers here, too.
            seed = rng(args.randomseed, "statistics", self.epoch).integers(2**63)
            torch.manual_seed(int(seed) + rank())
            recompute_statistics(self.model, self.single_batches())
        row |= evaluate(self.model, self.until_signal(self.data.test.epoch()), args.half)
        self.record(row)
        with tqdm.external_write_mode():  # above the bar
            print0(
                f"epoch {row['epoch']:3d}/{args.epochs}  "
                f"train loss {row['train_loss']:.4f}, accuracy {row['train_acc']:6.2f} %  "
                f"test loss {row['test_loss']:.4f}, accuracy {accuracy_text(row)}"
                + ("" if row["lr"] is None else f"  lr {row['lr']:.3g}")
                + f"  {row['seconds']:.1f} s"
            )

    def record(self, row: dict) -> None:
        """Write a row of metrics and, when they are due, the checkpoint and model.th."""
        self.rows.append(row)
        self.done, self.seconds, self.totals = 0, 0.0, Counter()
        if row["epoch"] % self.args.save_every == 0 or row["epoch"] == self.args.epochs:
            self.save_checkpoint()
            self.save_results()
        else:
            self.save_metrics()

    def means(self) -> dict[str, float]:
        """The epoch's mean loss, accuracy in percent and details."""
        sums, n = all_sum(self.totals), len(self.data.train)
        del sums["finite"]
        row = {"train_loss": sums.pop("loss") / n, "train_acc": 100 * sums.pop("correct") / n}
        steps = self.steps * world_size()
        return row | {name: total / steps for name, total in sums.items()}

    def single_batches(self) -> Iterator[Tensor]:
        """The epoch's images in batches of --batch-size, whatever --accumulate is."""
        batches = self.until_signal(self.data.train.epoch(self.epoch))
        for (images, _), size in zip(batches, self.sizes, strict=True):
            yield from images.tensor_split(len(batch_sizes(size, self.args.batch_size)))

    # Signals

    def on_signal(self, number: int, frame: Any) -> None:
        """Remember the first signal; the second ends the program at once."""
        if self.signal and world_size() == 1:  # torchrun sends a second one by itself
            raise SystemExit(128 + number)
        self.signal = self.signal or number

    def check_signal(self) -> None:
        """Raise Interrupted in all processes where one got a signal."""
        if world_size() > 1:
            self.signal = int(all_reduce(torch.tensor(self.signal), dist.ReduceOp.MAX))
        if self.signal:
            raise Interrupted

    def until_signal(self, batches: Iterable, every: int = 1) -> Iterator:
        """The batches, until a signal comes.

        Several processes have to stop at the same batch: they ask each other at every `every`-th.
        """
        for number, batch in enumerate(batches):
            if world_size() == 1 or number % every == 0:
                self.check_signal()
            yield batch

    def save_interrupted(self) -> None:
        """Write checkpoint.pt in the middle of an epoch, and say how to resume."""
        if self.done:
            self.check_finite()
        average_buffers(self.model)
        self.save_checkpoint()
        code, name = 128 + self.signal, signal.Signals(self.signal).name
        if rank():
            raise SystemExit(code)
        raise InputError(f"stopped by {name}; the same command with --resume continues", code)

    # Files

    def summary(self) -> dict[str, Any]:
        """What model.th holds, and checkpoint.pt too."""
        export = getattr(self.model, "export", self.model.state_dict)
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
            "states": {name: part.state_dict() for name, part in self.states.items()},
            "rows": self.rows,
            "progress": progress,
            "arguments": {n: getattr(self.args, n) for n in RESUMED + MIDWAY if n in self.args},
            "basis": self.source,
        }
        save(self.directory / "checkpoint.pt", self.summary() | needed)

    def save_metrics(self) -> None:
        """Write metrics.jsonl."""
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        save(self.directory / "metrics.jsonl", lines)

    def save_results(self) -> None:
        """Write metrics.jsonl and model.th."""
        self.save_metrics()
        save(self.directory / "model.th", self.summary())

    def has_results(self) -> bool:
        """Whether model.th, which is written last, is of the last epoch."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return read_tensors(self.directory / "model.th")["epoch"] == self.epoch
        return False
