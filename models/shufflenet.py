"""The network of "ShuffleNet" (Zhang et al., CVPR 2018, table 1), for images of 32 pixels.

As published, the first convolution has no stride and no pooling follows. Published with groups in
the first convolution of stage 2, too, where the paper has none: 0.1 % fewer parameters.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

from models.small import initialize

# The biases before BatchNorm change nothing, but are 1.2 % of the published parameters.
convolution = partial(Conv2dNormActivation, bias=True)


class Unit(nn.Module):
    """Figure 2b, and with `halve` figure 2c, which halves the image and appends to its channels."""

    def __init__(
        self, channels_in: int, channels: int, groups: int, first_groups: int, halve: bool
    ) -> None:
        super().__init__()
        self.halve = halve
        width = channels // 4
        if halve:
            channels -= channels_in
        self.residual = nn.Sequential(
            convolution(channels_in, width, 1, groups=first_groups),
            nn.ChannelShuffle(groups),
            convolution(width, width, 3, 1 + halve, groups=width, activation_layer=None),
            convolution(width, channels, 1, groups=groups, activation_layer=None),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.residual(x)
        if self.halve:
            return F.relu(torch.cat([F.avg_pool2d(x, 3, stride=2, padding=1), residual], dim=1))
        return F.relu(x + residual)


class ShuffleNet(nn.Module):
    """Three stages of units, each of which begins by halving the image."""

    def __init__(
        self,
        groups: int = 3,
        widths: Sequence[int] = (240, 480, 960),
        layers: Sequence[int] = (4, 8, 4),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        channels = 24
        units = []
        for width, repeats in zip(widths, layers, strict=True):
            for index in range(repeats):
                # The 24 channels of the stem are too few to be grouped.
                first_groups = groups if units else 1
                units.append(Unit(channels, width, groups, first_groups, halve=index == 0))
                channels = width
        self.stem = convolution(3, 24, 3)
        self.units = nn.Sequential(*units)
        self.linear = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.units(self.stem(x)).mean(dim=(2, 3)))
