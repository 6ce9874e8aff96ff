"""Networks for 8 × 8 images that do, in small, what other people's networks do and ours do not."""

import random

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn


class Small(nn.Module):
    """Convolution, BatchNorm, a layer to be tried, and a classifier."""

    def __init__(self, num_classes: int = 10, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.layer = layer or nn.Identity()
        self.head = nn.Linear(72, num_classes)

    def hidden(self, x: Tensor) -> Tensor:
        return self.layer(self.bn(self.conv(x)).relu()).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


class Frozen(Small):
    """BatchNorm that always normalizes with the statistics that it has."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.bn.running_mean.fill_(0.3)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.bn.eval()
        return self


class ActNorm(nn.Module):
    """Takes its scale from the first batch; its buffers are in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("begun", torch.tensor(False), persistent=False)
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.register_buffer("late", None)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        if not self.begun:
            self.scale.copy_(1 / x.std())
            self.begun.fill_(True)
            self.late = torch.zeros(3)
        self.late += 1
        self.mean += 0.1 * (x.mean() - self.mean)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x)
        return self.scale * (x - self.mean)


class Shifting(Small):
    """With an ActNorm."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes, ActNorm())


class Beginning(Small):
    """An ActNorm whose flag is in the state dict, so that snapshots know what is done."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes, ActNorm())
        begun = self.layer._buffers.pop("begun")
        self.layer.register_buffer("begun", begun)


class Reentrant(Small):
    """Computes its first layers again in the backward pass, in torch's old way."""

    def hidden(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.training and not x.requires_grad else x
        return torch.utils.checkpoint.checkpoint(super().hidden, x, use_reentrant=True)


class Moving(nn.Module):
    """A normalization by hand: statistics under names and of types of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1, 1, dtype=torch.float64))
        self.register_buffer("batches", torch.tensor(0, dtype=torch.int16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
            mean = x.detach().double().mean((0, 2, 3))[:, None, None]
            self.mean = self.mean + (mean - self.mean) / self.batches.clamp(max=10)
        return x - self.mean.float()


class ByHand(Small):
    """With a normalization by hand."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes, Moving())


class Merging(Small):
    """Adds an adapter, 0 at first, to its weight for evaluation, as loralib's layers do."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.adapter = nn.Parameter(torch.zeros(num_classes, 72))
        self.head.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if self.merged == mode:
            self.head.weight.data += (-1) ** mode * self.adapter.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.head(hidden) + (0 if self.merged else hidden @ self.adapter.T)


class Dropping(Small):
    """Leaves out layers in training, as the random numbers of Python and numpy tell it."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.more = nn.ModuleList(nn.Linear(72, 72) for _ in range(2))

    def hidden(self, x: Tensor) -> Tensor:
        hidden = super().hidden(x)
        for layer, draw in zip(self.more, (random.random(), np.random.rand()), strict=True):
            if not self.training or draw < 0.5:
                hidden = hidden + layer(hidden).relu()
        return hidden


class Late(Small):
    """A layer that gets its first gradient in the third batch."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.late, self.batches = nn.Linear(72, 72), 0

    def hidden(self, x: Tensor) -> Tensor:
        self.batches += self.training
        hidden = super().hidden(x)
        return hidden + self.late(hidden) if self.batches > 2 else hidden


class Sparse(Small):
    """An embedding with sparse gradients, of the brightness of the image."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.table = nn.Embedding(4, 72, sparse=True)

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) + self.table((x.mean((1, 2, 3)) > 0).long())


class Viewing(Small):
    """`view` after a convolution, as in every tutorial."""

    def hidden(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        return x.view(x.size(0), -1)


class Normed(Small):
    """A layer with tensors that cannot be copied."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes, ActNorm())
        nn.utils.weight_norm(self.head)


class Noisy(Small):
    """Draws random numbers in evaluation, too."""

    def hidden(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().hidden(x), training=True)


class Counting(Small):
    """Keeps a number outside of its tensors, and saves it as its extra state."""

    batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += self.training
        return super().forward(x)

    def get_extra_state(self) -> dict:
        return {"batches": self.batches, "name": "counting"}

    def set_extra_state(self, state: dict) -> None:
        self.batches = state["batches"]


class Opaque(Small):
    """Its extra state is an object."""

    def get_extra_state(self) -> object:
        return random.Random(0)

    def set_extra_state(self, state: object) -> None:
        pass


class Wrapped(nn.Module):
    """Its network is called `module`, as DataParallel calls it, and has a sibling of that name."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.module, self.conv = Small(num_classes), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(self.conv(x))


def parallel(num_classes: int = 10) -> nn.Module:
    """A factory that has wrapped its network already."""
    return nn.DataParallel(Small(num_classes))


def scripted(num_classes: int = 10) -> nn.Module:
    """A network that torch has compiled to its own language."""
    return torch.jit.script(Small(num_classes))


def runtime(num_classes: int = 10) -> nn.Module:
    raise RuntimeError("no weights here")


def key(num_classes: int = 10) -> nn.Module:
    return {}["depth"]


def missing(num_classes: int = 10) -> nn.Module:
    import a_package_that_is_not_there

    return a_package_that_is_not_there.network


def expanded(num_classes: int = 10) -> nn.Module:
    network = Small(num_classes)
    network.head.bias = nn.Parameter(torch.zeros(1).expand(num_classes))
    return network
