"""The ResNets of "Identity Mappings in Deep Residual Networks" (ECCV 2016, figure 4e, appendix).

The units of the paper in the stages of the ImageNet networks, for images of 32 pixels. Published
with biases before BatchNorm, which change nothing, and without the last BatchNorm and ReLU, which
the paper has: 0.1 % more parameters.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import conv1x1, conv3x3
from torchvision.ops.misc import Conv2dNormActivation

from models.small import LAYERS, initialize


class Block(nn.Module):
    """The sum of a shortcut and a residual branch, BatchNorm and ReLU before the convolutions.

    Where the size changes, the shortcut is a convolution, and of the activated input, as in the
    authors' code.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, residual: nn.Module
    ) -> None:
        super().__init__()
        self.channels_out = channels_out
        self.bn = nn.BatchNorm2d(channels_in)
        self.residual = residual
        self.shortcut = None
        if stride != 1 or channels_in != channels_out:
            self.shortcut = conv1x1(channels_in, channels_out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.bn(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + self.residual(activated)


class BasicBlock(Block):
    """Two 3 × 3 convolutions, and dropout between them."""

    def __init__(self, channels_in: int, width: int, stride: int, dropout: float = 0.0) -> None:
        residual = nn.Sequential(
            conv3x3(channels_in, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            conv3x3(width, width),
        )
        super().__init__(channels_in, width, stride, residual)


class Bottleneck(Block):
    """Convolutions of 1 × 1, which has the stride, 3 × 3 and 1 × 1, which widens fourfold."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        residual = nn.Sequential(
            conv1x1(channels_in, width, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            conv3x3(width, width),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            conv1x1(width, 4 * width),
        )
        super().__init__(channels_in, 4 * width, stride, residual)


class PreActResNet(nn.Module):
    """Stages of `layers` blocks each, built by block(channels_in, width, stride).

    Each stage but the first begins by halving the image.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], Block],
        layers: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: int = 64,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(3, stem, 3)
        blocks: list[Block] = []
        channels = stem
        for stage, (repeats, width) in enumerate(zip(layers, widths, strict=True)):
            for index in range(repeats):
                halves = stage > 0 and index == 0
                blocks.append(block(channels, width, 2 if halves else 1))
                channels = blocks[-1].channels_out
        # The first block's activation is the stem's, so that its shortcut, too, is activated.
        blocks[0].bn = nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.blocks(self.stem(x))))
        return self.linear(x.mean(dim=(2, 3)))


def preact_resnet(depth: int, num_classes: int = 10) -> PreActResNet:
    """The network of `depth` layers, one of LAYERS."""
    block = BasicBlock if depth < 50 else Bottleneck
    return PreActResNet(block, LAYERS[depth], num_classes=num_classes)
