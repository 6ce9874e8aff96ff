"""The networks of "Inception-v4, Inception-ResNet and the Impact of Residual Connections on
Learning" (AAAI 2017, section 3), for small images: the stem keeps almost all of their size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.inception import BasicConv2d

from models.small import initialize

DROPOUT = 0.2
RESIDUAL_SCALE = 0.1  # section 3.3: a residual network this wide dies in training without it

Layer = tuple[int, int | tuple[int, int]]  # channels out, kernel
Path = list[Layer | list[Layer]]  # one after the other; a list inside is a fork


class Branches(nn.ModuleList):
    """Modules side by side: their outputs for the same input, concatenated."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


def path(channels_in: int, *layers: Layer | list[Layer], **last: int) -> nn.Sequential:
    """Convolutions that keep the image's size; the settings `last` are for the last one."""
    modules = nn.Sequential()
    for index, layer in enumerate(layers, 1):
        if isinstance(layer, list):
            modules.append(Branches(*(path(channels_in, branch) for branch in layer)))
            continue
        channels, kernel = layer
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        settings = {"kernel_size": (height, width), "padding": (height // 2, width // 2)}
        settings |= last if index == len(layers) else {}
        modules.append(BasicConv2d(channels_in, channels, **settings))
        channels_in = channels
    return modules


def inception(channels_in: int, pooled: int, *paths: Path) -> Branches:
    """A block without a shortcut: a pooling, with `pooled` channels out, beside the paths."""
    pooling = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), path(channels_in, (pooled, 1)))
    return Branches(pooling, *(path(channels_in, *layers) for layers in paths))


def reduction(channels_in: int, *paths: Path, padding: int = 0) -> Branches:
    """Halves the image: in every path by the last convolution, and by a pooling beside them."""
    halve = {"stride": 2, "padding": padding}
    pooling = nn.MaxPool2d(3, **halve)
    return Branches(pooling, *(path(channels_in, *layers, **halve) for layers in paths))


def stem() -> nn.Sequential:
    """Figure 3 without its strides: 384 channels, and two pixels less in height and width."""
    return nn.Sequential(
        path(3, (32, 3), padding=0),
        path(32, (32, 3), (64, 3)),
        Branches(nn.MaxPool2d(3, stride=1, padding=1), path(64, (96, 3))),
        Branches(
            path(160, (64, 1), (96, 3)), path(160, (64, 1), (64, (7, 1)), (64, (1, 7)), (96, 3))
        ),
        Branches(nn.MaxPool2d(3, stride=1, padding=1), path(192, (192, 3))),
    )


class Inception(nn.Module):
    """The stem, `blocks` that end in `channels` channels, and a linear classifier."""

    def __init__(self, blocks: list[nn.Module], channels: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = stem()
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x)).mean(dim=(2, 3))
        return self.linear(F.dropout(x, DROPOUT, self.training))


class InceptionV4(Inception):
    """Figure 9. As in the published code, the second reduction pads: it takes 2 × 2 pixels too."""

    def __init__(self, num_classes: int = 10) -> None:
        a = [(96, 1)], [(64, 1), (96, 3)], [(64, 1), (96, 3), (96, 3)]
        b = (
            [(384, 1)],
            [(192, 1), (224, (1, 7)), (256, (7, 1))],
            [(192, 1), (192, (1, 7)), (224, (7, 1)), (224, (1, 7)), (256, (7, 1))],
        )
        fork = [(256, (1, 3)), (256, (3, 1))]
        c = [(256, 1)], [(384, 1), fork], [(384, 1), (448, (1, 3)), (512, (3, 1)), fork]
        halve_a = [(384, 3)], [(192, 1), (224, 3), (256, 3)]
        halve_b = [(192, 1), (192, 3)], [(256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3)]
        blocks = [
            *(inception(384, 96, *a) for _ in range(4)),
            reduction(384, *halve_a),
            *(inception(1024, 128, *b) for _ in range(7)),
            reduction(1024, *halve_b, padding=1),
            *(inception(1536, 256, *c) for _ in range(3)),
        ]
        super().__init__(blocks, 1536, num_classes)


class ResidualInception(nn.Module):
    """Parallel paths, merged by a linear convolution and scaled, added to a shortcut."""

    def __init__(self, channels_in: int, channels: int, *paths: Path) -> None:
        super().__init__()
        self.branches = Branches(*(path(channels_in, *layers) for layers in paths))
        merged = sum(layers[-1][0] for layers in paths)
        self.merge = nn.Conv2d(merged, channels, 1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = RESIDUAL_SCALE * self.merge(self.branches(x))
        return F.relu(self.bn(self.shortcut(x) + residual))


class InceptionResNetV2(Inception):
    """Figure 15, for images of 9 × 9 pixels or more.

    In the published code a shortcut is a convolution, with BatchNorm after the sum; the paper has
    neither, but half of the published parameters are there, so both are kept. It does not scale
    the residuals of the first five blocks; here all are scaled, as in the paper. Its biases before
    BatchNorm change nothing; left out: 0.07 % fewer parameters.
    """

    def __init__(self, num_classes: int = 10) -> None:
        a = [(32, 1)], [(32, 1), (32, 3)], [(32, 1), (48, 3), (64, 3)]
        b = [(192, 1)], [(128, 1), (160, (1, 7)), (192, (7, 1))]
        c = [(192, 1)], [(192, 1), (224, (1, 3)), (256, (3, 1))]
        halve_a = [(384, 3)], [(256, 1), (256, 3), (384, 3)]
        halve_b = [(256, 1), (384, 3)], [(256, 1), (288, 3)], [(256, 1), (288, 3), (320, 3)]
        blocks = [
            *(ResidualInception(384, 384, *a) for _ in range(5)),
            reduction(384, *halve_a),
            *(ResidualInception(channels, 1154, *b) for channels in [1152] + 9 * [1154]),
            reduction(1154, *halve_b),
            *(ResidualInception(channels, 2048, *c) for channels in [2146] + 4 * [2048]),
        ]
        super().__init__(blocks, 2048, num_classes)
