"""What is minimized, and what is measured: loss, penalty, test loss and accuracy."""

import argparse
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from training.distributed import all_sum, average_buffers
from utils import seed_all


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


def penalty(args: argparse.Namespace, subspace: nn.Module) -> Tensor:
    """The L2 penalty of --weight-decay on θ(z) itself, as SGD in the full space has it."""
    return args.weight_decay / 2 * subspace.vector().square().sum()


def objective(loss: Tensor, weight: float, args: argparse.Namespace, subspace: nn.Module) -> Tensor:
    """What is minimized in a subspace: the loss, weighted, and the L2 penalty.

    AdamW has it apart from the loss: there it pulls z to 0, where training started.
    """
    loss = weighted(loss, weight)
    in_loss = args.weight_decay and args.optimizer != "adamw"
    return loss + penalty(args, subspace) if in_loss else loss


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable, half: bool) -> dict[str, float]:
    """Mean loss, and accuracy in percent, with BatchNorm's running statistics.

    With 100 classes or more, also the top-5 accuracy. Networks that draw random numbers in
    evaluation, too, draw the same in every test.
    """
    average_buffers(model)
    seed_all(0)
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
    n = sums["images"]
    row = {"test_loss": sums["loss"] / n, "test_acc": 100 * (sums["correct"] / n)}
    if "top5" in sums:
        row["test_top5"] = 100 * (sums["top5"] / n)
    return row


def accuracy_text(row: dict) -> str:
    """The test accuracy of a row, and top-5 if it is there."""
    top5 = f", top-5 {row['test_top5']:6.2f} %" if "test_top5" in row else ""
    return f"{row['test_acc']:6.2f} %{top5}"


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable, half: bool) -> None:
    """Set BatchNorm's running statistics to the mean of the statistics of all batches of images.

    Weights that were never trained through, such as averages, need that (Izmailov et al., UAI
    2018, §3.2). Layers that gather none, such as frozen ones, keep theirs.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    before = [{name: v.clone() for name, v in layer._buffers.items()} for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all batches
    model.train()
    try:
        # A compiled model would be compiled again for each factor.
        with torch.compiler.set_stance("force_eager"):
            for batch in batches if layers else ():
                images = batch if isinstance(batch, Tensor) else batch[0]
                with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
                    model(images)
    finally:  # a signal may end it, and what is saved then must have the frozen ones
        for layer, momentum, buffers in zip(layers, momenta, before, strict=True):
            layer.momentum = momentum
            for name, value in buffers.items() if not layer.num_batches_tracked else ():
                layer._buffers[name].copy_(value)
