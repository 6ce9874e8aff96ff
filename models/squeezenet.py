"""The network of "SqueezeNet" (Iandola et al., arXiv 1602.07360, figure 2: simple bypass).

For images of 32 pixels: as published, the first convolution has no stride, poolings are 2 × 2,
BatchNorm stands before each ReLU, and there is no dropout. Published with biases before BatchNorm,
which change nothing (0.4 % more parameters), and without the last bypass, which the paper has.
"""

import torch
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

from models.small import initialize


class Fire(nn.Module):
    """Squeezes to an eighth of `channels`, expands with 1 × 1 and 3 × 3 filters, half of each."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.squeeze = Conv2dNormActivation(channels_in, channels // 8, 1)
        self.expand1 = Conv2dNormActivation(channels // 8, channels // 2, 1)
        self.expand3 = Conv2dNormActivation(channels // 8, channels // 2, 3)
        self.bypass = channels_in == channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        squeezed = self.squeeze(x)
        expanded = torch.cat([self.expand1(squeezed), self.expand3(squeezed)], dim=1)
        return x + expanded if self.bypass else expanded


class SqueezeNet(nn.Module):
    """A convolution, eight Fire modules, every second with a bypass, and a 1 × 1 convolution."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 96, 3),
            nn.MaxPool2d(2),
            Fire(96, 128),
            Fire(128, 128),
            Fire(128, 256),
            nn.MaxPool2d(2),
            Fire(256, 256),
            Fire(256, 384),
            Fire(384, 384),
            Fire(384, 512),
            nn.MaxPool2d(2),
            Fire(512, 512),
        )
        initialize(self)
        # Initialized as a linear layer is, which after the average it is.
        self.classifier = nn.Conv2d(512, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x)).mean(dim=(2, 3))
