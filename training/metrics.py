"""What is measured in an epoch, and how it is told."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dldr.distributed import rank, world_size
from training.distributed import all_sum
from training.losses import accuracy_text


class Epoch:
    """What is done of an epoch: its steps, their seconds, and the sums that its metrics are of."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self.sums: Counter = Counter()  # of this process, on the device

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, details: dict) -> None:
        """Add a batch: its mean loss, its logits, and details to be averaged."""
        self.sums.update(details)
        self.sums["loss"] += loss.detach() * len(labels)
        self.sums["correct"] += (logits.argmax(1) == labels).sum()
        self.sums["finite"] += loss.detach() < math.inf  # a launch; isfinite takes four

    def means(self, images: int) -> dict[str, float]:
        """The mean loss, accuracy in percent and details, over all processes."""
        sums = all_sum(self.sums)
        row = {"train_loss": sums["loss"] / images, "train_acc": 100 * sums["correct"] / images}
        details = sums.keys() - {"loss", "correct", "finite"}
        return row | {name: sums[name] / (self.steps * world_size()) for name in sorted(details)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it, of all processes; nothing before the first step."""
        if not self.steps:
            return {}
        return {"batches": self.steps, "totals": all_sum(self.sums), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any], device: str) -> None:
        """Continue from a checkpoint: rank 0 has the sums of all processes."""
        if state:
            self.steps, self.seconds = state["batches"], state["seconds"]
            for name, total in state["totals"].items():
                self.sums[name] = torch.as_tensor(0.0 if rank() else total, device=device)


def statistics_lag(row: dict, model: nn.Module, num_classes: int) -> dict[str, bool]:
    """{"statistics_lag": True} where a test is at chance and training far above it, else {}.

    Then BatchNorm's running statistics are those of other weights than the tested ones.
    """
    chance = 100 / num_classes
    test, train = ((row[name] - chance) / (100 - chance) for name in ("test_acc", "train_acc"))
    normalizes = any(isinstance(layer, _BatchNorm) for layer in model.modules())
    return {"statistics_lag": True} if normalizes and test < 0.1 and train > 0.2 else {}


def epoch_text(row: dict, epochs: int) -> str:
    """A row of metrics as the terminal shows it."""
    text = (
        f"epoch {row['epoch']:3d}/{epochs}  "
        f"train loss {row['train_loss']:.4f}, accuracy {row['train_acc']:6.2f} %  "
        f"test loss {row['test_loss']:.4f}, accuracy {accuracy_text(row)}"
    )
    text += "" if row["lr"] is None else f"  lr {row['lr']:.3g}"
    text += f"  {row['seconds']:.1f} s"
    if "statistics_lag" in row:
        text += (
            f"\ntrain {row['train_acc']:.0f} %, test {row['test_acc']:.0f} %: "
            "BatchNorm's statistics lag; try --bn-update"
        )
    return text


def final_text(rows: Sequence[dict]) -> str:
    """The last and the best test accuracy, as the terminal shows them."""
    last, best = rows[-1], max(rows, key=lambda row: row["test_acc"])
    return (
        f"test accuracy {last['test_acc']:.2f} % after epoch {last['epoch']}, "
        f"best {best['test_acc']:.2f} % after epoch {best['epoch']}"
    )
