"""NASNet-A of "Learning Transferable Architectures for Scalable Image Recognition" (CVPR 2018, 4).

Without drop-path and the second classifier, as in the published code; but the third sum of a
normal cell is the paper's: there the published code adds the cell's input to its own average.
17.5 % fewer parameters than published: 17.0 % are there never used (each cell has both ways to
project what came before it, and takes one or none), 0.5 % are biases that BatchNorm takes away.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

from models.small import initialize

# The paper's figure 4. Each row adds two branches, an operation on a state each: state 0 is the
# cell's input, 1 what came before it, and row i makes state i + 2. A normal cell returns states 1
# to 6 side by side. A reduction cell returns 3 to 6; its operations on states 0 and 1 halve them.
NORMAL = (
    (("separable 3", 0), ("identity", 0)),
    (("separable 3", 1), ("separable 5", 0)),
    (("average", 0), ("identity", 1)),
    (("average", 1), ("average", 1)),
    (("separable 5", 1), ("separable 3", 1)),
)
REDUCTION = (
    (("separable 7", 1), ("separable 5", 0)),
    (("max", 0), ("separable 7", 1)),
    (("average", 0), ("separable 5", 1)),
    (("max", 0), ("separable 3", 2)),
    (("average", 2), ("identity", 3)),
)


def projection(channels_in: int, channels: int) -> nn.Sequential:
    pointwise = Conv2dNormActivation(channels_in, channels, 1, activation_layer=None)
    return nn.Sequential(nn.ReLU(), pointwise)


def operation(name: str, channels: int, stride: int) -> nn.Module:
    """The operation called `name`; a separable convolution is applied twice, as the paper says."""
    match name:
        case "identity":
            return nn.Identity()
        case "average":
            return nn.AvgPool2d(3, stride, padding=1)
        case "max":
            return nn.MaxPool2d(3, stride, padding=1)
    size = int(name.removeprefix("separable "))
    layers = []
    for step in (stride, 1):
        depthwise = nn.Conv2d(
            channels, channels, size, step, size // 2, groups=channels, bias=False
        )
        pointwise = Conv2dNormActivation(channels, channels, 1, activation_layer=None)
        layers += [nn.ReLU(), depthwise, pointwise]
    return nn.Sequential(*layers)


class FactorizedReduction(nn.Module):
    """Halves the image: half of the channels see its even pixels, the other half its odd ones."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(channels_in, channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(channels_in, channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.even(x), self.odd(F.pad(x, (-1, 1, -1, 1)))], dim=1))


class Cell(nn.Module):
    """A cell of `channels` a branch; `halved` says that the cell before this one was a reduction.

    `channels_in` and `channels_before` are those of its input and of that cell's input.
    """

    def __init__(
        self, reduces: bool, channels_in: int, channels_before: int, channels: int, halved: bool
    ) -> None:
        super().__init__()
        rows = REDUCTION if reduces else NORMAL
        self.inputs = [[state for _, state in row] for row in rows]
        self.first_output = 3 if reduces else 1
        self.channels_out = channels * (len(rows) + 2 - self.first_output)
        self.project = projection(channels_in, channels)
        if halved:
            self.project_before = FactorizedReduction(channels_before, channels)
        elif channels_before != channels:
            self.project_before = projection(channels_before, channels)
        else:
            self.project_before = nn.Identity()
        self.operations = nn.ModuleList(
            nn.ModuleList(
                operation(name, channels, stride=2 if reduces and state < 2 else 1)
                for name, state in row
            )
            for row in rows
        )

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        states = [self.project(x), self.project_before(before)]
        for (left, right), (i, j) in zip(self.operations, self.inputs, strict=True):
            states.append(left(states[i]) + right(states[j]))
        return torch.cat(states[self.first_output :], dim=1)


class NASNet(nn.Module):
    """`reductions` + 1 stacks of `cells` normal cells, a reduction cell between two stacks.

    The stem and the branches of the first stack have `channels`, those of each further twice more.
    """

    def __init__(self, cells: int, reductions: int, channels: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, channels, activation_layer=None)
        self.cells = nn.ModuleList()
        channels_in = channels_before = channels
        halved = False
        for reduces in [*([False] * cells + [True]) * reductions, *[False] * cells]:
            channels *= 2 if reduces else 1
            cell = Cell(reduces, channels_in, channels_before, channels, halved)
            self.cells.append(cell)
            channels_in, channels_before, halved = cell.channels_out, channels_in, reduces
        self.linear = nn.Linear(channels_in, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = before = self.stem(x)
        for cell in self.cells:
            x, before = cell(x, before), x
        return self.linear(F.relu(x).mean(dim=(2, 3)))
