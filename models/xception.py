"""The network of "Xception: Deep Learning with Depthwise Separable Convolutions" (CVPR 2017,
section 3, figure 5), for small images: no stride in its first convolution and its third block.
"""

from itertools import pairwise

import torch
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation


def separable(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_in, 3, padding=1, groups=channels_in, bias=False),
        nn.Conv2d(channels_in, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


class Block(nn.Module):
    """Separable convolutions from each of `channels` to the next, and a shortcut around them.

    Where the block widens the channels, a pooling with `stride` follows and the shortcut is a
    convolution. The ReLU before the first convolution must not be in place, as it is in the
    published code: the shortcut reads what comes before it.
    """

    def __init__(self, *channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential()
        for channels_in, channels_out in pairwise(channels):
            self.residual.extend([nn.ReLU(), separable(channels_in, channels_out)])
        self.shortcut = nn.Identity()
        if channels[0] != channels[-1]:
            self.residual.append(nn.MaxPool2d(3, stride, padding=1))
            self.shortcut = Conv2dNormActivation(
                channels[0], channels[-1], 1, stride, activation_layer=None
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x) + self.shortcut(x)


class Xception(nn.Module):
    """Entry flow, middle flow, exit flow, a linear classifier; as published, without dropout.

    The published code has biases before BatchNorm in the shortcuts, which change nothing; left
    out: 0.01 % fewer parameters.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.entry = nn.Sequential(
            Conv2dNormActivation(3, 32, 3),
            Conv2dNormActivation(32, 64, 3),
            Block(64, 128, 128, stride=2),
            Block(128, 256, 256, stride=2),
            Block(256, 728, 728),
        )
        self.middle = nn.Sequential(*(Block(728, 728, 728, 728) for _ in range(8)))
        self.exit = nn.Sequential(
            Block(728, 728, 1024, stride=2),
            separable(1024, 1536),
            nn.ReLU(),
            separable(1536, 2048),
            nn.ReLU(),
        )
        self.linear = nn.Linear(2048, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # fan_out would be wrong for the depthwise ones: it takes no notice of groups.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.exit(self.middle(self.entry(x)))
        return self.linear(x.mean(dim=(2, 3)))
