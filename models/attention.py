"""The networks of "Residual Attention Network for Image Classification" (CVPR 2017, section 3).

The published code starts each down-sampling of a mask again from the module's input and leaves
units unused; here each continues from the one before, and the up-sampling is bilinear, as the paper
says. As many residual units as published, to have its parameters: in stage 3 that makes one skip
connection which the paper does not draw. For the same reason each unit has a convolution on its
shortcut; the paper's have one only where shapes change. A BatchNorm before the pooling and no
biases in convolutions, as in the authors' own code: 0.1 % fewer parameters than published.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

from models.small import initialize


def activated_conv(
    channels_in: int, channels: int, size: int = 1, stride: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU(), conv)


class ResidualUnit(nn.Module):
    """A pre-activation bottleneck with a convolution on the shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        width = channels // 4
        self.residual = nn.Sequential(
            activated_conv(channels_in, width, stride=stride),
            activated_conv(width, width, size=3),
            activated_conv(width, channels),
        )
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x) + self.shortcut(x)


def units(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualUnit(channels, channels) for _ in range(count)))


class HourGlass(nn.Module):
    """Down-samples `depth` times, one level inside the other, and up again to the input's size."""

    def __init__(self, channels: int, depth: int, skip: bool) -> None:
        super().__init__()
        inside = HourGlass(channels, depth - 1, skip=True) if depth > 1 else units(channels, 2)
        self.levels = nn.Sequential(
            nn.MaxPool2d(3, stride=2, padding=1), units(channels, 1), inside, units(channels, 1)
        )
        self.skip = ResidualUnit(channels, channels) if skip else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        expanded = F.interpolate(self.levels(x), size=x.shape[2:], mode="bilinear")
        return expanded if self.skip is None else expanded + self.skip(x)


class AttentionModule(nn.Module):
    """(1 + mask) · trunk, between two residual units; the mask down-samples `depth` times."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.before = ResidualUnit(channels, channels)
        self.trunk = units(channels, 2)
        self.mask = nn.Sequential(
            HourGlass(channels, depth, skip=depth == 1),
            activated_conv(channels, channels),
            activated_conv(channels, channels),
            nn.Sigmoid(),
        )
        self.after = ResidualUnit(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.after((1 + self.mask(x)) * self.trunk(x))


class ResidualAttentionNetwork(nn.Module):
    """`modules` gives the number of attention modules in each of the first three stages."""

    def __init__(self, modules: tuple[int, int, int], num_classes: int = 10) -> None:
        super().__init__()
        layers = [Conv2dNormActivation(3, 64)]
        channels = 64
        for count, depth in zip(modules, (3, 2, 1), strict=True):
            channels_in, channels = channels, 1024 >> (depth - 1)
            layers.append(ResidualUnit(channels_in, channels, stride=2))
            layers += [AttentionModule(channels, depth) for _ in range(count)]
        layers += [ResidualUnit(1024, 2048, stride=2), units(2048, 2)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(2048), nn.ReLU())
        self.linear = nn.Linear(2048, num_classes)
        initialize(self)
        for module in self.modules():
            if isinstance(module, ResidualUnit):  # no ReLU follows, so no gain to make up for one
                nn.init.kaiming_normal_(
                    module.shortcut.weight, mode="fan_out", nonlinearity="linear"
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.features(x).mean(dim=(2, 3)))
